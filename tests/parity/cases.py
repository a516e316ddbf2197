"""Stage-1 cases recorded from LAVIS and the Q-Former recorded from diffusers: load, run, compare."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from blipdiff_train.checkpoints.diffusers import read_qformer_config
from blipdiff_train.checkpoints.keys import Gaps, assign, state_shapes, to_ours
from blipdiff_train.checkpoints.tables import diffusers_qformer, lavis_qformer, lavis_tower, projection
from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
from blipdiff_train.losses.captioning import predicting_positions
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.stages.stage1 import Stage1Module, Stage1Outputs

from .runner import (
    LOSS_TOLERANCE,
    Case,
    Comparison,
    compare_activation,
    compare_gradients,
    largest,
    largest_difference,
    register,
    run_case,
)

POSITION_IDS = Gaps(ignored=frozenset({"Qformer.bert.embeddings.position_ids", "embeddings.position_ids"}))


def run_stage1_case(folder: Path) -> dict[str, Comparison]:
    """Every quantity of one recorded stage-1 case (one process, several, or feature extraction) against ours."""
    return run_case(Case(Path(folder), json.loads((Path(folder) / "case.json").read_text(encoding="utf-8"))))


# ---- building ------------------------------------------------------------------------------------------------------


def qformer_config(case: Case) -> QFormerConfig:
    """Sizes of a case; dropout is off, as in the recordings."""
    config = case.info["config"]
    return QFormerConfig(
        vocab_size=case.info["tokens"]["bos_DEC"] + 1,
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        num_query_tokens=config["num_query_token"],
        cross_attention_freq=config["cross_attention_freq"],
        image_width=config["encoder_width"],
        dropout=0.0,
        layer_norm_eps=config.get("layer_norm_eps_bert", 1e-12),
        image_norm_eps=config.get("layer_norm_eps_ln_vision", 1e-5),
    )


def build_stage(case: Case, **options: Any) -> Stage1Module:
    """The case's weights in a stage whose image tower is the identity: the recorded images are the tower's output."""
    config = case.info["config"]
    parts = nn.ModuleDict(
        {
            "qformer": QFormer(qformer_config(case)),
            "heads": AlignmentHeads(config["hidden_size"], config["embed_dim"]),
        }
    )
    rows = lavis_qformer(parts["qformer"].config)
    assign(
        parts,
        to_ours(case.tensors("weights.safetensors"), rows, state_shapes(parts), file=case.folder, gaps=POSITION_IDS),
    )
    smoothing = config.get("itc_label_smoothing", 0.1)
    if config.get("lm_label_smoothing", smoothing) != smoothing:
        raise ValueError(f"{case.folder}: ITC and LM have different label smoothing; a stage has one for both")
    arguments = {
        "total_steps": 1,
        "max_text_len": config["max_txt_len"],
        "label_smoothing": smoothing,
        "mask_same_caption": False,  # the reference
    }
    tokenizer = load_bert_tokenizer(case.folder)
    return Stage1Module(nn.Identity(), parts["qformer"], parts["heads"], tokenizer, **arguments | options)


def gradients(case: Case, module: Stage1Module) -> dict[str, Tensor | None]:
    """Gradients under LAVIS's names."""
    parameters = dict(module.named_parameters())
    rows = lavis_qformer(module.qformer.config)
    return {row.theirs: parameters[row.ours[0]].grad for row in rows if not row.alias}


