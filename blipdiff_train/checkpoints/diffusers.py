"""Folders in diffusers' layout: Stable Diffusion 1.x, and BLIP-Diffusion as ``Salesforce/blipdiffusion`` has it.

Deliberate differences from the public BLIP-Diffusion folder, on writing:

* Every size and epsilon is written out: newer transformers fill in 1e-6 for the tower's missing ``layer_norm_eps``,
  and BLIP-Diffusion's is 1e-5.
* ``qformer_tokenizer/`` holds the Q-Former's vocabulary, which the public folder leaves to ``bert-base-uncased``.

``BlipDiffusionPipeline`` of diffusers 0.32.2 with transformers 4.46.3 opens the result all the same;
``scripts/check_export_in_diffusers.py`` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from blipdiff_train.checkpoints.keys import (
    Gaps,
    assign,
    fill_parts,
    part_shapes,
    part_tensors,
    row,
    state_shapes,
    to_ours,
    to_theirs,
)
from blipdiff_train.checkpoints.safety import find_file, read_json, read_tensors, weight_names
from blipdiff_train.checkpoints.tables import POSITION_IDS, diffusers_qformer
from blipdiff_train.checkpoints.tokenizers import (
    load_bert_tokenizer,
    load_clip_tokenizer,
    save_bert_tokenizer,
    save_clip_tokenizer,
)
from blipdiff_train.checkpoints.transformers import TEXT_KEYS, VISION_KEYS, load_clip_text
from blipdiff_train.common.files import write_json
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.parts import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, ModelParts
from blipdiff_train.models.presets import build_unet, build_vae
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DEFAULT_BERT = "bert-base-uncased"
PIPELINES = ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline")
COMPONENTS: dict[str, tuple[str, ...]] = {
    "qformer": ("Blip2QFormerModel",),
    "image_processor": ("BlipImageProcessor",),
    "text_encoder": ("ContextCLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "scheduler": ("PNDMScheduler",),
    "controlnet": ("ControlNetModel",),
}
SCHEDULERS = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler")
PNDM_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "skip_prk_steps",
    "set_alpha_to_one",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# what transformers up to 4.33 assumes for keys that its config files leave out (Blip2VisionConfig, Blip2QFormerConfig)
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
VISION_EPS_SINCE_4_34 = 1e-6  # the only default that later versions changed; they leave out this value instead
QFORMER_NAMES: dict[str, str] = {  # theirs: ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "cross_attention_frequency": "cross_attention_freq",
    "encoder_hidden_size": "image_width",
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "layer_norm_eps",
}
QFORMER_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
}


class StableDiffusion(NamedTuple):
    """The parts of a Stable Diffusion folder that BLIP-Diffusion stands on."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    text_model: CLIPTextModel
    tokenizer: CLIPTokenizer


def load_stable_diffusion(source: str | Path) -> StableDiffusion:
    """VAE, UNet, schedule, CLIP text tower and tokenizer of a Stable Diffusion 1.x folder or hub id, in fp32.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    return StableDiffusion(
        vae=load_vae(source),
        unet=load_unet(source),
        scheduler=load_scheduler(source),
        text_model=load_clip_text(source, subfolder="text_encoder"),
        tokenizer=load_clip_tokenizer(source, subfolder="tokenizer"),
    )


def load_unet(source: str | Path, *, subfolder: str = "unet") -> UNet2DConditionModel:
    """A ``UNet2DConditionModel`` in fp32.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    unet = unet_on_meta(find_file(source, ["config.json"], subfolder=subfolder))
    file = find_file(source, weight_names("diffusion_pytorch_model"), subfolder=subfolder)
    fill(unet, read_tensors(file), file)
    return unet


def load_vae(source: str | Path, *, subfolder: str = "vae") -> AutoencoderKL:
    """An ``AutoencoderKL`` in fp32, with either naming of its attention.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    vae = vae_on_meta(find_file(source, ["config.json"], subfolder=subfolder))
    file = find_file(source, weight_names("diffusion_pytorch_model"), subfolder=subfolder)
    fill(vae, modern_vae_names(read_tensors(file)), file)
    return vae


def load_scheduler(source: str | Path, *, subfolder: str = "scheduler") -> SchedulerMixin:
    """The schedule in ``scheduler_config.json``; a sampler of another kind than PNDM's gives its betas to a PNDM one.

    Raises:
        ValueError: the file is missing or of an unknown class.
    """
    from diffusers import PNDMScheduler

    file = find_file(source, ["scheduler_config.json"], subfolder=subfolder)
    config = read_json(file, allowed_class_names=SCHEDULERS)
    return PNDMScheduler.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def unet_on_meta(config_file: Path) -> UNet2DConditionModel:
    """The UNet that a config.json describes, without weights."""
    with torch.device("meta"):
        return build_unet(_plain_config(config_file, "UNet2DConditionModel"))


def vae_on_meta(config_file: Path) -> AutoencoderKL:
    """The autoencoder that a config.json describes, without weights."""
    with torch.device("meta"):
        return build_vae(_plain_config(config_file, "AutoencoderKL"))


def _plain_config(config_file: Path, class_name: str) -> dict[str, Any]:
    config = read_json(config_file, allowed_class_names=(class_name,))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Fill a module whose names are the file's own.

    Raises:
        ValueError: unknown or missing keys, shapes that do not fit; file and keys are named.
    """
    shapes = state_shapes(module)
    assign(module, to_ours(tensors, [row(name) for name in shapes], shapes, file=file))


