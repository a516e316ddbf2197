"""CLIP's towers and BERT as transformers stores them.

CLIP files come with the prefix ``vision_model.`` / ``text_model.`` (``CLIPModel``, and every tower saved before
transformers 5) or without (a tower saved by transformers 5). Both are read; the whole tower is checked, the layers
that are left out afterwards included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blipdiff_train.checkpoints.keys import Gaps, assign, prefixed, row, state_shapes, to_ours
from blipdiff_train.checkpoints.safety import find_file, read_json, read_tensors, weight_names
from blipdiff_train.checkpoints.tables import bert
from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer, load_clip_tokenizer
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.qformer import QFormer

if TYPE_CHECKING:
    from torch import nn
    from transformers import CLIPTextModel

__all__ = ["load_bert_into_qformer", "load_bert_tokenizer", "load_clip_text", "load_clip_tokenizer", "load_clip_vision"]

CLIP_CLASSES = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "ContextCLIPTextModel",
)
BERT_CLASSES = ("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel")

CLIP_OTHER_PARTS = ("visual_projection.", "text_projection.", "logit_scale")
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _tower_config(path: Path, part: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Sizes of one CLIP tower from a tower's own config.json or from a whole CLIP's."""
    config = read_json(path, allowed_class_names=CLIP_CLASSES)
    if config.get("model_type") not in ("clip", f"clip_{part}_model", None):
        raise ValueError(f"{path}: model_type is {config['model_type']!r}, expected clip or clip_{part}_model")
    config = config.get(f"{part}_config") or config
    return {key: config[key] for key in keys if config.get(key) is not None}


def load_tower(module: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str, file: str | Path, other: str) -> None:
    """Fill a CLIP tower of transformers from a file with or without ``prefix``.

    Args:
        other: prefix of the other tower, which a whole CLIP's file has too and which is left aside.

    Raises:
        ValueError: unknown or missing keys, shapes that do not fit; file and keys are named.
    """
    prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    shapes = state_shapes(module)
    rows = prefixed([row(name) for name in shapes], theirs=prefix)
    gaps = Gaps(
        ignored=frozenset({f"{prefix}embeddings.position_ids"}),
        ignored_prefixes=(other, *CLIP_OTHER_PARTS) if prefix else CLIP_OTHER_PARTS,
    )
    assign(module, to_ours(tensors, rows, shapes, file=file, gaps=gaps))


def load_clip_vision(source: str | Path, *, subfolder: str = "", skip_last_layers: int = 1) -> ImageEncoder:
    """The image tower of a CLIP folder or hub id, in fp32, without its last ``skip_last_layers`` layers and final norm.

    Raises:
        ValueError: a file is missing, damaged or does not fit; it and the keys are named.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = _tower_config(find_file(source, ["config.json"], subfolder=subfolder), "vision", VISION_KEYS)
    file = find_file(source, weight_names("model"), subfolder=subfolder)
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**config))
    load_tower(tower, read_tensors(file), prefix="vision_model.", file=file, other="text_model.")
    return ImageEncoder(tower, skip_last_layers)


def load_clip_text(source: str | Path, *, subfolder: str = "") -> CLIPTextModel:
    """The text tower of a CLIP, Stable Diffusion or BLIP-Diffusion folder (``subfolder="text_encoder"``), in fp32.

    Raises:
        ValueError: a file is missing, damaged or does not fit; it and the keys are named.
    """
    file = find_file(source, weight_names("model"), subfolder=subfolder)
    model = clip_text_on_meta(find_file(source, ["config.json"], subfolder=subfolder))
    load_tower(model, read_tensors(file), prefix="text_model.", file=file, other="vision_model.")
    return model


def clip_text_on_meta(config_file: Path) -> CLIPTextModel:
    """The text tower that a config.json describes, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = _tower_config(config_file, "text", TEXT_KEYS)
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**config))


@torch.no_grad()
def load_bert_into_qformer(qformer: QFormer, source: str | Path, *, subfolder: str = "") -> None:
    """Start a Q-Former from BERT: text embeddings, self-attention, text feed-forwards and prediction head.

    The queries' feed-forwards become copies of the text's; queries, cross-attention and ``ln_vision`` keep their fresh
    initialisation. The vocabulary is larger by one row, [DEC], unless the file has it already: that row and its bias
    keep their fresh initialisation too. Source: LAVIS ``Blip2Base.init_Qformer`` and ``Blip2Qformer.__init__``.
    BERT's segment embeddings, pooler and next-sentence head have no place in a Q-Former.

    Raises:
        ValueError: a file is missing, damaged or does not fit the Q-Former's sizes; it and the keys are named.
    """
    config_file = find_file(source, ["config.json"], subfolder=subfolder)
    config = read_json(config_file, allowed_class_names=BERT_CLASSES)
    if config.get("num_attention_heads", qformer.config.num_attention_heads) != qformer.config.num_attention_heads:
        raise ValueError(
            f"{config_file}: num_attention_heads is {config['num_attention_heads']}, "
            f"the Q-Former's is {qformer.config.num_attention_heads}"
        )
    file = find_file(source, weight_names("model"), subfolder=subfolder)
    tensors = {_modern_norm(name): tensor for name, tensor in read_tensors(file).items()}
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""

    state = qformer.state_dict()
    rows = bert(qformer.config, prefix)
    shapes = {f"qformer.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    words = tensors.get(f"{prefix}embeddings.word_embeddings.weight")
    num_words = qformer.config.vocab_size
    if words is not None and words.shape[0] == num_words - 1:
        num_words -= 1
    for name in ("embeddings.word_embeddings.weight", "lm_head.bias"):
        shapes[f"qformer.{name}"] = (num_words, *shapes[f"qformer.{name}"][1:])
    gaps = Gaps(
        ignored=frozenset({f"{prefix}embeddings.position_ids", f"{prefix}embeddings.token_type_embeddings.weight"}),
        ignored_prefixes=(f"{prefix}pooler.", "cls.seq_relationship."),
        absent_parts=("cls.predictions.",),
    )
    for name, tensor in to_ours(tensors, rows, shapes, file=file, gaps=gaps).items():
        target = state[name.removeprefix("qformer.")]
        target[: tensor.shape[0]].copy_(tensor)
    qformer.copy_text_feed_forward()


def _modern_norm(name: str) -> str:
    """The first BERT files call a norm's weight and bias gamma and beta."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
