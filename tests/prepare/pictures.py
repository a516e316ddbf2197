"""Drawn photographs that GrabCut can cut out."""

from __future__ import annotations

import cv2
import numpy as np


def draw(seed: int, size: tuple[int, int] = (96, 80)) -> np.ndarray:
    """A textured disc on a textured ground, (rows columns) ``size``: easy for GrabCut, no two alike."""
    generator = np.random.default_rng(seed)
    rows, columns = size
    ground, colour = generator.integers(60, 200, 3), generator.integers(0, 256, 3)
    colour[seed % 3] = 255 if ground[seed % 3] < 130 else 0
    image = np.broadcast_to(ground, (rows, columns, 3)).astype(np.float32)
    wave = np.sin(np.mgrid[:rows, :columns][seed % 2] / generator.uniform(4, 30)) * 15
    image = image + wave[..., None]
    centre = int(columns * generator.uniform(0.4, 0.6)), int(rows * generator.uniform(0.4, 0.6))
    axes = int(columns * generator.uniform(0.15, 0.3)), int(rows * generator.uniform(0.15, 0.3))
    mask = cv2.ellipse(np.zeros((rows, columns), np.uint8), centre, axes, generator.uniform(0, 180), 0, 360, 1, -1)
    image = np.where(mask[..., None] > 0, colour.astype(np.float32), image)
    return np.clip(image + generator.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