def modern_vae_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the VAE's attention as diffusers has them since 0.15; its matrices were 1 × 1 convolutions once."""
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        parent, _, old = module.rpartition(".")
        if parent.endswith("attentions.0") and old in OLD_VAE_ATTENTION:
            name = f"{parent}.{OLD_VAE_ATTENTION[old]}.{leaf}"
            if leaf == "weight" and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed


def load(source: str | Path, *, bert_tokenizer: str | Path | None = None) -> ModelParts:
    """A BLIP-Diffusion folder or hub id, e.g. ``Salesforce/blipdiffusion``, in fp32.

    What the layout has no place for is absent: ``alignment_heads`` is None, and the Q-Former's prediction head is
    freshly initialised (always the same) and of use only after further training of stage 1.

    Args:
        bert_tokenizer: the Q-Former's vocabulary: folder or hub id; None means the folder's own ``qformer_tokenizer/``,
            or else ``bert-base-uncased``.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    index = read_model_index(find_file(source, ["model_index.json"]))
    parts = load_subject_side(source, bert_tokenizer=bert_tokenizer)
    if parts.projection is None:
        raise ValueError(f"{source}: qformer/ has no proj_layer, without which it is not a whole BLIP-Diffusion")
    stable_diffusion = load_stable_diffusion(source)
    parts.text_encoder = TextEncoder(stable_diffusion.text_model, stable_diffusion.tokenizer)
    parts.denoiser = Denoiser(stable_diffusion.vae, stable_diffusion.unet, stable_diffusion.scheduler)
    if index.get("mean"):
        parts.image_mean = tuple(float(value) for value in index["mean"])
    if index.get("std"):
        parts.image_std = tuple(float(value) for value in index["std"])
    parts.metadata["subject_position"] = int(index.get("ctx_begin_pos", 2))
    return parts


def load_subject_side(source: str | Path, *, bert_tokenizer: str | Path | None = None) -> ModelParts:
    """The image tower, the Q-Former, its projection (where there is one) and its tokenizer, from ``qformer/``.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    config_file = find_file(source, ["config.json"], subfolder="qformer")
    vision, config = read_qformer_config(config_file)
    qformer = fresh_qformer(config)
    tower = ImageEncoder.from_config(skip_last_layers=0, **vision)
    projection = SubjectProjection(config.hidden_size)
    modules = {"tower": tower, "qformer": qformer, "projection": projection}

    file = find_file(source, weight_names("model"), subfolder="qformer")
    ours = to_ours(
        read_tensors(file),
        diffusers_qformer(config, tower.num_layers),
        part_shapes(modules),
        file=file,
        gaps=Gaps(ignored=frozenset({POSITION_IDS}), absent_parts=("proj_layer.",)),
    )
    fill_parts(modules, ours)

    processor_file = find_file(source, ["preprocessor_config.json"], subfolder="image_processor", required=False)
    processor = {} if processor_file is None else read_json(processor_file)
    size = processor.get("size", vision["image_size"])
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    if size != vision["image_size"]:
        raise ValueError(
            f"{processor_file}: images of {size} px, the tower in {config_file} reads {vision['image_size']} px"
        )
    own = find_file(source, ["vocab.txt", "tokenizer.json"], subfolder="qformer_tokenizer", required=False)
    if bert_tokenizer is None and own is not None:
        tokenizer = load_bert_tokenizer(source, subfolder="qformer_tokenizer")
    else:
        tokenizer = load_bert_tokenizer(bert_tokenizer or DEFAULT_BERT)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the Q-Former's tokenizer has {len(tokenizer)} words, {config_file} says vocab_size={config.vocab_size}; "
            "give the tokenizer it was trained with"
        )
    return ModelParts(
        image_encoder=tower,
        qformer=qformer,
        qformer_tokenizer=tokenizer,
        projection=projection if "projection.dense1.weight" in ours else None,
        image_size=tower.image_size,
        image_mean=tuple(processor.get("image_mean") or CLIP_IMAGE_MEAN),
        image_std=tuple(processor.get("image_std") or CLIP_IMAGE_STD),
    )


