"""Sizes of the public models, as plain data, and the parts built from such data with random weights.

The sizes are those of the configuration files of CLIP ViT-L/14, BERT-base and Stable Diffusion 1.5, with what
BLIP-Diffusion changes in them (16 queries, cross-attention in every layer, the tower without its last layer). Each
builder runs under ``torch.device("meta")`` too, which gives shapes and parameter counts without memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

CLIP_VIT_L_14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,  # of the published tower; the image encoder leaves out the last
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

QFORMER_BASE: dict[str, Any] = {
    "vocab_size": 30523,  # bert-base-uncased and [DEC]
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_query_tokens": 16,
    "cross_attention_freq": 1,
    "image_width": 1024,
}

SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

SD15_VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "scaling_factor": 0.18215,
}

SD15_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def build_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A denoising UNet of diffusers with random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(config))


def build_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """An image autoencoder of diffusers with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(dict(config))


def build_text_model(config: Mapping[str, Any]) -> CLIPTextModel:
    """CLIP's text tower of transformers, without the projection, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def build_noise_scheduler(config: Mapping[str, Any]) -> DDPMScheduler:
    """The noise schedule of training: only the betas and what is predicted matter, not a sampler's settings."""
    from diffusers import DDPMScheduler

    unknown = set(config) - set(SD15_NOISE)
    if unknown:
        raise ValueError(f"a noise schedule has no {', '.join(sorted(unknown))}; expected {', '.join(SD15_NOISE)}")
    return DDPMScheduler(**(SD15_NOISE | dict(config)), clip_sample=False)
