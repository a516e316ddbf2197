"""Drawn photographs, mattes and records for the tests of this folder."""

from __future__ import annotations

import cv2
import numpy as np

from blipdiff_train.data.samples import stage2_record

ROWS, COLUMNS = 48, 64


def picture(number: int, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """H W 3 uint8, different for every number."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (columns, rows), interpolation=cv2.INTER_CUBIC)


def disc(rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """H W uint8: a matte with a soft edge."""
    return cv2.GaussianBlur(cv2.circle(np.zeros((rows, columns), np.uint8), (30, 22), 14, 255, -1), (5, 5), 0)


def annotated(number: int) -> dict[str, object]:
    return stage2_record(
        f"photo{number:04d}",
        picture(number),
        disc(),
        subject="dog",
        caption=f"dog number {number} on the grass",
        prompt="a dog on the grass",
    )