def fresh_qformer(config: QFormerConfig) -> QFormer:
    """A Q-Former whose initialisation depends on nothing but its sizes and leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QFormer(config)


def read_model_index(file: Path) -> dict[str, Any]:
    """``model_index.json`` of a BLIP-Diffusion folder, every class in it compared with the ones it may name.

    Raises:
        ValueError: another pipeline, an unknown part or class.
    """
    index = read_json(file, allowed_class_names=PIPELINES)
    for name, entry in index.items():
        if not isinstance(entry, list) or name in ("mean", "std"):
            continue
        if name not in COMPONENTS or len(entry) != 2 or entry[1] not in COMPONENTS[name]:
            raise ValueError(
                f"{file}: {name} is {entry}; a BLIP-Diffusion folder has {', '.join(COMPONENTS)}"
                + (f", and there {' or '.join(COMPONENTS[name])}" if name in COMPONENTS else "")
            )
    return index


def read_qformer_config(file: Path) -> tuple[dict[str, Any], QFormerConfig]:
    """Sizes of tower and Q-Former from ``qformer/config.json``; keys left out have the writing transformers' defaults.

    Raises:
        ValueError: another class, or sizes that do not belong together.
    """
    config = read_json(file, allowed_class_names=("Blip2QFormerModel",))
    written_by = [int(part) for part in str(config.get("transformers_version", "")).split(".")[:2] if part.isdigit()]
    changed = {"layer_norm_eps": VISION_EPS_SINCE_4_34} if written_by >= [4, 34] else {}
    vision = VISION_DEFAULTS | changed | _given(config.get("vision_config"), VISION_KEYS)
    theirs = QFORMER_DEFAULTS | _given(config.get("qformer_config"), tuple(QFORMER_NAMES))
    sizes = {ours: theirs[name] for name, ours in QFORMER_NAMES.items()}
    activation = (config.get("qformer_config") or {}).get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"{file}: qformer_config.hidden_act is {activation!r}; a Q-Former's is 'gelu'")
    try:
        qformer = QFormerConfig(
            num_query_tokens=config.get("num_query_tokens", 32), image_norm_eps=vision["layer_norm_eps"], **sizes
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    if qformer.image_width != vision["hidden_size"]:
        raise ValueError(
            f"{file}: qformer_config.encoder_hidden_size is {qformer.image_width}, "
            f"vision_config.hidden_size is {vision['hidden_size']}; they must be equal"
        )
    return vision, qformer


def _given(config: Mapping[str, Any] | None, keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in (config or {}).items() if key in keys and value is not None}


def save(folder: str | Path, parts: ModelParts, *, dtype: torch.dtype | None = None) -> None:
    """Write a whole BLIP-Diffusion into ``folder`` (which should be new: see ``model_folder.replace_folder``).

    Args:
        dtype: floating-point tensors are stored in this; None keeps each module's own.

    Raises:
        ValueError: a part is missing, or the projection is not of the layout's sizes.
    """
    parts.require("projection", "text_encoder", "denoiser", purpose="a BLIP-Diffusion folder")
    folder = Path(folder)
    save_subject_side(folder, parts, dtype=dtype)
    save_clip_text(folder / "text_encoder", parts.text_encoder.model, dtype=dtype)
    save_clip_tokenizer(parts.text_encoder.tokenizer, folder / "tokenizer")
    save_diffusers_module(folder / "unet", parts.denoiser.unet, dtype=dtype)
    save_diffusers_module(folder / "vae", parts.denoiser.vae, dtype=dtype)
    save_scheduler(folder / "scheduler", parts.denoiser)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": PIPELINES[0],
            "_diffusers_version": _diffusers_version(),
            "ctx_begin_pos": int(parts.metadata.get("subject_position", 2)),
            "mean": None,  # image_processor/ says it
            "std": None,
            "qformer": ["blip_diffusion", "Blip2QFormerModel"],
            "image_processor": ["blip_diffusion", "BlipImageProcessor"],
            "text_encoder": ["blip_diffusion", "ContextCLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "PNDMScheduler"],
        },
    )


def save_subject_side(folder: str | Path, parts: ModelParts, *, dtype: torch.dtype | None = None) -> None:
    """Write ``qformer/``, ``qformer_tokenizer/`` and ``image_processor/``; without a projection for stage 1.

    Raises:
        ValueError: the projection is not of the layout's sizes.
    """
    folder = Path(folder)
    tower, qformer, projection = parts.image_encoder, parts.qformer, parts.projection
    width = qformer.config.hidden_size
    if projection is not None and (projection.width, projection.dense1.out_features) != (width, 4 * width):
        raise ValueError(
            f"the projection is {projection.width} wide and {projection.dense1.out_features} inside; "
            f"the layout's is {width} and {4 * width}"
        )
    if tower.config.layer_norm_eps != qformer.config.image_norm_eps:
        raise ValueError(
            f"the image tower's norms have eps {tower.config.layer_norm_eps:g}, the Q-Former's image norm "
            f"{qformer.config.image_norm_eps:g}; the layout has one number for both"
        )
    modules = {"tower": tower, "qformer": qformer, "projection": projection}
    rows = diffusers_qformer(qformer.config, tower.num_layers)
    tensors = part_tensors(modules)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("qformer.lm_head.")}
    if projection is None:
        rows = [r for r in rows if not r.theirs.startswith("proj_layer.")]
    theirs = to_theirs(tensors, rows)
    theirs[POSITION_IDS] = torch.arange(qformer.config.max_position_embeddings)[None]
    write_tensors(folder / "qformer" / "model.safetensors", theirs, dtype=dtype)
    write_json(folder / "qformer" / "config.json", _qformer_config_json(tower, qformer.config))
    save_bert_tokenizer(parts.qformer_tokenizer, folder / "qformer_tokenizer")
    write_json(
        folder / "image_processor" / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": list(parts.image_mean),
            "image_std": list(parts.image_std),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": parts.image_size, "width": parts.image_size},
        },
    )


def _qformer_config_json(tower: ImageEncoder, config: QFormerConfig) -> dict[str, Any]:
    vision = {key: getattr(tower.config, key) for key in VISION_DEFAULTS}
    ours = asdict(config)
    return {
        "architectures": ["Blip2QFormerModel"],
        "model_type": "blip-2",
        "num_query_tokens": config.num_query_tokens,
        "qformer_config": {name: ours[our_name] for name, our_name in QFORMER_NAMES.items()}
        | {"model_type": "blip_2_qformer", "hidden_act": "gelu", "attention_probs_dropout_prob": config.dropout},
        "text_config": {"model_type": "opt"},
        "vision_config": vision
        | {
            "model_type": "blip_2_vision_model",
            "num_hidden_layers": tower.num_layers,
            "attention_dropout": 0.0,
            "qkv_bias": True,
        },
    }


def save_clip_text(folder: str | Path, model: CLIPTextModel, *, dtype: torch.dtype | None = None) -> None:
    """Write CLIP's text tower: ``config.json`` and safetensors."""
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", clip_text_tensors(model), dtype=dtype)
    write_json(folder / "config.json", clip_text_config_json(model))


