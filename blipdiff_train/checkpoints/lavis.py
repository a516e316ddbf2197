"""LAVIS checkpoints: BLIP-2 / BLIP-Diffusion stage 1 (one ``.pth``) and BLIP-Diffusion (a folder).

Sources: LAVIS ``Blip2Base.load_from_pretrained``, ``BlipDiffusion.__init__`` (which renames ``text_model`` to
``Qformer``) and ``BlipDiffusion.load_checkpoint_from_dir``.

Deliberate differences from LAVIS:

* Nothing is loaded by hope (``strict=False``). What may be absent is the image tower, as a whole, because LAVIS does
  not save frozen weights.
* The EVA-CLIP ViT-g tower of BLIP-2's own checkpoints is not built: BLIP-Diffusion stands on CLIP ViT-L/14. A file with
  such a tower is refused by name; :func:`read_stage1` reads its Q-Former alone on request.

LAVIS stores no sizes. They follow from the shapes, except the numbers of attention heads: width / 64, as in BERT and in
CLIP's towers, unless given. What we write has ``config.json`` files beside the weights; LAVIS does not look at them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipdiff_train.checkpoints import diffusers as diffusers_layout
from blipdiff_train.checkpoints.keys import Gaps, fill_parts, part_shapes, part_tensors, row, to_ours, to_theirs
from blipdiff_train.checkpoints.safety import find_file, read_json, read_pickle, read_tensors, tensor_mapping
from blipdiff_train.checkpoints.tables import POSITION_IDS, eva_tower_names, lavis_qformer, lavis_tower, projection
from blipdiff_train.checkpoints.tokenizers import (
    load_bert_tokenizer,
    load_clip_tokenizer,
    save_bert_tokenizer,
    save_clip_tokenizer,
)
from blipdiff_train.checkpoints.transformers import clip_text_on_meta, load_clip_vision, load_tower
from blipdiff_train.common.files import atomic_path, write_json
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

DEFAULT_TOWER = "openai/clip-vit-large-patch14"
DEFAULT_STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
POSITION_BUFFER = f"Qformer.bert.{POSITION_IDS}"
TOWER = "visual_encoder."
HEAD_PARTS = ("vision_proj.", "text_proj.", "itm_head.", "temp", "Qformer.cls.")  # what only stage 1 uses
EVA_MARK = "visual_encoder.blocks."
CACHE_FILE = "ctx_embeddings_cache/ctx_embeddings_cache.pt"
HEAD_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """What shapes do not tell.

    Attributes:
        qformer_heads: attention heads of the Q-Former; None: hidden size / 64.
        tower_heads: attention heads of the image tower; None: width / 64.
    """

    qformer_heads: int | None = None
    tower_heads: int | None = None


@dataclass(frozen=True)
class Stage1Weights:
    """What a file holds of stage 1; the image tower is None where there is none, or one that we cannot run."""

    qformer: QFormer
    alignment_heads: AlignmentHeads | None
    image_encoder: ImageEncoder | None


def read_stage1(path: str | Path, *, sizes: Sizes | None = None, skip_eva_tower: bool = False) -> Stage1Weights:
    """A LAVIS stage-1 ``.pth``, in fp32.

    Args:
        path: a file whose ``model`` is the state dict (or that is the state dict itself, or safetensors).
        sizes: numbers of attention heads.
        skip_eva_tower: BLIP-2's own checkpoints stand on the EVA-CLIP ViT-g tower, which this project does not have.
            True takes the Q-Former with its ``ln_vision``, for image embeddings made elsewhere, and leaves the tower.

    Raises:
        ValueError: damaged, unknown or missing keys, shapes that do not fit, or an EVA tower; file and keys are named.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    else:
        content = read_pickle(path)
        is_nested = isinstance(content, dict) and "model" in content
        tensors = tensor_mapping(content["model"] if is_nested else content, path)
    return _stage1_from(tensors, path, sizes or Sizes(), skip_eva_tower=skip_eva_tower)


