"""Stage 1 as a module: what trains, what repeats, what is reported, in one process and in two."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
from blipdiff_train.common.rng import torch_generator
from blipdiff_train.data.samples import Stage1Batch
from blipdiff_train.losses.matching import inadmissible_negatives
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.stages import stage1
from blipdiff_train.stages.callbacks import Averaging
from blipdiff_train.stages.stage1 import Stage1Module

VOCABULARY = Path(__file__).parents[1] / "goldens" / "stage1_single" / "freq1"
CAPTIONS = [
    "red dog on grass",
    "blue cat",
    "old wooden toy train near the house",
    "red dog on grass",
    "two birds",
    "cup",
]


def build(dropout: float = 0.1, **options) -> Stage1Module:
    torch.manual_seed(0)
    tower = ImageEncoder.from_config(
        hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = QFormerConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_query_tokens=4,
        image_width=12,
        dropout=dropout,
    )
    arguments = {"total_steps": 4, "max_text_len": 12, "lr": 1e-3, "seed": 3} | options
    return Stage1Module(tower, QFormer(config), AlignmentHeads(16, 8), load_bert_tokenizer(VOCABULARY), **arguments)


def batch(
    start: int = 0, num_rows: int = 6, image_id: list[int] | None = None, captions: list[str] | None = None
) -> Stage1Batch:
    positions = torch.arange(start, start + num_rows)
    images = [torch.randn(3, 16, 16, generator=torch_generator(0, "image", int(p))) for p in positions]
    return Stage1Batch(
        image=torch.stack(images),
        caption=captions or [CAPTIONS[int(p) % len(CAPTIONS)] for p in positions],
        image_id=positions.clone() if image_id is None else torch.tensor(image_id),
        keys=[f"{int(p):06d}" for p in positions],
        positions=positions,
    )


def run(module: Stage1Module, rows: Stage1Batch, **options):
    embeds = module.image_encoder(rows.image)
    return module(embeds, *module.tokenize(rows.caption), rows.image_id, generator=torch_generator(0, "itm"), **options)


def test_exactly_the_named_parameters_get_a_gradient_and_each_gets_one() -> None:
    module = build().train()
    module.training_step(batch(), 0).backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    without = {name for name, p in module.named_parameters() if p.grad is None}
    trainable = set(module.trainable_report.trainable)
    assert without == set(module.trainable_report.frozen)
    assert all(name.startswith("image_encoder.") for name in without)
    # a key's bias shifts all scores of a row: its gradient is zero up to rounding
    assert {name for name in trainable - with_gradient if not name.endswith("key.bias")} == set()
    assert not any(part.training for part in module.image_encoder.modules())
    assert module.qformer.embeddings.dropout.training


def test_each_trainable_parameter_is_in_one_group() -> None:
    module = build()
    groups = module.configure_optimizers()["optimizer"].param_groups
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(module.heads.temperature) in undecayed


def test_a_step_is_a_function_of_seed_and_position() -> None:
    module = build().train()
    losses = []
    for rows in (batch(), batch(6), batch()):
        torch.manual_seed(len(losses))  # history must not matter
        losses.append(module.training_step(rows, 0).item())
    assert losses[0] == losses[2] != losses[1]
    assert module.micro_step(batch(12)) == 2
    assert build(seed=4).train().training_step(batch(), 0).item() != losses[0]


def test_the_total_is_the_weighted_sum_of_what_is_logged(monkeypatch) -> None:
    module = build(loss_weights={"itm": 0.5, "itg": 0.0}).train()
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    total = module.training_step(batch(), 0)
    assert torch.allclose(total, logged["train/loss_itc"] + 0.5 * logged["train/loss_itm"])
    assert logged["train/loss"] == total
    assert logged["train/itm_baseline"].item() == pytest.approx(2 / 3)
    assert {"train/itm_accuracy", "train/itg_accuracy", "train/temperature", "train/loss_itg"} <= set(logged)


@pytest.mark.parametrize(
    "rows",
    [batch(num_rows=1), batch(num_rows=2, image_id=[7, 7]), batch(num_rows=3, captions=["dog"] * 3)],
    ids=["one pair", "one image", "one caption"],
)
def test_without_any_negative_the_step_is_finite(rows) -> None:
    module = build().train()
    loss = module.training_step(rows, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    outputs = run(module, rows)
    assert outputs.itm.baseline.item() == 1.0
    assert int(outputs.itm_exists.sum()) == len(rows)
    outputs = run(build(mask_same_caption=False), rows)  # the reference draws one of them all the same
    assert outputs.itm.baseline.item() == pytest.approx(2 / 3)
    if len(set(rows.image_id.tolist())) == 1:
        assert torch.allclose(outputs.weights_i2t, torch.full((len(rows), len(rows)), 1 / len(rows)))


def test_captions_that_read_the_same_are_no_negatives() -> None:
    """Also when they differ only behind the cut; off, only the own pair is left out."""
    long = "red dog on grass near the house with two cats and a"
    rows = batch(num_rows=3, captions=[f"{long} ball", f"{long} cup", "blue cat"])
    assert build().tokenize(rows.caption)[0].shape == (3, 12)
    weights = run(build().eval(), rows).weights_t2i
    assert (weights > 0).tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    weights = run(build(mask_same_caption=False).eval(), rows).weights_i2t
    assert (weights > 0).sum() == 6


def test_permuting_the_batch_permutes_the_result() -> None:
    module = build(dropout=0.0).eval()
    rows = batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    inverse = order.argsort()
    embeds, (ids, mask) = module.image_encoder(rows.image), module.tokenize(rows.caption)
    image, text = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([5, 0, 1, 2, 3, 4])
    one = module(embeds, ids, mask, rows.image_id, negatives=(image, text))
    two = module(
        embeds[order],
        ids[order],
        mask[order],
        rows.image_id[order],
        negatives=(inverse[image[order]], inverse[text[order]]),
    )
    for name, loss in one.losses.items():
        assert torch.allclose(loss, two.losses[name], atol=1e-5), name
    assert torch.allclose(one.itm_logits[:6][order], two.itm_logits[:6], atol=1e-5)


def test_bfloat16_step_and_gradient_checkpointing() -> None:
    exact = build(dropout=0.0).train().training_step(batch(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = build(dropout=0.0, gradient_checkpointing=True).train().training_step(batch(), 0)
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)


def fit(module: Stage1Module) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        callbacks=[Averaging()],
    )
    train = DataLoader([batch(0), batch(6)], batch_size=None)
    trainer.fit(module, train, DataLoader([batch(100), batch(106, num_rows=4)], batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_fit_validates_with_the_average_and_keeps_the_weights() -> None:
    module = build(ema_decay=0.9)
    first = module.heads.text_proj.weight.clone()
    trainer = fit(module)
    metrics = trainer.callback_metrics
    names = {f"val/{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    names |= {"val/loss", "val/loss_itc", "val/itm_accuracy", "val/itm_baseline", "val/itg_accuracy", "train/loss"}
    assert names <= set(metrics)
    assert metrics["val/i2t_r10"] == 1.0  # ten pairs
    assert module.ema.num_updates == 2
    weight = module.heads.text_proj.weight
    assert not torch.equal(weight, first)
    assert not torch.equal(weight, module.ema.average["heads.text_proj.weight"])  # the weights are back in place


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"loss_weights has lm; stage 1's losses are itc, itm, itg"):
        build(loss_weights={"lm": 1.0})
    with pytest.raises(ValueError, match="max_text_len=32 exceeds the Q-Former's 16"):
        build(max_text_len=32)
    with pytest.raises(ValueError, match="matches no parameter"):
        build(trainable=["q_former.*"])
    with pytest.raises(ValueError, match=r"takes in image_encoder.* which cannot train: it runs without gradient"):
        build(trainable=["*"])


# ---- two processes -------------------------------------------------------------------------------------------------


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    module = build(dropout=0.0).eval()
    # the longest caption differs between the two, and "red dog on grass" stands on both
    captions = [["red dog on grass", "cup", "two birds"], ["red dog on grass", "old wooden toy train near", "blue cat"]]
    rows = batch(3 * rank, 3, captions=captions[rank])
    outputs = run(module, rows)
    record = module._new_record()
    for part in [batch(0, 5), batch(5, 2)] if rank == 0 else [batch(7, 3), batch(6, 1)]:
        record.add(run(module, part, across_ranks=False), part)
    found = {
        "losses": torch.stack(list(outputs.losses.values())).detach(),
        "weights": torch.stack([outputs.weights_i2t, outputs.weights_t2i]),
        "step": module.micro_step(batch(12, 3)),
        "metrics": record.metrics(),
        "logits": outputs.itm_logits.detach(),
        "negatives": torch.stack([outputs.negative_image, outputs.negative_text]),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "transformers", "diffusers", "pytorch_lightning"])
    mp.start_processes(two_processes, (port, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]

    module = build(dropout=0.0).eval()
    captions = ["red dog on grass", "cup", "two birds", "red dog on grass", "old wooden toy train near", "blue cat"]
    negatives = torch.cat([found["negatives"] for found in ranks], 1)
    rows = batch(0, 6, captions=captions)
    one = module(
        module.image_encoder(rows.image),
        *module.tokenize(captions),
        rows.image_id,
        negatives=(negatives[0], negatives[1]),
    )
    assert torch.allclose(
        (ranks[0]["losses"] + ranks[1]["losses"])[:2] / 2, torch.stack(list(one.losses.values()))[:2], atol=1e-5
    )
    assert torch.allclose(
        torch.cat([found["weights"] for found in ranks], 1), torch.stack([one.weights_i2t, one.weights_t2i]), atol=1e-5
    )
    logits = torch.cat([found["logits"].view(3, 3, 2) for found in ranks], 1).flatten(0, 1)
    assert torch.allclose(logits, one.itm_logits, atol=1e-5)
    # the same caption on the other process is no negative
    assert ranks[0]["weights"][:, 0, 3].eq(0).all()
    assert ranks[1]["weights"][:, 0, 0].eq(0).all()
    assert ranks[0]["step"] == 2

    # validation: unequal batches and one sample twice
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    record = module._new_record()
    whole = batch(0, 10)
    record.add(run(module, whole, across_ranks=False), whole)
    expected = record.metrics()
    for name in expected:
        if "_r" in name:
            assert ranks[0]["metrics"][name] == pytest.approx(expected[name]), name


def test_inadmissible_pairs_are_the_union() -> None:
    same = torch.tensor([[True, False], [False, True]])
    text = torch.tensor([[False, True], [False, False]])
    assert inadmissible_negatives(same, text).tolist() == [[True, True], [False, True]]
    assert inadmissible_negatives(same) is same
    assert stage1._first_occurrences(torch.tensor([4, 2, 4, 7, 2])).tolist() == [0, 1, 3]
