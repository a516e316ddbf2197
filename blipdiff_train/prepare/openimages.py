"""OpenImages' tables of boxes: the photographs with one salient subject, and what it is (BLIP-Diffusion §4.1)."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HUMAN_RELATED = (
    "Person", "Man", "Woman", "Boy", "Girl", "Clothing", "Human body", "Human face", "Human head", "Human eye",
    "Human ear", "Human nose", "Human mouth", "Human hair", "Human beard", "Human arm", "Human hand", "Human leg",
    "Human foot",
)  # fmt: skip
"""Left out as the paper does; it does not print its list, this one is ours."""


def salient_subjects(
    boxes: str | Path,
    classes: str | Path,
    *,
    labels: str | Path | None = None,
    area: Sequence[float] = (0.1, 0.8),
    exclude: Sequence[str] = HUMAN_RELATED,
    dominance: float = 2.0,
) -> dict[str, str]:
    """Image id → category words (lower case) for the images in which one box clearly is the subject.

    Args:
        boxes: ``…-annotations-bbox.csv`` with ImageID, LabelName, XMin, XMax, YMin, YMax (shares of the frame), and
            optionally IsGroupOf, IsDepiction, IsInside.
        classes: ``class-descriptions-boxable.csv``: label, name, with or without a heading.
        labels: image-level labels (``…-annotations-human-imagelabels.csv``) with ImageID, LabelName, Confidence; an
            image whose subject they call absent (confidence below 0.5) is left out. None: the boxes are believed.
        area: smallest and largest share of the frame under the subject's box. The limits are ours.
        exclude: names of classes; an image with a box of one of them as its largest is left out.
        dominance: the subject's box is at least so many times larger than any other; a box of the same size or larger
            means that the photograph has no single subject.

    Raises:
        ValueError: a file is not there or lacks a column.
    """
    names = _class_names(Path(classes))
    found: dict[str, list[tuple[float, str, bool]]] = defaultdict(list)
    path = Path(boxes)
    if not path.is_file():
        raise ValueError(f"openimages.boxes={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in _rows(file, "boxes", path, ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")):
            share = (float(row["XMax"]) - float(row["XMin"])) * (float(row["YMax"]) - float(row["YMin"]))
            odd = any(row.get(flag) == "1" for flag in ("IsGroupOf", "IsDepiction", "IsInside"))
            found[row["ImageID"]].append((share, row["LabelName"], odd))
    absent = _absent_labels(Path(labels)) if labels is not None else set()
    excluded = {name.lower() for name in exclude}
    low, high = area
    chosen: dict[str, str] = {}
    for image, candidates in found.items():
        share, label, odd = max(candidates)
        name = names.get(label, "")
        others = sorted((candidate[0] for candidate in candidates), reverse=True)[1:]
        if odd or not name or name.lower() in excluded or not low <= share <= high:
            continue
        if (others and share < dominance * others[0]) or (image, label) in absent:
            continue
        chosen[image] = name.lower()
    return chosen


def _absent_labels(path: Path) -> set[tuple[str, str]]:
    """Pairs of image and label of which the image-level labels say that the label is not in the image."""
    if not path.is_file():
        raise ValueError(f"openimages.labels={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = _rows(file, "labels", path, ("ImageID", "LabelName", "Confidence"))
        return {(row["ImageID"], row["LabelName"]) for row in rows if float(row["Confidence"]) < 0.5}


def _rows(file: Iterable[str], key: str, path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(file)
    missing = [column for column in needed if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"openimages.{key}={path}: no column {', '.join(missing)}; found {reader.fieldnames}")
    return iter(reader)


def _class_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"openimages.classes={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}
