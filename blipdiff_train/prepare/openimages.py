"""OpenImages' tables of boxes: the photographs with one salient subject, and what it is (BLIP-Diffusion §4.1).

The tables are those of the dataset's download pages for V4 to V7. They are read line by line, since the boxes of the
training set are 14.6 million rows and the image-level labels more: in memory is one entry for each photograph at hand.
"""

from __future__ import annotations

import csv
import difflib
from collections import Counter
from collections.abc import Container, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

HUMAN_RELATED = (
    "Person", "Man", "Woman", "Boy", "Girl", "Human body", "Human face", "Human head", "Human eye", "Human ear",
    "Human nose", "Human mouth", "Human hair", "Human beard", "Human arm", "Human hand", "Human leg", "Human foot",
    "Skull", "Clothing", "Brassiere", "Coat", "Dress", "Jacket", "Jeans", "Miniskirt", "Shirt", "Shorts", "Skirt",
    "Sports uniform", "Suit", "Swimwear", "Trousers",
)  # fmt: skip
"""Left out as the paper does; it does not print its list, this one is ours.

Person, all that the dataset's hierarchy puts below it, and the clothes that cover a body: their box is mostly the
body of whoever wears them. Shoes, hats, bags, glasses and jewellery stay: they are subjects of their own.
"""


def salient_subjects(
    boxes: str | Path,
    classes: str | Path,
    *,
    labels: str | Path | None = None,
    area: Sequence[float] = (0.1, 0.8),
    exclude: Sequence[str] = HUMAN_RELATED,
    dominance: float = 2.0,
    images: Set[str] | None = None,
    left_out: Counter[str] | None = None,
) -> dict[str, str]:
    """Image id → category words (lower case) for the images in which one box clearly is the subject.

    Args:
        boxes: ``…-annotations-bbox.csv`` with ImageID, LabelName, XMin, XMax, YMin, YMax (shares of the frame), and
            optionally IsGroupOf, IsDepiction, IsInside (1 yes, 0 no, -1 unknown, which counts as no).
        classes: ``…-class-descriptions-boxable.csv``: label, name, with a heading (V6, V7) or without (V4, V5).
        labels: image-level labels (``…-annotations-human-imagelabels.csv``) with ImageID, LabelName, Confidence; an
            image whose subject they call absent (confidence below 0.5) is left out. None: the boxes are believed.
        area: smallest and largest share of the frame under the subject's box. The limits are ours.
        exclude: names of classes; an image with a box of one of them as its largest is left out.
        dominance: the subject's box is at least so many times larger than any other; a box of the same size or larger
            means that the photograph has no single subject.
        images: the ids to look for; None: all that the boxes name.
        left_out: gets the number of images without a subject, by cause.

    Raises:
        ValueError: a file is not there, lacks a column or has a line without numbers; ``exclude`` has an unknown name.
    """
    names = _class_names(Path(classes))
    _check_excluded(exclude, names, Path(classes))
    causes = Counter() if left_out is None else left_out
    largest = _largest_boxes(Path(boxes), images)
    if images is not None and len(largest) < len(images):
        causes["no box"] += len(images) - len(largest)
    excluded = {name.lower() for name in exclude}
    low, high = area
    chosen: dict[str, str] = {}
    for image, (share, label, odd, second) in largest.items():
        name = names.get(label, "").lower()
        if not name:
            causes["class without a name"] += 1
        elif name in excluded:
            causes["class left out"] += 1
        elif odd:
            causes["group, depiction or inside"] += 1
        elif not low <= share <= high:
            causes["box too small or too large"] += 1
        elif second and share < dominance * second:
            causes["no single subject"] += 1
        else:
            chosen[image] = label
    if labels is not None:
        for image in _absent(Path(labels), chosen):
            del chosen[image]
            causes["label called absent"] += 1
    return {image: names[label].lower() for image, label in chosen.items()}


def _largest_boxes(path: Path, images: Container[str] | None) -> dict[str, tuple[float, str, bool, float]]:
    """Image → share of the frame of its largest box, that box's label, whether it is odd, share of the second one."""
    needed = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
    flags = ("IsGroupOf", "IsDepiction", "IsInside")
    largest: dict[str, tuple[float, str, bool, float]] = {}
    known: dict[str, str] = {}  # one string a label, however many rows have it
    with _table("boxes", path, needed) as (rows, columns):
        image_at, label_at, *edges = (columns[name] for name in needed)
        left, right, top, bottom = edges
        flags_at = [columns[name] for name in flags if name in columns]
        for row in rows:
            image = row[image_at]
            if images is not None and image not in images:
                continue
            share = (float(row[right]) - float(row[left])) * (float(row[bottom]) - float(row[top]))
            before = largest.get(image)
            if before is None or share > before[0]:
                label = known.setdefault(row[label_at], row[label_at])
                odd = any(row[place] == "1" for place in flags_at)
                largest[image] = share, label, odd, 0.0 if before is None else before[0]
            elif share > before[3]:
                largest[image] = *before[:3], share
    return largest


def _absent(path: Path, chosen: dict[str, str]) -> set[str]:
    """The images of which the image-level labels say that the chosen label is not in them."""
    needed = ("ImageID", "LabelName", "Confidence")
    with _table("labels", path, needed) as (rows, columns):
        image_at, label_at, confidence_at = (columns[name] for name in needed)
        return {
            row[image_at]
            for row in rows
            if chosen.get(row[image_at]) == row[label_at] and float(row[confidence_at]) < 0.5
        }


@contextmanager
def _table(key: str, path: Path, needed: Sequence[str]) -> Iterator[tuple[Iterator[list[str]], dict[str, int]]]:
    """Rows of a CSV with a heading, and the place of each column; what goes wrong in a row is told with its line."""
    if not path.is_file():
        raise ValueError(f"openimages.{key}={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        heading = next(reader, [])
        columns = {name.strip(): place for place, name in enumerate(heading)}
        missing = [column for column in needed if column not in columns]
        if missing:
            raise ValueError(f"openimages.{key}={path}: no column {', '.join(missing)}; found {', '.join(heading)}")
        try:
            yield (row for row in reader if row), columns
        except (ValueError, IndexError, csv.Error) as error:
            raise ValueError(f"openimages.{key}={path}: line {reader.line_num} cannot be read: {error}") from error


def _class_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"openimages.classes={path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        names = {row[0]: row[1].strip() for row in csv.reader(file) if len(row) >= 2}
    if not any(label.startswith("/") for label in names):
        # such as the hierarchy or the table of boxes, given by mistake
        raise ValueError(f"openimages.classes={path}: expected rows of label and name, such as /m/0bt9lr,Dog")
    return names


def _check_excluded(exclude: Sequence[str], names: dict[str, str], path: Path) -> None:
    if exclude is HUMAN_RELATED:
        return  # a table of a part of the classes does not have all of them
    known = {name.lower(): name for name in names.values()}
    for name in exclude:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            raise ValueError(f"openimages.exclude: {name} is no class of {path}{hint}")
