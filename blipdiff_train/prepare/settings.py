"""What a preparation job can be told, as typed values with their reasons; all problems are reported at once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipdiff_train.context.matting import ENGINES as MATTING_ENGINES

KINDS = ("subjects", "backgrounds")
STEPS = ("all", "duplicates", "shards", "report")
ENGINES = ("local", "ray")
ACCELERATORS = ("auto", "cpu", "gpu")
DTYPES = ("float32", "bfloat16", "float16")
SEGMENTERS = ("grabcut", "clipseg", "alpha")
FORMATS = ("jpg", "png")


@dataclass(frozen=True)
class ImageSettings:
    """How photographs are read and stored."""

    longest_side_px: int = 512  # stage 2 trains at 512 px
    shortest_side_px: int = 64  # below this an object has no texture left to learn
    max_pixels: int = 100_000_000  # an image bomb is refused on its header
    format: str = "jpg"
    jpeg_quality: int = 95


@dataclass(frozen=True)
class CaptionerSettings:
    """An image-to-text model for the samples kept; with ``model`` None there is none."""

    model: str | None = None
    batch_size: int = 8
    max_new_tokens: int = 30  # stage 1 reads 32 tokens, the first and last of which are marks
    dtype: str = "float32"
    replace: bool = False


@dataclass(frozen=True)
class SegmenterSettings:
    name: str = "grabcut"
    model: str | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class TrimapSettings:
    # CLIPSeg is careful inside a subject and sure outside it: of (0.5 … 0.95, 0.05 … 0.3) this pair had the best mattes
    # on toybox that rejected nothing. GrabCut's outline is soft on both sides, where any pair serves
    foreground_threshold: float = 0.7
    background_threshold: float = 0.1
    margin: float = 0.01  # 5 px at 512: about the width of fur


@dataclass(frozen=True)
class MattingSettings:
    engine: str = MATTING_ENGINES[0]
    foreground_colours: bool = True


@dataclass(frozen=True)
class FilterSettings:
    """Limits beyond which a matte is more likely wrong, or useless as context, than good. None switches one off."""

    area: tuple[float, float] | None = (0.02, 0.9)
    border_contact: float | None = 0.5
    unknown_share: float | None = 0.5
    blur: float | None = 10.0
    num_components: int | None = 5
    agreement: float | None = None
    duplicate_distance: int | None = 4


@dataclass(frozen=True)
class OpenImagesSettings:
    """Arguments of :func:`~blipdiff_train.prepare.openimages.salient_subjects`; all files None: no such input."""

    boxes: str | None = None
    classes: str | None = None
    labels: str | None = None
    area: tuple[float, float] = (0.1, 0.8)
    dominance: float = 2.0
    exclude: tuple[str, ...] | None = None

    def arguments(self) -> dict[str, Any] | None:
        """None if the input is not OpenImages'."""
        if self.boxes is None:
            return None
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ReportSettings:
    enabled: bool = True
    num_thumbnails: int = 48


@dataclass(frozen=True)
class Settings:
    """The whole job; ``python -m blipdiff_train prepare --help`` has the meanings and units."""

    input: str
    output: str
    kind: str = "subjects"
    overwrite: bool = False
    categories: str | None = None
    captions: str | None = None
    limit: int | None = None
    seed: int = 0
    photographs_per_shard: int = 64
    step: str = "all"
    part: str | None = None
    engine: str = "local"
    workers: int | None = None
    accelerator: str = "auto"
    devices: int | None = None
    device: str = "cpu"  # of torch, for models in a worker's own process; no key of the command line
    ray_address: str | None = None
    openimages: OpenImagesSettings = field(default_factory=OpenImagesSettings)
    image: ImageSettings = field(default_factory=ImageSettings)
    captioner: CaptionerSettings = field(default_factory=CaptionerSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)
    trimap: TrimapSettings = field(default_factory=TrimapSettings)
    matting: MattingSettings = field(default_factory=MattingSettings)
    filters: FilterSettings = field(default_factory=FilterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of the shards; a job can be resumed only under the same ones."""
        values = dataclasses.asdict(self)
        for key in ("input", "output", "overwrite", "seed", "report", *HOW_IT_RUNS):
            del values[key]
        return values

    @property
    def has_models(self) -> bool:
        """Whether anything in the job is worth an accelerator."""
        return self.kind == "subjects" and (self.segmenter.name == "clipseg" or self.captioner.model is not None)

    def share(self) -> tuple[int, int]:
        """``part`` as (number, of how many); (0, 1) for the whole job."""
        return parse_part(self.part) if self.part else (0, 1)


HOW_IT_RUNS = ("step", "part", "engine", "workers", "accelerator", "devices", "device", "ray_address")
"""Keys that decide where and when the work is done, and not its results."""


def parse_part(part: str) -> tuple[int, int]:
    """``"3/16"`` as (3, 16).

    Raises:
        ValueError: not two whole numbers with 0 ≤ first < second.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"part={part!r}, expected k/n with 0 ≤ k < n, e.g. 0/16 to 15/16")
    return int(number), int(count)


