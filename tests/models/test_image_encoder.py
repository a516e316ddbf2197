"""The frozen tower: which layers it has, and that it stays frozen, in eval and in its own precision."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from blipdiff_train.models.image_encoder import ImageEncoder

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def test_output_is_the_second_to_last_layers_and_unnormed() -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = tower(images, output_hidden_states=True).hidden_states[-2]
    encoder = ImageEncoder(tower)
    assert torch.allclose(encoder(images), expected, atol=1e-6)
    assert (encoder.width, encoder.image_size, encoder.num_patches, encoder.num_layers) == (16, 16, 5, 2)
    assert not any("post_layernorm" in name or "layers.2" in name for name in encoder.state_dict())


def test_frozen_in_every_mode_and_precision() -> None:
    encoder = ImageEncoder.from_config(**SIZES).train()
    assert not any(module.training for module in encoder.modules())
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not encoder(images).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(images).dtype == torch.float32
    assert encoder.to(torch.bfloat16)(images).dtype == torch.bfloat16


def test_errors() -> None:
    with pytest.raises(ValueError, match="skip_last_layers=3"):
        ImageEncoder.from_config(skip_last_layers=3, **SIZES)
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 8, 8\)"):
        ImageEncoder.from_config(**SIZES)(torch.zeros(1, 3, 8, 8))
