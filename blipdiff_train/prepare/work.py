"""One unit of work: a run of photographs becomes one shard and one account of it, as a pure function of both."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from blipdiff_train.common.files import sha256_file, write_json
from blipdiff_train.common.images import ImageError, decode_image, load_image
from blipdiff_train.context.generator import AnnotatedSample, ContextGenerator
from blipdiff_train.context.matting import to_u8
from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import AlphaSegmenter, GrabCutSegmenter
from blipdiff_train.context.trimap import unknown_share
from blipdiff_train.data.shards import write_shards
from blipdiff_train.data.tar_index import INDEX_SUFFIX
from blipdiff_train.prepare.filters import (
    check_agreement,
    check_matte,
    check_photograph,
    measure_agreement,
    measure_matte,
    perceptual_hash,
    sharpness,
)
from blipdiff_train.prepare.models import Models, RemoteModels
from blipdiff_train.prepare.records import Record
from blipdiff_train.prepare.settings import Settings

ACCOUNTS = ".job"
"""Folder in the output with one small file for each finished unit; what makes a job resumable."""

MATTES_PER_CAUSE = 8
"""Rejected mattes of a unit that are kept, as thumbnails for the report."""

THUMBNAIL_PX = 160
"""Longest side of a picture in the report."""


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
    sharpness: float


def limit_threads() -> None:
    """One thread a process: workers do not fight over cores, and sums are made in one order on every machine load."""
    os.environ["NUMBA_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)


class Worker:
    """Everything a process needs for its units, built once; called with a unit, it does it.

    Args:
        models: CLIPSeg and captioner in a process of their own; None: in this one, if the settings want any.
    """

    def __init__(self, settings: Settings, *, models: RemoteModels | None = None) -> None:
        limit_threads()
        self.settings = settings
        self.models: Models | RemoteModels | None = models
        if models is None and settings.has_models:
            self.models = Models(settings, settings.device)
        self.generator: ContextGenerator | None = None
        self.provenance: dict[str, Any] = {}
        if settings.kind == "subjects":
            self.generator = make_generator(settings, self.models)
            self.provenance = self.generator.describe()
            if settings.captioner.model is not None:
                self.provenance["captioner"] = self.models.describe_captioner()

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Write the unit's shard and its account, and return the account."""
        output = Path(self.settings.output)
        accounts = output / ACCOUNTS
        for left_over in accounts.glob(f"unit-{unit.index:06d}.*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        # a name of its own: a process that outlives its job for a moment cannot write into this one's files
        scratch = Path(tempfile.mkdtemp(prefix=f"unit-{unit.index:06d}.", suffix=".tmp", dir=accounts))
        seconds: Counter[str] = Counter()
        rejected: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        mattes: dict[int, bytes] | None = {} if self.settings.report.enabled else None
        written = write_shards(
            self.samples(unit, rejected, kept, seconds, mattes), scratch, samples_per_shard=max(1, len(unit.records))
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
        if mattes:
            in_text = {str(number): base64.b64encode(jpeg).decode() for number, jpeg in mattes.items()}
            write_json(mattes_path(output, unit.index), in_text)
        # last, and atomic: a unit without its account is done again, and gives the same bytes
        write_json(account_path(output, unit.index), account)
        return account

    def samples(
        self,
        unit: Unit,
        rejected: list[dict[str, Any]],
        kept: list[dict[str, Any]],
        seconds: Counter[str],
        mattes: dict[int, bytes] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The unit's samples in order; a batch of photographs is in memory at a time. The other four are added to.

        ``mattes``: number → small JPEG of the matte, or of the segmenter's answer if it came to no matte, for the first
        few rejections of each cause.
        """
        shown: Counter[str] = Counter()

        def reject(photograph: Photograph, rejection: Rejection, matte: np.ndarray | None) -> None:
            rejected.append(_rejection(photograph.number, photograph.record, rejection))
            if mattes is None or matte is None or shown[rejection.cause] == MATTES_PER_CAUSE:
                return
            shown[rejection.cause] += 1
            mattes[photograph.number] = encode(small(matte), "jpg", 85)

        size = self.settings.segmenter.batch_size
        for start in range(0, len(unit.records), size):
            part = slice(start, start + size)
            batch: list[Photograph] = []
            for number, record in zip(unit.numbers[part], unit.records[part], strict=True):
                with _timer(seconds, "read"):
                    photograph = self._read(number, record, unit.duplicates.get(number))
                if isinstance(photograph, Rejection):
                    repeats = {"repeats": unit.duplicates[number]} if photograph.cause == "duplicate" else {}
                    rejected.append(_rejection(number, record, photograph) | repeats)
                else:
                    batch.append(photograph)
            good: list[tuple[Photograph, AnnotatedSample | None, dict[str, Any]]] = []
            for photograph, (result, seg_prob) in zip(batch, self._annotate(batch, seconds), strict=True):
                if isinstance(result, Rejection):
                    reject(photograph, result, seg_prob)
                    continue
                measures, refused = self._judge(result, seconds)
                if refused is not None:
                    reject(photograph, refused, result.alpha_matte)
                else:
                    good.append((photograph, result, measures))
            captions = self._captions([photograph for photograph, _, _ in good], seconds)
            for (photograph, result, measures), caption in zip(good, captions, strict=True):
                with _timer(seconds, "write"):
                    sample = self._encode(photograph, result, measures, *caption)
                names = {"key": sample["__key__"], "source": photograph.record.name}
                kept.append(names | _measures(sample["json"]) | {"sharpness": round(photograph.sharpness, 3)})
                yield sample

    def _read(self, number: int, record: Record, duplicate_of: str | None) -> Photograph | Rejection:
        if duplicate_of is not None:
            return Rejection("duplicate", f"looks like {duplicate_of}; lower filters.duplicate_distance to keep both")
        if self.settings.kind == "subjects" and not record.subject_text and record.problem is None:
            words = "no sub-folder, column or file names its category (a number is none); set categories=…"
            return Rejection("no_category", words)
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
        sharp = sharpness(image)
        blurred = check_photograph(sharp, self.settings.filters)
        if blurred is not None:
            return blurred
        # equal photographs have equal ids in every set of shards they get into; 53 bits are exact in any JSON reader
        image_id = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11
        return Photograph(number, record, image, mask, image_id, sharp)

    def _annotate(
        self, batch: Sequence[Photograph], seconds: Counter[str]
    ) -> Sequence[tuple[AnnotatedSample | Rejection | None, np.ndarray | None]]:
        """Each photograph's matte or why it has none, and the segmenter's answer (H W uint8) if that did not serve.

        None and None where the job makes no mattes.
        """
        if self.generator is None or not batch:
            return [(None, None)] * len(batch)
        segmenter = self.generator.segmenter
        if isinstance(segmenter, AlphaSegmenter):
            segmenter.set_masks([photograph.mask for photograph in batch])
        images = [photograph.image for photograph in batch]
        subject_texts = [photograph.record.subject_text for photograph in batch]
        probabilities = self._ask(seconds, "segment", segmenter, lambda: segmenter.segment(images, subject_texts))
        results: list[tuple[AnnotatedSample | Rejection, np.ndarray | None]] = []
        for photograph, seg_prob in zip(batch, probabilities, strict=True):
            if isinstance(seg_prob, Rejection):
                results.append((seg_prob, None))
                continue
            result = self._cut_out(photograph, seg_prob)
            if isinstance(result, AnnotatedSample):
                seconds.update({step: value for step, value in result.seconds.items() if step != "segment"})
                results.append((result, None))
            else:
                results.append((result, to_u8(np.nan_to_num(seg_prob))))
        return results

    def _cut_out(self, photograph: Photograph, seg_prob: np.ndarray) -> AnnotatedSample | Rejection:
        record = photograph.record
        try:
            return self.generator.cut_out(photograph.image, seg_prob, record.subject_text, name=record.name)
        except (ArithmeticError, ValueError, cv2.error) as error:
            # one photograph that the numerics cannot bear must not end a job of 300,000
            return Rejection("matting_failed", f"{type(error).__name__}: {error}; drop the sample")

    def _judge(self, result: AnnotatedSample | None, seconds: Counter[str]) -> tuple[dict[str, Any], Rejection | None]:
        """What the filters measure on a matte, and whether one of them refuses it; the costly one is asked last."""
        filters = self.settings.filters
        if result is None:
            return {}, None
        measures = measure_matte(result.alpha_matte)
        refused = check_matte(measures, filters)
        if refused is None and filters.agreement is not None:
            with _timer(seconds, "agreement"):
                measures["agreement"] = measure_agreement(result.image, result.alpha_matte)
            refused = check_agreement(measures["agreement"], filters.agreement)
        return measures, refused

    def _captions(self, batch: Sequence[Photograph], seconds: Counter[str]) -> list[tuple[str | None, str]]:
        """Caption and where it is from, for each photograph that stays: only these are worth a model's time."""
        if self.generator is None:
            return [(None, "")] * len(batch)
        captioner = self.settings.captioner
        asked = [
            photograph
            for photograph in batch
            if captioner.model is not None and (captioner.replace or photograph.record.caption is None)
        ]
        said: dict[int, str] = {}
        if asked:
            images = [photograph.image for photograph in asked]
            texts = self._ask(seconds, "caption", self.models, lambda: self.models.caption(images))
            said = {photograph.number: text for photograph, text in zip(asked, texts, strict=True) if text}
        found: list[tuple[str | None, str]] = []
        for photograph in batch:
            record = photograph.record
            if photograph.number in said:
                found.append((said[photograph.number], "model"))
            elif record.caption is not None:
                found.append((record.caption, "given"))
            else:
                found.append((f"a photo of a {record.subject_text}", "template"))
        return found

    def _ask(self, seconds: Counter[str], step: str, who: Any, call: Callable[[], Any]) -> Any:
        """A model's answer; what was waited for another process is no work for it."""
        before = time.perf_counter()
        answer = call()
        whole = time.perf_counter() - before
        waited = who.waited_seconds if isinstance(who, RemoteModels) else 0.0
        seconds[step] += whole - waited
        if isinstance(who, RemoteModels):
            seconds["wait for a model"] += waited
        return answer

    def _encode(
        self,
        photograph: Photograph,
        result: AnnotatedSample | None,
        measures: dict[str, Any],
        caption: str | None,
        caption_source: str,
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
                "caption": caption,
                "caption_source": caption_source,
                "subject": record.subject_text,
                "unknown_share": round(unknown_share(result.trimap), 6),
                **measures,
            }
            sample["alpha.png"] = encode(result.alpha_matte, "png", 0)
            if result.foreground is not None:
                sample["fg.jpg"] = encode(result.foreground, "jpg", image.jpeg_quality)
        return sample | {"json": facts}


def make_generator(settings: Settings, models: Models | RemoteModels | None) -> ContextGenerator:
    """The generator that the settings describe; ``models`` if they want any."""
    segmenters = {"grabcut": GrabCutSegmenter, "alpha": AlphaSegmenter, "clipseg": lambda: models}
    return ContextGenerator(
        segmenters[settings.segmenter.name](),
        foreground_threshold=settings.trimap.foreground_threshold,
        background_threshold=settings.trimap.background_threshold,
        margin=settings.trimap.margin,
        engine=settings.matting.engine,
        foreground_colours=settings.matting.foreground_colours,
        max_unknown_share=settings.filters.unknown_share,
    )


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


class Hasher:
    """Perceptual hash of each photograph of a chunk, None where it cannot be read (the unit's own pass says why)."""

    def __init__(self, settings: Settings, *, models: RemoteModels | None = None) -> None:
        limit_threads()
        self.settings = settings

    def __call__(self, chunk: tuple[int, Sequence[Record]]) -> tuple[int, int]:
        """Write the hashes of chunk ``(number, records)``; returns its number and how many photographs it has."""
        number, records = chunk
        hashes = [self._hash(record) for record in records]
        write_json(hashes_path(Path(self.settings.output), number), hashes)
        return number, len(records)

    def _hash(self, record: Record) -> int | None:
        try:
            data, limit = record.read(), self.settings.image.max_pixels
            return perceptual_hash(np.asarray(decode_image(data, name=record.name, mode="L", max_pixels=limit)))
        except (ImageError, OSError):
            return None


def small(picture: np.ndarray) -> np.ndarray:
    """``picture`` (H W or H W 3) with its longest side :data:`THUMBNAIL_PX`."""
    factor = THUMBNAIL_PX / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


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


def mattes_path(output: Path, index: int) -> Path:
    return output / ACCOUNTS / f"mattes-{index:06d}.json"


def hashes_path(output: Path, number: int) -> Path:
    return output / ACCOUNTS / f"hashes-{number:06d}.json"


def read_hashes(output: Path, number: int, expected: int) -> list[int | None] | None:
    """The hashes of a chunk of ``expected`` photographs; None if it is not finished."""
    try:
        hashes = json.loads(hashes_path(output, number).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return hashes if isinstance(hashes, list) and len(hashes) == expected else None


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


@contextmanager
def _timer(seconds: Counter[str], step: str) -> Iterator[None]:
    before = time.perf_counter()
    yield
    seconds[step] += time.perf_counter() - before


def _rejection(number: int, record: Record, rejection: Rejection) -> dict[str, Any]:
    entry = {"number": number, "source": record.name, "cause": rejection.cause, "detail": rejection.detail}
    entry |= {"value": round(float(rejection.value), 6)} if rejection.value is not None else {}
    return entry | ({"subject": record.subject_text} if record.subject_text else {})


def _measures(facts: dict[str, Any]) -> dict[str, Any]:
    names = ("subject", "caption_source", "area", "border_contact", "num_components", "unknown_share", "agreement")
    return {name: facts[name] for name in names if name in facts}