def _stage1_from(
    tensors: Mapping[str, Tensor],
    file: Path,
    sizes: Sizes,
    *,
    skip_eva_tower: bool = False,
    heads_may_be_absent: bool = False,
) -> Stage1Weights:
    old = "text_model."  # before LAVIS renamed the module
    tensors = {f"Qformer.{name.removeprefix(old)}" if name.startswith(old) else name: t for name, t in tensors.items()}
    has_eva = any(name.startswith(EVA_MARK) for name in tensors)
    if has_eva:
        if not skip_eva_tower:
            raise ValueError(
                f"{file}: its image tower is EVA-CLIP ViT-g ({EVA_MARK}…), which this project does not have: "
                "BLIP-Diffusion stands on CLIP ViT-L/14. skip_eva_tower=True takes the Q-Former alone, "
                "for image embeddings made elsewhere"
            )
        _check_eva_names(tensors, file)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWER)}
    config = qformer_config(tensors, file, sizes.qformer_heads)
    qformer = diffusers_layout.fresh_qformer(config)
    modules: dict[str, torch.nn.Module] = {"qformer": qformer}
    rows = lavis_qformer(config)
    if heads_may_be_absent and not any(name.startswith(HEAD_PARTS) for name in tensors):
        rows = [r for r in rows if not r.theirs.startswith(HEAD_PARTS)]
    else:
        modules["heads"] = AlignmentHeads(config.hidden_size, _shape(tensors, "vision_proj.weight", 2, file)[0])
    if any(name.startswith(TOWER) for name in tensors):
        modules["tower"] = ImageEncoder.from_config(skip_last_layers=0, **tower_sizes(tensors, file, sizes.tower_heads))
        rows += lavis_tower(modules["tower"].num_layers)
    gaps = Gaps(ignored=frozenset({POSITION_BUFFER}))
    fill_parts(modules, to_ours(tensors, rows, part_shapes(modules), file=file, gaps=gaps))
    return Stage1Weights(qformer, modules.get("heads"), modules.get("tower"))


