"""OpenImages' tables of boxes: the photographs with one salient subject, and what it is (BLIP-Diffusion §4.1)."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
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
    area: Sequence[float] = (0.1, 0.8),
    exclude: Sequence[str] = HUMAN_RELATED,
    dominance: float = 2.0,
) -> dict[str, str]:
    """Image id → category words (lower case) for the images in which one box clearly is the subject.

    Args:
        boxes: ``…-annotations-bbox.csv`` with ImageID, LabelName, XMin, XMax, YMin, YMax (shares of the frame), and
            optionally IsGroupOf, IsDepiction, IsInside.
        classes: ``class-descriptions-boxable.csv``: label, name, with or without a heading.
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
        reader = csv.DictReader(file)
        needed = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
        missing = [column for column in needed if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"openimages.boxes={path}: no column {', '.join(missing)}; found {reader.fieldnames}")
        for row in reader:
            share = (float(row["XMax"]) - float(row["XMin"])) * (float(row["YMax"]) - float(row["YMin"]))
            odd = any(row.get(flag) == "1" for flag in ("IsGroupOf", "IsDepiction", "IsInside"))
            found[row["ImageID"]].append((share, row["LabelName"], odd))
    excluded = {name.lower() for name in exclude}
    low, high = area
    chosen: dict[str, str] = {}
    for image, candidates in found.items():
        share, label, odd = max(candidates)
        name = names.get(label, "")
        others = sorted((candidate[0] for candidate in candidates), reverse=True)[1:]
        if odd or not name or name.lower() in excluded or not low <= share <= high:
            continue
        if others and share < dominance * others[0]:
            continue
        chosen[image] = name.lower()
    return chosen


def _class_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"openimages.classes={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}
