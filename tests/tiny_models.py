"""Complete models of a few thousand parameters: the real classes with random weights and odd sizes.

The VAE has a level more than the UNet and the text encoder 24 positions, so that nothing passes by coincidence with
Stable Diffusion's 8 and 77.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer, load_clip_tokenizer
from blipdiff_train.data.samples import Stage2Batch
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.models.presets import build_noise_scheduler, build_text_model, build_unet, build_vae
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

GENERATE = Path(__file__).parent / "goldens" / "generate"

WIDTH = 32
NUM_QUERIES = 4
TEXT_LENGTH = 24
IMAGE_SIZE = 28
TARGET_SIZE = 32


def tiny_text_encoder() -> TextEncoder:
    tokenizer = load_clip_tokenizer(GENERATE / "pipeline" / "tokenizer")
    model = build_text_model(
        {
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_dim": WIDTH,
            "hidden_act": "quick_gelu",
        }
    )
    return TextEncoder(model, tokenizer)


def tiny_denoiser(**schedule: Any) -> Denoiser:
    vae = build_vae(
        {
            "sample_size": TARGET_SIZE,
            "latent_channels": 4,
            "block_out_channels": (4, 8, 8),
            "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": 4,
            "scaling_factor": 0.3,
        }
    )
    unet = build_unet(
        {
            "sample_size": TARGET_SIZE // 4,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
        }
    )
    return Denoiser(vae, unet, build_noise_scheduler(schedule))


def tiny_parts(seed: int = 0, *, dropout: float = 0.0, **schedule: Any) -> ModelParts:
    """Every part, with weights large enough that each input matters visibly."""
    torch.manual_seed(seed)
    tokenizer = load_bert_tokenizer(GENERATE / "bert_tokenizer")
    config = QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_query_tokens=NUM_QUERIES,
        image_width=24,
        dropout=dropout,
    )
    parts = ModelParts(
        image_encoder=ImageEncoder.from_config(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=14,
        ),
        qformer=QFormer(config),
        qformer_tokenizer=tokenizer,
        projection=SubjectProjection(WIDTH, dropout=dropout),
        text_encoder=tiny_text_encoder(),
        denoiser=tiny_denoiser(**schedule),
        image_size=IMAGE_SIZE,
    )
    with torch.no_grad():
        for module in (parts.image_encoder, parts.qformer, parts.projection, parts.text_encoder, parts.denoiser.unet):
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 0.15)
    return parts


def tiny_batch(size: int = 3, *, first_position: int = 0, seed: int = 0, **changes: Any) -> Stage2Batch:
    """Samples that are functions of their position, as the loader's are; nothing dropped."""
    generators = [torch.Generator().manual_seed(1000 * seed + first_position + row) for row in range(size)]
    subjects, prompts = ["dog", "cat", "teapot"], ["swimming underwater", "on a marble table", "in the snow"]
    values = {
        "subject_image": torch.stack([torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=g) for g in generators]),
        "target_image": torch.stack([torch.rand(3, TARGET_SIZE, TARGET_SIZE, generator=g) * 2 - 1 for g in generators]),
        "latent_moments": None,
        "subject_text": [subjects[(first_position + row) % 3] for row in range(size)],
        "prompt": [prompts[(first_position + row) % 3] for row in range(size)],
        "subject_dropped": torch.zeros(size, dtype=torch.bool),
        "caption": [f"caption {first_position + row}" for row in range(size)],
        "keys": [f"{first_position + row:06d}" for row in range(size)],
        "positions": torch.arange(first_position, first_position + size),
    }
    return Stage2Batch(**{**values, **changes})