def _check_eva_names(tensors: Mapping[str, Tensor], file: Path) -> None:
    """What is left out must be the tower it is taken for, and whole."""
    found = {name for name in tensors if name.startswith(TOWER)}
    layers = _indices(tensors, r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.weight", file)
    expected = eva_tower_names(len(layers))
    to_ours(
        {name: tensors[name] for name in found},
        [row(name) for name in expected],
        {name: tuple(tensors[name].shape) for name in expected & found},
        file=file,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, ndim: int, file: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{file}: does not fit the model. missing keys: {name}")
    if tensors[name].ndim != ndim:
        raise ValueError(f"{file}: {name} has shape {tuple(tensors[name].shape)}, expected {ndim} axes")
    return tuple(tensors[name].shape)


def _heads(width: int, given: int | None, what: str, file: Path) -> int:
    heads = width // HEAD_SIZE if given is None else given
    if heads < 1 or width % heads:
        raise ValueError(f"{file}: {what} {width} wide cannot have {heads} attention heads; give their number (Sizes)")
    return heads


def qformer_config(tensors: Mapping[str, Tensor], file: Path, num_attention_heads: int | None = None) -> QFormerConfig:
    """Sizes of the Q-Former from the shapes of a LAVIS state dict.

    Raises:
        ValueError: a tensor that tells a size is missing, or cross-attention is not in every n-th layer.
    """
    layers = _indices(tensors, r"Qformer\.bert\.encoder\.layer\.(\d+)\.attention\.self\.query\.weight", file)
    crossing = _indices(tensors, r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.self\.query\.weight", file)
    frequency = crossing[1] - crossing[0] if len(crossing) > 1 else len(layers)
    if crossing != layers[::frequency]:
        raise ValueError(f"{file}: cross-attention in layers {crossing} of {len(layers)}, expected every n-th from 0")
    vocab_size, hidden_size = _shape(tensors, "Qformer.bert.embeddings.word_embeddings.weight", 2, file)
    return QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=_heads(hidden_size, num_attention_heads, "a Q-Former", file),
        intermediate_size=_shape(tensors, "Qformer.bert.encoder.layer.0.intermediate.dense.weight", 2, file)[0],
        max_position_embeddings=_shape(tensors, "Qformer.bert.embeddings.position_embeddings.weight", 2, file)[0],
        num_query_tokens=_shape(tensors, "query_tokens", 3, file)[1],
        cross_attention_freq=frequency,
        image_width=_shape(tensors, "ln_vision.weight", 1, file)[0],
    )


def tower_sizes(tensors: Mapping[str, Tensor], file: Path, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Sizes of LAVIS's CLIP tower from the shapes of a state dict, by ``CLIPVisionConfig``'s names.

    Raises:
        ValueError: a tensor that tells a size is missing.
    """
    width, channels, patch_size, _ = _shape(tensors, f"{TOWER}conv1.weight", 4, file)
    positions = _shape(tensors, f"{TOWER}positional_embedding", 2, file)[0]
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise ValueError(f"{file}: {TOWER}positional_embedding has {positions} rows, expected a square and one")
    layers = _indices(tensors, r"visual_encoder\.transformer\.resblocks\.(\d+)\.ln_1\.weight", file)
    return {
        "hidden_size": width,
        "intermediate_size": _shape(tensors, f"{TOWER}transformer.resblocks.0.mlp.c_fc.weight", 2, file)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": _heads(width, num_attention_heads, "an image tower", file),
        "num_channels": channels,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _indices(tensors: Mapping[str, Tensor], pattern: str, file: Path) -> list[int]:
    found = sorted(int(match[1]) for name in tensors if (match := re.fullmatch(pattern, name)))
    if not found or found[0] != 0:
        example = pattern.replace("\\.", ".").replace(r"(\d+)", "0")
        raise ValueError(f"{file}: does not fit the model. missing keys: {example}")
    return found


def load_stage1(
    path: str | Path,
    *,
    image_encoder: str | Path = DEFAULT_TOWER,
    bert_tokenizer: str | Path = diffusers_layout.DEFAULT_BERT,
    sizes: Sizes | None = None,
) -> ModelParts:
    """A LAVIS stage-1 ``.pth`` as parts.

    Args:
        image_encoder: where CLIP's tower comes from if the file has none: folder or hub id.
        bert_tokenizer: the Q-Former's vocabulary: folder or hub id.

    Raises:
        ValueError: see :func:`read_stage1`; or a tower of another width than the Q-Former reads.
    """
    weights = read_stage1(path, sizes=sizes)
    tower = weights.image_encoder or load_clip_vision(image_encoder)
    if tower.width != weights.qformer.config.image_width:
        raise ValueError(
            f"{path}: the Q-Former reads image tokens of width {weights.qformer.config.image_width}, "
            f"the tower of {image_encoder} makes {tower.width}"
        )
    return ModelParts(
        image_encoder=tower,
        qformer=weights.qformer,
        qformer_tokenizer=load_bert_tokenizer(bert_tokenizer),
        alignment_heads=weights.alignment_heads,
        image_size=tower.image_size,
    )


def stage1_tensors(parts: ModelParts) -> dict[str, Tensor]:
    """The state dict of LAVIS's ``Blip2Qformer``, image tower included; with heads where there are any."""
    modules = {"qformer": parts.qformer, "heads": parts.alignment_heads, "tower": parts.image_encoder}
    rows = lavis_qformer(parts.qformer.config) + lavis_tower(parts.image_encoder.num_layers)
    tensors = part_tensors(modules)
    if parts.alignment_heads is None:
        rows = [r for r in rows if not r.theirs.startswith(HEAD_PARTS)]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("qformer.lm_head.")}
    theirs = to_theirs(tensors, rows)
    theirs[POSITION_BUFFER] = torch.arange(parts.qformer.config.max_position_embeddings)[None]
    return theirs


def save_stage1(path: str | Path, parts: ModelParts) -> None:
    """Write a stage-1 ``.pth`` as LAVIS's ``Blip2Base.load_from_pretrained`` reads it.

    Raises:
        ValueError: there are no alignment heads.
    """
    parts.require("alignment_heads", purpose="a LAVIS stage-1 checkpoint")
    with atomic_path(path) as temporary:
        torch.save({"model": stage1_tensors(parts)}, temporary)


def load_folder(
    folder: str | Path,
    *,
    stable_diffusion: str | Path = DEFAULT_STABLE_DIFFUSION,
    image_encoder: str | Path = DEFAULT_TOWER,
    bert_tokenizer: str | Path | None = None,
    sizes: Sizes | None = None,
) -> ModelParts:
    """A LAVIS BLIP-Diffusion folder as parts, in fp32, with the cached subject embeddings of a fine-tuned one.

    Args:
        stable_diffusion: folder or hub id that gives what the folder lacks: the configurations of UNet, VAE and text
            encoder, the tokenizer and the schedule.
        image_encoder: where CLIP's tower comes from if the folder has none.
        bert_tokenizer: the Q-Former's vocabulary; None: the folder's own, or else ``bert-base-uncased``.
        sizes: numbers of attention heads; by default from ``blip_model/config.json`` where we wrote it.

    Raises:
        ValueError: a file is missing, damaged or does not fit; it and the keys are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    blip_file = find_file(folder, ["blip_weight.pt"], subfolder="blip_model")
    own = find_file(folder, ["config.json"], subfolder="blip_model", required=False)
    if sizes is None and own is not None:
        sizes = Sizes(**{key: read_json(own).get(key) for key in ("qformer_heads", "tower_heads")})
    weights = _stage1_from(read_tensors(blip_file), blip_file, sizes or Sizes(), heads_may_be_absent=True)
    tower = weights.image_encoder or load_clip_vision(image_encoder)
    config = weights.qformer.config

    proj_file = find_file(folder, ["proj_weight.pt"], subfolder="proj_layer")
    subject_projection = SubjectProjection(config.hidden_size)
    modules = {"projection": subject_projection}
    fill_parts(modules, to_ours(read_tensors(proj_file), projection(), part_shapes(modules), file=proj_file))

    def config_of(part: str) -> Path:
        mine = find_file(folder, ["config.json"], subfolder=part, required=False)
        return mine or find_file(stable_diffusion, ["config.json"], subfolder=part)

    unet = diffusers_layout.unet_on_meta(config_of("unet"))
    unet_file = find_file(folder, ["diffusion_pytorch_model.bin"], subfolder="unet")
    diffusers_layout.fill(unet, read_tensors(unet_file), unet_file)
    vae = diffusers_layout.vae_on_meta(config_of("vae"))
    vae_file = find_file(folder, ["diffusion_pytorch_model.bin"], subfolder="vae")
    diffusers_layout.fill(vae, diffusers_layout.modern_vae_names(read_tensors(vae_file)), vae_file)
    text_model = clip_text_on_meta(config_of("text_encoder"))
    text_file = find_file(folder, ["pytorch_model.bin"], subfolder="text_encoder")
    load_tower(text_model, read_tensors(text_file), prefix="text_model.", file=text_file, other="vision_model.")

    has_tokenizer = find_file(folder, ["vocab.json"], subfolder="tokenizer", required=False) is not None
    has_scheduler = find_file(folder, ["scheduler_config.json"], subfolder="scheduler", required=False) is not None
    has_bert = find_file(folder, ["vocab.txt"], subfolder="qformer_tokenizer", required=False) is not None
    if bert_tokenizer is None and has_bert:
        qformer_tokenizer = load_bert_tokenizer(folder, subfolder="qformer_tokenizer")
    else:
        qformer_tokenizer = load_bert_tokenizer(bert_tokenizer or diffusers_layout.DEFAULT_BERT)
    clip_tokenizer = load_clip_tokenizer(folder if has_tokenizer else stable_diffusion, subfolder="tokenizer")
    scheduler = diffusers_layout.load_scheduler(folder if has_scheduler else stable_diffusion)
    cache = read_subject_cache(folder)
    if cache is not None and cache.shape[1:] != (config.num_query_tokens, config.hidden_size):
        raise ValueError(
            f"{folder / CACHE_FILE}: has shape {tuple(cache.shape)}, expected "
            f"{(1, config.num_query_tokens, config.hidden_size)} as the Q-Former beside it makes"
        )
    return ModelParts(
        image_encoder=tower,
        qformer=weights.qformer,
        qformer_tokenizer=qformer_tokenizer,
        alignment_heads=weights.alignment_heads,
        projection=subject_projection,
        text_encoder=TextEncoder(text_model, clip_tokenizer),
        denoiser=Denoiser(vae, unet, scheduler),
        image_size=tower.image_size,
        metadata={"subject_position": 2},
        subject_embeds=None if cache is None else cache[0],
    )


def read_subject_cache(folder: str | Path) -> Tensor | None:
    """Subject embeddings (1 Q D) that LAVIS's fine-tuning trained along with the model, or None.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    file = find_file(folder, [Path(CACHE_FILE).name], subfolder=str(Path(CACHE_FILE).parent), required=False)
    if file is None:
        return None
    value = read_pickle(file)
    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[0] != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{file}: holds {found}, expected a tensor (1, queries, width)")
    return value.detach().float()


def save_folder(folder: str | Path, parts: ModelParts) -> None:
    """Write a BLIP-Diffusion as LAVIS's ``load_checkpoint_from_dir`` reads it, into ``folder`` (which should be new).

    Raises:
        ValueError: a part is missing.
    """
    parts.require("projection", "text_encoder", "denoiser", purpose="a LAVIS BLIP-Diffusion folder")
    folder = Path(folder)
    _save_pickle(folder / "blip_model" / "blip_weight.pt", stage1_tensors(parts))
    write_json(
        folder / "blip_model" / "config.json",
        {
            "qformer_heads": parts.qformer.config.num_attention_heads,
            "tower_heads": parts.image_encoder.config.num_attention_heads,
            "qformer": asdict(parts.qformer.config),
        },
    )
    projection_tensors = to_theirs(part_tensors({"projection": parts.projection}), projection())
    _save_pickle(folder / "proj_layer" / "proj_weight.pt", projection_tensors)
    for part, module in (("unet", parts.denoiser.unet), ("vae", parts.denoiser.vae)):
        _save_pickle(folder / part / "diffusion_pytorch_model.bin", module.state_dict())
        write_json(folder / part / "config.json", diffusers_layout.diffusers_config_json(module))
    text_model = parts.text_encoder.model
    _save_pickle(folder / "text_encoder" / "pytorch_model.bin", diffusers_layout.clip_text_tensors(text_model))
    write_json(folder / "text_encoder" / "config.json", diffusers_layout.clip_text_config_json(text_model))
    save_clip_tokenizer(parts.text_encoder.tokenizer, folder / "tokenizer")
    save_bert_tokenizer(parts.qformer_tokenizer, folder / "qformer_tokenizer")
    diffusers_layout.save_scheduler(folder / "scheduler", parts.denoiser)
    if parts.subject_embeds is not None:
        _save_pickle(folder / CACHE_FILE, parts.subject_embeds[None])


def _save_pickle(file: Path, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().clone()
    else:
        value = {name: tensor.detach().cpu().clone() for name, tensor in value.items()}
    with atomic_path(file) as temporary:
        torch.save(value, temporary)
