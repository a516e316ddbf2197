"""toybox as ordinary shards and folders: what a user's own photographs would look like on disk.

The same numbers give the same bytes, and a finished folder is recognised by its stamp and left alone. Drawings are
PNG: at 64 px JPEG's 8 px blocks would be as large as the patterns.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blipdiff_train.common.files import write_json
from blipdiff_train.data.shards import write_shards
from blipdiff_train.data.toybox.draw import ToySample, background, sample

STAMP = "toybox.json"
_DRAWING_VERSION = 1  # raised when the same number gives another picture, so that folders are drawn again


def png_bytes(pixels: np.ndarray) -> bytes:
    """PNG of (H, W) or (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _metadata(drawn: ToySample, number: int, split: str, seed: int, caption: str) -> dict[str, Any]:
    return {
        "caption": caption,
        "subject": drawn.subject,
        "prompt": drawn.prompt,
        "source": {
            "name": "toybox",
            "number": number,
            "split": split,
            "seed": seed,
            "scene": drawn.scene,
            "identity": asdict(drawn.identity),
        },
    }


def stage1_samples(
    count: int, *, first: int = 0, split: str = "train", size: int = 64, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Pictures with captions that say everything, as `write_shards` takes them."""
    for number in range(first, first + count):
        drawn = sample(number, split=split, size=size, seed=seed)
        metadata = _metadata(drawn, number, split, seed, drawn.caption)
        yield {"__key__": drawn.key, "png": png_bytes(drawn.image), "json": metadata}


def stage2_samples(
    count: int, *, first: int = 0, split: str = "train", size: int = 64, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Pictures annotated with the exact matte and foreground; the caption names neither colour nor pattern.

    Training annotates `photographs` as a user's would be; these are the truth to measure that annotation with.
    """
    for number in range(first, first + count):
        drawn = sample(number, split=split, size=size, seed=seed)
        yield {
            "__key__": drawn.key,
            "png": png_bytes(drawn.image),
            "json": _metadata(drawn, number, split, seed, drawn.prompt),
            "alpha.png": png_bytes(drawn.alpha),
            "fg.png": png_bytes(drawn.foreground),
        }


def photographs(
    count: int, *, first: int = 0, split: str = "train", size: int = 64, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Stage 2's source photographs: category and a caption without the subject's looks, no matte yet."""
    for record in stage2_samples(count, first=first, split=split, size=size, seed=seed):
        yield {name: record[name] for name in ("__key__", "png", "json")}


def background_samples(count: int, *, first: int = 0, size: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Scenes without a subject."""
    for number in range(first, first + count):
        source = {"source": {"name": "toybox", "number": number, "seed": seed}}
        pixels = background(number, size=size, seed=seed)
        yield {"__key__": f"background-{number:09d}", "png": png_bytes(pixels), "json": source}


_KINDS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "stage1": stage1_samples,
    "stage2": stage2_samples,
    "photographs": photographs,
    "backgrounds": background_samples,
}


def write_toybox(
    folder: str | Path,
    kind: str,
    count: int,
    *,
    first: int = 0,
    split: str = "train",
    size: int = 64,
    seed: int = 0,
    samples_per_shard: int = 1000,
) -> list[Path]:
    """Shards of `count` samples in `folder`; returns their paths. Nothing is drawn when the same are there already.

    Args:
        kind: `stage1`, `stage2` (exact mattes), `photographs` (stage 2 before annotation) or `backgrounds`.
        first: number of the first sample.
        split: whose identities; backgrounds have none.

    Raises:
        ValueError: an unknown kind or split, no samples asked for, or a folder that holds other files.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(_KINDS)}")
    if count < 1:
        raise ValueError(f"count={count}: a toybox folder needs at least one sample")
    asked: dict[str, Any] = {"first": first, "size": size, "seed": seed}
    if kind != "backgrounds":
        asked["split"] = split
    stamp = {"kind": kind, "count": count, **asked, "samples_per_shard": samples_per_shard}
    stamp["version"] = _DRAWING_VERSION

    def write(temporary: Path) -> None:
        write_shards(_KINDS[kind](count, **asked), temporary, prefix=kind, samples_per_shard=samples_per_shard)

    _write_once(Path(folder), stamp, write)
    return sorted(Path(folder).glob("*.tar"))


def write_photograph_folder(
    folder: str | Path, count: int, *, first: int = 0, split: str = "train", size: int = 64, seed: int = 0
) -> Path:
    """Plain files as a user has them: `CATEGORY/KEY.png`, with the caption in `CATEGORY/KEY.txt`.

    Raises:
        ValueError: an unknown split, no samples asked for, or a folder that holds other files.
    """
    if count < 1:
        raise ValueError(f"count={count}: a toybox folder needs at least one sample")
    stamp = {"kind": "photograph folder", "count": count, "first": first, "split": split, "size": size}
    stamp |= {"seed": seed, "version": _DRAWING_VERSION}

    def write(temporary: Path) -> None:
        for record in photographs(count, first=first, split=split, size=size, seed=seed):
            category = temporary / record["json"]["subject"]
            category.mkdir(exist_ok=True)
            (category / f"{record['__key__']}.png").write_bytes(record["png"])
            (category / f"{record['__key__']}.txt").write_text(record["json"]["caption"] + "\n", encoding="utf-8")

    _write_once(Path(folder), stamp, write)
    return Path(folder)


def _write_once(folder: Path, stamp: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Fill a folder beside `folder` and rename it into place; a folder with the same stamp stays as it is."""
    if folder.exists() and any(folder.iterdir()):
        stamp_file = folder / STAMP
        if not stamp_file.exists():
            raise ValueError(f"{folder} holds files that toybox did not write; choose another folder")
        if json.loads(stamp_file.read_text(encoding="utf-8")) == stamp:
            return
        shutil.rmtree(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        write_json(temporary / STAMP, stamp)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
