"""Stage 1 at drawn sizes against a second, plain writing of it: other widths, heads, lengths, seeds, process counts."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.stages.stage1 import Stage1Module

from .naive import Naive, Rank
from .runner import LOSS_TOLERANCE, compare_gradients

VOCABULARY = Path(__file__).parents[1] / "goldens" / "stage1_single" / "freq1"
NUM_WORDS = 99  # of that vocabulary: what a Q-Former holds at least


def drawn_module(draw: random.Random, seed: int) -> Stage1Module:
    """Any sizes that fit together, odd ones above all, with weights far from an initialisation."""
    torch.manual_seed(seed)
    num_heads = draw.randint(1, 4)
    config = QFormerConfig(
        vocab_size=NUM_WORDS + draw.randint(0, 30),
        hidden_size=num_heads * draw.choice([3, 5, 6, 7]),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=num_heads,
        intermediate_size=draw.randint(7, 31),
        max_position_embeddings=draw.randint(9, 20),
        num_query_tokens=draw.randint(1, 6),
        cross_attention_freq=draw.randint(1, 3),
        image_width=draw.randint(5, 21),
        dropout=0.0,
        layer_norm_eps=draw.choice([1e-12, 1e-5, 1e-2]),
        image_norm_eps=draw.choice([1e-6, 1e-5, 1e-2]),
    )
    heads = AlignmentHeads(config.hidden_size, draw.randint(3, 17), temperature=draw.choice([0.07, 0.2, 1.0]))
    module = Stage1Module(
        nn.Identity(),
        QFormer(config),
        heads,
        load_bert_tokenizer(VOCABULARY),
        total_steps=1,
        max_text_len=9,
        label_smoothing=draw.choice([0.0, 0.1, 0.3]),
        mask_same_caption=False,
        gradient_checkpointing=draw.random() < 0.3,
    )
    for name, parameter in module.named_parameters():
        if name != "heads.temperature":
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module.train()


def drawn_ranks(draw: random.Random, config: QFormerConfig, world_size: int, num_rows: int) -> list[Rank]:
    """Batches with texts of all lengths, shared images, and any pairs as negatives."""
    num_all, num_patches = world_size * num_rows, draw.randint(2, 6)
    share_images = draw.random() < 0.5
    ranks = []
    for rank in range(world_size):
        longest = draw.randint(2, 9)  # processes come with unequal lengths
        own = [rank * num_rows + row for row in range(num_rows)]
        ranks.append(
            Rank(
                images=[torch.randn(num_patches, config.image_width) for _ in own],
                texts=[[2, *draw.choices(range(4, NUM_WORDS), k=draw.randint(1, longest - 1))] for _ in own],
                image_ids=[draw.randint(0, num_all) for _ in own] if share_images else own,
                negative_image=draw.choices(range(num_all), k=num_rows),
                negative_text=draw.choices(range(num_all), k=num_rows),
            )
        )
    return ranks


def run_ours(module: nn.Module, rank: Rank) -> dict[str, Tensor]:
    length = max(map(len, rank.texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in rank.texts])
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in rank.texts])
    negatives = (torch.tensor(rank.negative_image), torch.tensor(rank.negative_text))
    outputs = module(torch.stack(rank.images), ids, mask, torch.tensor(rank.image_ids), negatives=negatives)
    sum(outputs.losses.values()).backward()
    return {name: loss.detach() for name, loss in outputs.losses.items()}


def run_naive(module: Stage1Module, ranks: list[Rank]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in module.named_parameters()}
    double = [Rank(**vars(rank) | {"images": [image.double() for image in rank.images]}) for rank in ranks]
    losses = Naive(weights, module.qformer.config, module.label_smoothing).losses(double)
    total = sum(sum(found.values()) for found in losses) / len(ranks)
    total.backward()
    return losses, {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}


def check(seed: int, ours: list[dict[str, Tensor]], gradients: dict[str, Tensor], naive) -> None:
    losses, expected = naive
    for rank, (mine, theirs) in enumerate(zip(ours, losses, strict=True)):
        for name, loss in theirs.items():
            assert mine[name].item() == pytest.approx(loss.item(), abs=LOSS_TOLERANCE), (seed, rank, name)
    for name, found in compare_gradients(gradients, expected).items():
        assert found.good, (seed, name, found)


@pytest.mark.parametrize("seed", range(12))
def test_one_process(seed) -> None:
    draw = random.Random(seed)
    module = drawn_module(draw, seed)
    ranks = drawn_ranks(draw, module.qformer.config, 1, num_rows=draw.randint(1, 5))
    ours = run_ours(module, ranks[0])
    check(seed, [ours], {name: p.grad for name, p in module.named_parameters()}, run_naive(module, ranks))


SEEDS = range(100, 104)


def drawn_for_two(seed: int) -> tuple[Stage1Module, list[Rank]]:
    draw = random.Random(seed)
    module = drawn_module(draw, seed)
    return module, drawn_ranks(draw, module.qformer.config, 2, num_rows=draw.randint(1, 4))


def two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for seed in SEEDS:
        module, ranks = drawn_for_two(seed)
        losses = run_ours(nn.parallel.DistributedDataParallel(module), ranks[rank])
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        torch.save({"losses": losses, "gradients": gradients}, Path(folder) / f"{seed}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch", "transformers", "diffusers", "pytorch_lightning"])
    mp.start_processes(two_processes, (port, str(tmp_path)), nprocs=2, start_method="forkserver")
    for seed in SEEDS:
        module, ranks = drawn_for_two(seed)
        found = [torch.load(tmp_path / f"{seed}_{rank}.pt", weights_only=True) for rank in range(2)]
        check(seed, [one["losses"] for one in found], found[0]["gradients"], run_naive(module, ranks))