BLOCKS = {
    "openimages": OpenImagesSettings,
    "image": ImageSettings,
    "captioner": CaptionerSettings,
    "segmenter": SegmenterSettings,
    "trimap": TrimapSettings,
    "matting": MattingSettings,
    "filters": FilterSettings,
    "report": ReportSettings,
}


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Typed settings from plain nested mappings; keys left out take their defaults.

    Raises:
        ValueError: every unknown key and every value out of range, in one message.
    """
    problems: list[str] = []
    plain = _known(Settings, values, "", problems)
    for name, block in BLOCKS.items():
        given = plain.get(name)
        if given is None:
            plain.pop(name, None)
        elif isinstance(given, Mapping):
            plain[name] = block(**_known(block, given, f"{name}.", problems))
        elif not isinstance(given, block):
            problems.append(f"{name}={given!r}, expected a block of keys")
            del plain[name]
    problems += [f"{key} is missing" for key in ("input", "output") if not plain.get(key)]
    if not problems:
        for name in ("filters", "openimages"):
            if isinstance(area := getattr(plain.get(name), "area", None), list):
                plain[name] = dataclasses.replace(plain[name], area=tuple(area))
        settings = Settings(**plain)
        problems = _problems(settings)
    if problems:
        raise ValueError("prepare cannot start:\n" + "\n".join(f"  {problem}" for problem in problems))
    return settings


def _known(block: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    names = [entry.name for entry in dataclasses.fields(block)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f", expected one of {', '.join(names)}"
            problems.append(f"{prefix}{key} is not a setting{hint}")
    return {key: value for key, value in values.items() if key in names}


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)


def _problems(s: Settings) -> list[str]:
    """Every value that is out of range, as a sentence with key, value and expectation."""
    found: list[str] = []

    def need(good: bool, key: str, value: Any, expected: str) -> None:
        if not good:
            written = list(value) if isinstance(value, tuple) else value  # as it is typed
            found.append(f"{key}={written!r}, expected {expected}")

    def share(key: str, value: float | None) -> None:
        need(value is None or 0 <= value <= 1, key, value, "a share in [0, 1] or null")

    need(s.kind in KINDS, "kind", s.kind, f"one of {', '.join(KINDS)}")
    need(s.limit is None or s.limit >= 1, "limit", s.limit, "null or at least 1 photograph")
    need(s.photographs_per_shard >= 1, "photographs_per_shard", s.photographs_per_shard, "at least 1")
    tables = s.openimages
    files = {"boxes": tables.boxes, "classes": tables.classes, "labels": tables.labels}
    for name, path in files.items() if any(path is not None for path in files.values()) else ():
        good = (isinstance(path, str) and path != "") or (path is None and name == "labels")
        need(good, f"openimages.{name}", path, "a CSV file")
    area, exclude = tables.area, tables.exclude
    good = _are_numbers(area) and len(area) == 2 and 0 <= area[0] < area[1] <= 1
    need(good, "openimages.area", area, "[smallest, largest] share of the frame")
    good = exclude is None or (isinstance(exclude, (list, tuple)) and all(isinstance(name, str) for name in exclude))
    need(good, "openimages.exclude", exclude, "null or a list of names of classes")
    good = _are_numbers([tables.dominance]) and tables.dominance >= 1
    need(good, "openimages.dominance", tables.dominance, "a factor of at least 1")
    need(s.step in STEPS, "step", s.step, f"one of {', '.join(STEPS)}")
    if s.part is not None:
        try:
            parse_part(s.part)
        except ValueError as error:
            found.append(str(error))
        need(s.step in ("duplicates", "shards"), "step", s.step, "duplicates or shards where there is a part")
        # each part would remove what the others have made
        need(not s.overwrite, "overwrite", s.overwrite, "false where there is a part; remove the output by hand")
    need(s.engine in ENGINES, "engine", s.engine, f"one of {', '.join(ENGINES)}")
    need(s.workers is None or s.workers >= 1, "workers", s.workers, "null or at least 1 process")
    need(s.accelerator in ACCELERATORS, "accelerator", s.accelerator, f"one of {', '.join(ACCELERATORS)}")
    need(s.devices is None or s.devices >= 1, "devices", s.devices, "null or at least 1")
    if s.devices is not None and not s.has_models:
        found.append(
            f"devices={s.devices}, but nothing here runs on an accelerator: segmenter.name={s.segmenter.name}, "
            "no captioner.model; leave devices at null"
        )
    need(s.image.longest_side_px >= 16, "image.longest_side_px", s.image.longest_side_px, "at least 16 px")
    need(s.image.shortest_side_px >= 8, "image.shortest_side_px", s.image.shortest_side_px, "at least 8 px")
    need(s.image.max_pixels >= 1, "image.max_pixels", s.image.max_pixels, "at least 1")
    need(s.image.format in FORMATS, "image.format", s.image.format, f"one of {', '.join(FORMATS)}")
    need(1 <= s.image.jpeg_quality <= 100, "image.jpeg_quality", s.image.jpeg_quality, "1 to 100")
    need(s.segmenter.name in SEGMENTERS, "segmenter.name", s.segmenter.name, f"one of {', '.join(SEGMENTERS)}")
    for key, model in (("segmenter.model", s.segmenter.model), ("captioner.model", s.captioner.model)):
        is_path = model is not None and model.startswith(("/", "./", "../", "~"))
        need(not is_path or Path(model).is_dir(), key, model, "a folder that is there, or a hub id such as owner/name")
    need(s.segmenter.batch_size >= 1, "segmenter.batch_size", s.segmenter.batch_size, "at least 1")
    if s.segmenter.name == "clipseg":
        expected = "a folder or hub id such as CIDAS/clipseg-rd64-refined"
        need(bool(s.segmenter.model), "segmenter.model", s.segmenter.model, expected)
    need(s.captioner.batch_size >= 1, "captioner.batch_size", s.captioner.batch_size, "at least 1")
    need(s.captioner.max_new_tokens >= 1, "captioner.max_new_tokens", s.captioner.max_new_tokens, "at least 1")
    need(s.captioner.dtype in DTYPES, "captioner.dtype", s.captioner.dtype, f"one of {', '.join(DTYPES)}")
    low, high = s.trimap.background_threshold, s.trimap.foreground_threshold
    expected = f"0 ≤ trimap.background_threshold ({low}) < trimap.foreground_threshold ≤ 1"
    need(0 <= low < high <= 1, "trimap.foreground_threshold", high, expected)
    need(0 <= s.trimap.margin < 0.5, "trimap.margin", s.trimap.margin, "a share of the longest side in [0, 0.5)")
    engines = ", ".join(MATTING_ENGINES)
    need(s.matting.engine in MATTING_ENGINES, "matting.engine", s.matting.engine, f"one of {engines}")
    area = s.filters.area
    good = area is None or (len(area) == 2 and 0 <= area[0] < area[1] <= 1)
    need(good, "filters.area", area, "[smallest, largest] share of the frame, or null")
    share("filters.border_contact", s.filters.border_contact)
    share("filters.unknown_share", s.filters.unknown_share)
    share("filters.agreement", s.filters.agreement)
    blur, parts, distance = s.filters.blur, s.filters.num_components, s.filters.duplicate_distance
    need(blur is None or blur >= 0, "filters.blur", blur, "null or a variance ≥ 0")
    need(parts is None or parts >= 1, "filters.num_components", parts, "null or at least 1")
    need(distance is None or 0 <= distance <= 16, "filters.duplicate_distance", distance, "null or 0 to 16 bits of 64")
    need(s.report.num_thumbnails >= 0, "report.num_thumbnails", s.report.num_thumbnails, "at least 0")
    return found
