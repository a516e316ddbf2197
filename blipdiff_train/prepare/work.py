"""One unit of work: a run of photographs becomes one shard and one account of it, as a pure function of both."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from blipdiff_train.common.files import sha256_file, write_json
from blipdiff_train.common.images import ImageError, decode_image, load_image
from blipdiff_train.context.generator import AnnotatedSample, ContextGenerator
from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import AlphaSegmenter, CLIPSegSegmenter, GrabCutSegmenter, Segmenter
from blipdiff_train.context.trimap import unknown_share
from blipdiff_train.data.shards import write_shards
from blipdiff_train.data.tar_index import INDEX_SUFFIX
from blipdiff_train.prepare.filters import check_matte, check_photograph, measure_matte, perceptual_hash
from blipdiff_train.prepare.records import Record
from blipdiff_train.prepare.settings import Settings

ACCOUNTS = ".job"
"""Folder in the output with one small file for each finished unit; what makes a job resumable."""


@dataclass(frozen=True)
class Unit:
    """``records`` with their ``numbers`` in the whole input; ``duplicates`` maps a number to the name it repeats."""

    index: int
    numbers: tuple[int, ...]
    records: tuple[Record, ...]
    duplicates: dict[int, str]


@dataclass
class Photograph:
    number: int
    record: Record
    image: np.ndarray  # H W 3 uint8
    mask: np.ndarray | None  # H W uint8
    image_id: int


def limit_threads() -> None:
    """One thread a process: workers do not fight over cores, and sums are made in one order on every machine load."""
    os.environ["NUMBA_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)


class Worker:
    """Everything a process needs for its units, built once."""

    def __init__(self, settings: Settings, segmenter: Segmenter | None = None) -> None:
        """Args: segmenter: instead of the one that the settings name, e.g. one that asks another process."""
        limit_threads()
        self.settings = settings
        self.generator = make_generator(settings, segmenter) if settings.kind == "subjects" else None
        self.provenance = self.generator.describe() if self.generator else {}

    def run(self, unit: Unit) -> dict[str, Any]:
        """Write the unit's shard and its account, and return the account."""
        output = Path(self.settings.output)
        scratch = output / ACCOUNTS / f"unit-{unit.index:06d}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        seconds: Counter[str] = Counter()
        rejected: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        written = write_shards(
            self.samples(unit, rejected, kept, seconds), scratch, samples_per_shard=max(1, len(unit.records))
        )
        account: dict[str, Any] = {
            "unit": unit.index,
            "photographs": len(unit.records),
            "samples": kept,
            "rejected": sorted(rejected, key=lambda entry: entry["number"]),
            "shard": None,
            "seconds": {step: round(value, 4) for step, value in seconds.items()},
        }
        if written:
            target = shard_path(output, unit.index)
            account["shard"] = {"name": target.name, "sha256": sha256_file(written[0])}
            os.replace(written[0], target)
            os.replace(f"{written[0]}{INDEX_SUFFIX}", f"{target}{INDEX_SUFFIX}")
        shutil.rmtree(scratch, ignore_errors=True)
        # last, and atomic: a unit without its account is done again, and gives the same bytes
        write_json(account_path(output, unit.index), account)
        return account

    def samples(
        self, unit: Unit, rejected: list[dict[str, Any]], kept: list[dict[str, Any]], seconds: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        """The unit's samples in order; a batch of photographs is in memory at a time. The other three are added to."""
        size = self.settings.segmenter.batch_size
        for start in range(0, len(unit.records), size):
            batch: list[Photograph] = []
            for number, record in zip(
                unit.numbers[start : start + size], unit.records[start : start + size], strict=True
            ):
                before = time.perf_counter()
                photograph = self._read(number, record, unit.duplicates.get(number))
                seconds["read"] += time.perf_counter() - before
                if isinstance(photograph, Rejection):
                    rejected.append(_rejection(number, record, photograph))
                else:
                    batch.append(photograph)
            for photograph, result in zip(batch, self._annotate(batch), strict=True):
                if isinstance(result, AnnotatedSample):
                    seconds.update(result.seconds)
                    measures = measure_matte(result.alpha_matte)
                    refused = check_matte(measures, self.settings.filters)
                    result = refused if refused is not None else (result, measures)
                if isinstance(result, Rejection):
                    rejected.append(_rejection(photograph.number, photograph.record, result))
                    continue
                before = time.perf_counter()
                sample = self._encode(photograph, *result)
                seconds["write"] += time.perf_counter() - before
                kept.append({"key": sample["__key__"], "source": photograph.record.name, **_measures(sample["json"])})
                yield sample

    def _read(self, number: int, record: Record, duplicate_of: str | None) -> Photograph | Rejection:
        if duplicate_of is not None:
            return Rejection("duplicate", f"looks like {duplicate_of}; lower filters.duplicate_distance to keep both")
        if self.settings.kind == "subjects" and not record.subject_text:
            return Rejection("no_category", "no sub-folder, column or file names its category; set categories=…")
        try:
            data = record.read()
            image, mask = read_photograph(data, record, self.settings)
        except ImageError as error:
            return Rejection("unreadable", str(error))
        except OSError as error:
            return Rejection("unreadable", f"{record.name}: {error.strerror or error}")
        shortest = min(image.shape[:2])
        if shortest < self.settings.image.shortest_side_px:
            limit = f"expected ≥ {self.settings.image.shortest_side_px} (image.shortest_side_px)"
            return Rejection("too_few_pixels", f"{image.shape[1]}×{image.shape[0]} pixels, {limit}")
        blurred = check_photograph(image, self.settings.filters)
        if blurred is not None:
            return blurred
        # equal photographs have equal ids in every set of shards they get into; 53 bits are exact in any JSON reader
        image_id = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11
        return Photograph(number, record, image, mask, image_id)

    def _annotate(self, batch: Sequence[Photograph]) -> Sequence[AnnotatedSample | Rejection | tuple[None, dict]]:
        if self.generator is None:
            return [(None, {})] * len(batch)
        if isinstance(self.generator.segmenter, AlphaSegmenter):
            self.generator.segmenter.set_masks([photograph.mask for photograph in batch])
        return self.generator.annotate(
            [photograph.image for photograph in batch],
            [photograph.record.subject_text for photograph in batch],
            [photograph.record.name for photograph in batch],
        )

    def _encode(
        self, photograph: Photograph, result: AnnotatedSample | None, measures: dict[str, Any]
    ) -> dict[str, Any]:
        image, record = self.settings.image, photograph.record
        rows, columns = photograph.image.shape[:2]
        facts: dict[str, Any] = {
            "image_id": photograph.image_id,
            "source": record.name,
            "width": columns,
            "height": rows,
            "provenance": self.provenance,
        }
        sample: dict[str, Any] = {
            "__key__": f"{photograph.number:09d}",
            image.format: encode(photograph.image, image.format, image.jpeg_quality),
        }
        if result is not None:
            facts |= {
                "caption": record.caption or f"a photo of a {record.subject_text}",
                "caption_source": "given" if record.caption else "template",
                "subject": record.subject_text,
                "unknown_share": round(unknown_share(result.trimap), 6),
                **measures,
            }
            sample["alpha.png"] = encode(result.alpha_matte, "png", 0)
            if result.foreground is not None:
                sample["fg.jpg"] = encode(result.foreground, "jpg", image.jpeg_quality)
        return sample | {"json": facts}


def make_generator(settings: Settings, segmenter: Segmenter | None = None) -> ContextGenerator:
    """The generator that the settings describe, around ``segmenter`` if one is given."""
    segmenter = segmenter or make_segmenter(settings)
    return ContextGenerator(
        segmenter,
        foreground_threshold=settings.trimap.foreground_threshold,
        background_threshold=settings.trimap.background_threshold,
        margin=settings.trimap.margin,
        engine=settings.matting.engine,
        foreground_colours=settings.matting.foreground_colours,
        max_unknown_share=settings.filters.unknown_share,
    )


def make_segmenter(settings: Settings) -> Segmenter:
    """The segmenter that the settings name, on their device."""
    if settings.segmenter.name != "clipseg":
        return {"grabcut": GrabCutSegmenter, "alpha": AlphaSegmenter}[settings.segmenter.name]()
    import torch

    torch.set_num_threads(1)
    return CLIPSegSegmenter(settings.segmenter.model, device=settings.device, batch_size=settings.segmenter.batch_size)


def read_photograph(data: bytes, record: Record, settings: Settings) -> tuple[np.ndarray, np.ndarray | None]:
    """The upright photograph (H W 3 uint8, longest side limited) and, if the segmenter wants it, its mask (H W uint8).

    Raises:
        ImageError: not decodable, or too large.
    """
    max_pixels = settings.image.max_pixels
    wants_mask = settings.segmenter.name == "alpha" and settings.kind == "subjects"
    picture = decode_image(data, name=record.name, mode="RGBA" if wants_mask else "RGB", max_pixels=max_pixels)
    mask = None
    if wants_mask:
        mask, picture = picture.getchannel("A"), picture.convert("RGB")
        if record.mask is not None:
            mask = load_image(record.mask, mode="L", max_pixels=max_pixels)
            if mask.size != picture.size:
                raise ImageError(f"{record.name}: its mask is {mask.size}, the photograph {picture.size}")
        elif mask.getextrema() == (255, 255):
            mask = None
    factor = settings.image.longest_side_px / max(picture.size)
    if factor < 1:
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        mask = mask.resize(size, Image.Resampling.BOX) if mask is not None else None
    return np.asarray(picture), np.asarray(mask) if mask is not None else None


def hash_photographs(records: Sequence[Record], settings: Settings) -> list[int | None]:
    """Perceptual hash of each photograph, None where it cannot be read (the unit's own pass says why)."""
    limit_threads()
    hashes: list[int | None] = []
    for record in records:
        try:
            image = decode_image(record.read(), name=record.name, mode="L", max_pixels=settings.image.max_pixels)
        except (ImageError, OSError):
            hashes.append(None)
        else:
            hashes.append(perceptual_hash(np.asarray(image)))
    return hashes


def encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """JPEG or PNG bytes of uint8 H W or H W 3; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    if format == "png":
        Image.fromarray(image).save(buffer, "PNG")
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def shard_path(output: Path, index: int) -> Path:
    return output / f"shard-{index:06d}.tar"


def account_path(output: Path, index: int) -> Path:
    return output / ACCOUNTS / f"unit-{index:06d}.json"


def read_account(output: Path, index: int) -> dict[str, Any] | None:
    """The account of a finished unit; None if it has none or its shard is not there any more."""
    try:
        account = json.loads(account_path(output, index).read_text("utf-8"))
        if account["shard"] is not None and not Path(f"{output / account['shard']['name']}{INDEX_SUFFIX}").is_file():
            return None
        if account["shard"] is not None and not (output / account["shard"]["name"]).is_file():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return account


def _rejection(number: int, record: Record, rejection: Rejection) -> dict[str, Any]:
    entry = {"number": number, "source": record.name, "cause": rejection.cause, "detail": rejection.detail}
    return entry | ({"subject": record.subject_text} if record.subject_text else {})


def _measures(facts: dict[str, Any]) -> dict[str, Any]:
    names = ("subject", "area", "border_contact", "num_components", "unknown_share")
    return {name: facts[name] for name in names if name in facts}