def clip_text_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """State of CLIP's text tower, with the key prefix that every version reads and the constant that old ones store."""
    tensors = {f"text_model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors[f"text_model.{POSITION_IDS}"] = torch.arange(model.config.max_position_embeddings)[None]
    return tensors


def clip_text_config_json(model: CLIPTextModel) -> dict[str, Any]:
    """What ``text_encoder/config.json`` says."""
    return {key: getattr(model.config, key) for key in TEXT_KEYS} | {
        "architectures": ["ContextCLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
    }


def save_diffusers_module(folder: str | Path, module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
    """Write a UNet or VAE: ``config.json`` and safetensors."""
    folder = Path(folder)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", module.state_dict(), dtype=dtype)
    write_json(folder / "config.json", diffusers_config_json(module))


def diffusers_config_json(module: nn.Module) -> dict[str, Any]:
    """What ``config.json`` of a UNet or VAE says; no paths of this machine."""
    config = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return config | {"_class_name": type(module).__name__, "_diffusers_version": _diffusers_version()}


def save_scheduler(folder: str | Path, denoiser: Denoiser) -> None:
    """Write the sampler that BLIP-Diffusion generates with."""
    config = {key: denoiser.make_scheduler("pndm").config[key] for key in PNDM_KEYS}
    write_json(
        Path(folder) / "scheduler_config.json",
        config | {"_class_name": "PNDMScheduler", "_diffusers_version": _diffusers_version()},
    )


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, making its folder; each tensor gets memory of its own."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        stored[name] = tensor.contiguous().clone()
    save_file(stored, file, metadata={"format": "pt"})


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__
