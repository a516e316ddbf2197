"""From images as they are stored, H W 3 bytes, to what networks take: planes of float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Golden note 32; a model folder's ``image_processor`` overrides them."""


@dataclass(frozen=True)
class Normalisation:
    """(x / 255 − mean) / std of each channel."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """B images of one size, H W 3 uint8 → (B, 3, H, W) float32.

        Each number is written once, to its place in the batch: floats are four times the bytes, and stacking what was
        converted before would move them twice more.

        Raises:
            ValueError: no images, or of several sizes.
        """
        if len({image.shape for image in images}) != 1:
            raise ValueError(f"images of {sorted({image.shape for image in images})}: expected one size")
        planes = np.empty((len(images), 3, *images[0].shape[:2]), np.float32)
        for image, planes_of_image in zip(images, planes, strict=True):
            for channel, plane, mean, std in zip(cv2.split(image), planes_of_image, self.mean, self.std, strict=True):
                # split first: a third of the time of converting and transposing in one go
                cv2.addWeighted(channel, 1 / (255 * std), channel, 0.0, -mean / std, dst=plane, dtype=cv2.CV_32F)
        return torch.from_numpy(planes)


TARGET = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Stage 2's target in [-1, 1], as Stable Diffusion's VAE was trained."""
