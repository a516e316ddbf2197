"""The frozen image tower: CLIP's vision transformer without its last layers and without its final norm.

Source: salesforce/LAVIS ``lavis/models/clip_vit.py`` (23 of ViT-L/14's 24 layers, all 257 tokens) and BLIP-2 §3, which
takes the second-to-last layer's output. The norm that follows is the Q-Former's trainable ``ln_vision``.

Deliberate difference from LAVIS: the tower computes in the precision of its weights, fp32 unless asked; LAVIS converts
it to fp16 by default.

Parameter names are those of transformers' ``CLIPVisionModel`` (flat, without ``vision_model.``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from blipdiff_train.common.shapes import check_shape


class ImageEncoder(nn.Module):
    """CLIP images in, patch tokens out; always in eval, never with gradient, in its own precision.

    Args:
        tower: a CLIP vision tower; its final norm and its last ``skip_last_layers`` layers are left out.
        skip_last_layers: 1 for BLIP-2 and BLIP-Diffusion; 0 if the tower was cut already.

    Attributes:
        width: D_image. image_size: S in pixels. num_patches: P, the class token included. num_layers: layers kept.
    """

    def __init__(self, tower: CLIPVisionModel, skip_last_layers: int = 1) -> None:
        super().__init__()
        num_layers = len(tower.encoder.layers)
        if not 0 <= skip_last_layers < num_layers:
            raise ValueError(
                f"skip_last_layers={skip_last_layers}, must leave one of the tower's {num_layers} layers at least"
            )
        self.config: CLIPVisionConfig = tower.config
        self.embeddings = tower.embeddings
        self.pre_layrnorm = tower.pre_layrnorm  # transformers' spelling, kept as a parameter name
        self.encoder = tower.encoder
        self.encoder.layers = self.encoder.layers[: num_layers - skip_last_layers]
        self.width: int = tower.config.hidden_size
        self.image_size: int = tower.config.image_size
        self.num_patches: int = self.embeddings.num_positions
        self.num_layers: int = num_layers - skip_last_layers
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_config(cls, *, skip_last_layers: int = 1, **sizes: Any) -> ImageEncoder:
        """A randomly initialised tower; ``sizes`` are ``CLIPVisionConfig``'s arguments, by CLIP's own names."""
        return cls(CLIPVisionModel(CLIPVisionConfig(**sizes)), skip_last_layers)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stays in eval: the tower is frozen in both stages."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``images`` (B, 3, S, S), CLIP-normalised → image_embeds (B, P, D_image) in the tower's own dtype."""
        check_shape(images, "B 3 S S", name="images", S=self.image_size)
        dtype = self.pre_layrnorm.weight.dtype
        with torch.autocast(images.device.type, enabled=False):
            states = self.pre_layrnorm(self.embeddings(images.to(dtype)))
            return self.encoder(inputs_embeds=states).last_hidden_state
