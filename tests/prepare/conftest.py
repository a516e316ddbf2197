"""A folder of drawn photographs with every trap a real one has."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import draw
from PIL import Image


@pytest.fixture
def photographs(tmp_path):
    """``photos/red_ball/…`` and ``photos/cup/…``: 12 good photographs of odd sizes and kinds, and 6 that must go."""
    root = tmp_path / "photos"
    for number in range(10):
        folder = root / ("red_ball" if number < 6 else "cup")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(number, (80 + number, 97 - number))).save(folder / f"{number:02d}.png")
    (root / "cup/06.txt").write_text("my cup\non the table")
    Image.fromarray(draw(20)).convert("L").save(root / "cup/grey.jpg", quality=95)
    rotated = Image.fromarray(draw(21, (64, 128)))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    rotated.save(root / "cup/turned.jpg", exif=exif, quality=95)

    (root / "cup/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photograph")
    data = (root / "cup/grey.jpg").read_bytes()
    (root / "cup/cut.jpg").write_bytes(data[: len(data) // 2])
    Image.fromarray(draw(0, (20, 30))).save(root / "cup/tiny.png")
    Image.fromarray(np.full((90, 90, 3), 128, np.uint8)).save(root / "cup/flat.png")
    Image.fromarray(draw(1, (81, 96))).save(root / "red_ball/same.jpg", quality=80)  # as 01.png
    Image.fromarray(draw(30)).save(root / "nowhere.png")  # no sub-folder, so no category
    return root