def trimmed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs padded to the longest text only, as the stage pads them."""
    longest = int(inputs["attention_mask"].sum(1).max())
    return inputs | {name: inputs[name][:, :longest] for name in ("input_ids", "attention_mask")}


def forward(module: nn.Module, inputs: dict[str, Tensor], recorded: dict[str, Tensor]) -> Stage1Outputs:
    """One step with the negatives that the reference drew."""
    inputs = trimmed(inputs)
    return module(
        inputs["image"],
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs.get("image_id"),
        negatives=(recorded["neg_image_idx"], recorded["neg_text_idx"]),
    )


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare_outputs(
    case: Case, module: Stage1Module, inputs: dict[str, Tensor], recorded: dict[str, Tensor], outputs: Stage1Outputs
) -> dict[str, Comparison]:
    """Losses and activations of one process."""
    total = sum(outputs.losses.values())
    result = {
        name: Comparison(largest_difference(ours, recorded[name]), LOSS_TOLERANCE)
        for name, ours in {
            "loss": total,
            "loss_itc": outputs.loss_itc,
            "loss_itm": outputs.itm.loss,
            "loss_lm": outputs.itg.loss,
        }.items()
    }
    activations = {
        "image_embeds_ln": module.qformer.ln_vision(inputs["image"]),
        "query_last_hidden_state": outputs.query_output,
        "text_cls": outputs.text_cls,
        "sim_i2t": outputs.sim_i2t,
        "sim_t2i": outputs.sim_t2i,
        "neg_weights_t2i": outputs.weights_t2i,
        "neg_weights_i2t": outputs.weights_i2t,
        "itm_query_hidden": outputs.itm_query_output,
        "itm_logits": outputs.itm_logits,
    }
    for name, ours in activations.items():
        result[name] = compare_activation(case, name, ours, recorded[name])
    # what predicts no token is never read
    predicting = predicting_positions(inputs["attention_mask"])
    result["lm_logits"] = compare_activation(
        case, "lm_logits", outputs.itg_logits, recorded["lm_logits"][:, :-1][predicting]
    )
    return result


def compare_tokens(module: Stage1Module, captions: list[str], inputs: dict[str, Tensor]) -> Comparison:
    """Our tokenization of the captions; tokens that differ."""
    input_ids, attention_mask = module.tokenize(captions)
    expected = trimmed(inputs)
    if input_ids.shape != expected["input_ids"].shape:
        return Comparison(float("inf"), 0.0)
    different = (input_ids != expected["input_ids"]) | (attention_mask != expected["attention_mask"])
    return Comparison(float(different.sum()), 0.0)


@register("stage 1, one process", lambda case: case.has("inputs.safetensors", "grads.safetensors", "vocab.txt"))
def run_single(case: Case) -> dict[str, Comparison]:
    inputs, recorded = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    module = build_stage(case)
    outputs = forward(module, inputs, recorded)
    result = {"tokens": compare_tokens(module, case.info["captions"], inputs)}
    result |= compare_outputs(case, module, inputs, recorded, outputs)
    sum(outputs.losses.values()).backward()
    result |= compare_gradients(gradients(case, module), case.tensors("grads.safetensors"))
    if case.has("grads_per_loss.safetensors"):
        result |= compare_single_losses(case, inputs, recorded)
    return result


def compare_single_losses(case: Case, inputs: dict[str, Tensor], recorded: dict[str, Tensor]) -> dict[str, Comparison]:
    """The gradient of each loss by itself: one that leaks into another's parameters shows here only."""
    expected = case.tensors("grads_per_loss.safetensors")
    selected = {name.split(".", 1)[1] for name in expected}
    result = {}
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
        module = build_stage(case)
        forward(module, inputs, recorded).losses[ours].backward()
        found = {name: grad for name, grad in gradients(case, module).items() if name in selected}
        own = {name.split(".", 1)[1]: grad for name, grad in expected.items() if name.startswith(f"{theirs}.")}
        result |= {f"{ours} {name}": comparison for name, comparison in compare_gradients(found, own).items()}
    return result


@register("stage 1, several processes", lambda case: case.has("inputs_rank0.safetensors", "grads.safetensors"))
def run_ddp(case: Case) -> dict[str, Comparison]:
    """As many gloo processes as were recorded, under DistributedDataParallel; the worst rank counts."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        world_size = case.info["world_size"]
        # a fork server imports the heavy libraries once for all processes of all cases
        multiprocessing.set_forkserver_preload(["torch", "transformers", "diffusers", "pytorch_lightning"])
        mp.start_processes(_ddp_process, (world_size, port, case, folder), nprocs=world_size, start_method="forkserver")
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    return {name: Comparison(largest(found[name][0] for found in ranks), ranks[0][name][1]) for name in ranks[0]}


def _ddp_process(rank: int, world_size: int, port: int, case: Case, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    inputs = case.tensors(f"inputs_rank{rank}.safetensors")
    recorded = case.tensors(f"outputs_rank{rank}.safetensors")
    module = build_stage(case)
    replica = nn.parallel.DistributedDataParallel(module)  # without find_unused_parameters: every one gets a gradient
    outputs = forward(replica, inputs, recorded)
    sum(outputs.losses.values()).backward()
    result = {"tokens": compare_tokens(module, case.info["captions"][f"rank{rank}"], inputs)}
    result |= compare_outputs(case, module, inputs, recorded, outputs)
    result |= compare_gradients(gradients(case, module), case.tensors("grads.safetensors"))
    torch.save({name: (found.error, found.tolerance) for name, found in result.items()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _is_features(case: Case) -> bool:
    return case.has("inputs.safetensors", "outputs.safetensors", "weights.safetensors", "vocab.txt") and not case.has(
        "grads.safetensors"
    )


@register("features", _is_features)
@torch.no_grad()
def run_features(case: Case) -> dict[str, Comparison]:
    inputs, recorded = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    module = build_stage(case)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    context = module.qformer.encode_images(inputs["image"])
    query_output, _ = module.qformer.image_pass(context)
    text_output = module.qformer.text_pass(ids, mask, pad_outputs=True)
    multimodal, _ = module.qformer.multimodal_pass(ids, mask, context)
    ours = {
        "image.image_embeds": query_output,
        "image.image_embeds_proj": module.heads.image_feats(query_output),
        "text.text_embeds": text_output,
        "text.text_embeds_proj": module.heads.text_feats(text_output),
        "multimodal.multimodal_embeds": multimodal,
        "compute_itm": module.heads.match_logits(multimodal)[:, 1],
    }
    return {name: compare_activation(case, name, ours[name], recorded[name]) for name in recorded}


@register("Q-Former of diffusers", lambda case: case.has("config.json", "model.safetensors", "vocab.txt"))
@torch.no_grad()
def run_qformer(case: Case) -> dict[str, Comparison]:
    """Image tower, multimodal pass and projection, from diffusers' file and from LAVIS's of the same weights."""
    recorded, inputs = case.tensors("outputs.safetensors"), case.tensors("inputs.safetensors")
    vision, config = read_qformer_config(case.folder / "config.json")
    layers = vision["num_hidden_layers"]
    tokens = load_bert_tokenizer(case.folder)(case.info["texts"], padding="longest", return_tensors="pt")
    same = tokens.input_ids.shape == inputs["input_ids"].shape and torch.equal(tokens.input_ids, inputs["input_ids"])
    result = {"tokens": Comparison(0.0 if same else float("inf"), 0.0)}
    for source, file in (("diffusers", "model.safetensors"), ("LAVIS", "weights_lavis.safetensors")):
        if not case.has(file):
            continue
        parts = nn.ModuleDict(
            {
                "tower": ImageEncoder.from_config(skip_last_layers=0, **vision),
                "qformer": QFormer(replace(config, dropout=0.0)),
                "heads": AlignmentHeads(config.hidden_size, case.info["config"].get("embed_dim", 256)),
                "projection": SubjectProjection(config.hidden_size, dropout=0.0),
            }
        )
        tensors, rows = case.tensors(file), diffusers_qformer(config, layers)
        if source == "LAVIS":
            tensors = {name.removeprefix("blip."): tensor for name, tensor in tensors.items()}
            rows = [*lavis_qformer(config), *lavis_tower(layers), *projection("proj_layer.")]
        state = to_ours(tensors, rows, state_shapes(parts), file=case.folder / file, gaps=POSITION_IDS)
        parts.load_state_dict(parts.state_dict() | state)

        context_embeds = parts["tower"](inputs["pixel_values"])
        query_output, text_output = parts["qformer"].multimodal_pass(
            inputs["input_ids"],
            inputs["attention_mask"],
            parts["qformer"].encode_images(context_embeds),
            text_output=True,
            pad_outputs=True,
        )
        ours = {
            "vision_last_hidden_state": parts["qformer"].ln_vision(context_embeds),
            "sequence_output": torch.cat([query_output, text_output], 1),
            "multimodal_before_proj": query_output,
            "multimodal": parts["projection"](query_output),
        }
        for name, tensor in ours.items():
            result[f"{name} ({source} file)"] = compare_activation(case, name, tensor, recorded[name])
    return result
