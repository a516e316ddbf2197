"""What goes in: every kind of input becomes one list of records, in an order that depends on names alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipdiff_train.data.tar_index import scan_tar
from blipdiff_train.prepare.openimages import salient_subjects

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".webp")
MASK_ENDINGS = (".alpha.png", ".mask.png")
PATH_COLUMNS = ("path", "file", "filename", "image", "image_path")
CAPTION_COLUMNS = ("caption", "text")
CATEGORY_COLUMNS = ("category", "subject", "subject_text", "class", "label")


@dataclass(frozen=True)
class Record:
    """One photograph to prepare. ``name`` is relative to the input and stands in provenance and messages.

    ``file`` with ``offset`` and ``size`` is a member of a tar, without them a file of its own; ``mask`` is the file of
    its matte. ``caption`` and ``subject_text`` are None where the input has none.
    """

    name: str
    file: str
    offset: int | None = None
    size: int | None = None
    mask: str | None = None
    caption: str | None = None
    subject_text: str | None = None

    def read(self) -> bytes:
        """The photograph's bytes.

        Raises:
            OSError: the file is gone or cannot be read.
        """
        with open(self.file, "rb") as file:
            if self.offset is None:
                return file.read()
            file.seek(self.offset)
            return file.read(self.size)


def list_records(
    source: str | Path,
    *,
    categories: str | None = None,
    captions: str | None = None,
    openimages: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> list[Record]:
    """All photographs of ``source`` with what is known of their captions and categories.

    Args:
        source: a folder of photographs, a .tar or a folder of them (img2dataset's layout: ``KEY.jpg`` with
            ``KEY.txt`` and ``KEY.json``), or a table (.csv, .parquet, .json, .jsonl) with a path in each row, relative
            to the table.
        categories: None for the sub-folder's name or the table's column; a .csv or .json file of path → category,
            where a path may also be a folder; a table's column; or one category for all.
        captions: None for a sidecar .txt or the table's column; a .csv or .json file of path → caption.
        openimages: ``boxes`` and ``classes`` (CSV files), ``area`` and ``exclude``; see :mod:`.openimages`.
        limit: the first so many only.

    Raises:
        ValueError: the input is not there, has no photographs, or a table lacks its column.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"input={source}: no such file or folder")
    if openimages is not None:
        chosen = salient_subjects(**openimages)
        records = [
            dataclasses.replace(record, subject_text=category)
            for record in _from_folder(source)
            if (category := chosen.get(Path(record.name).stem)) is not None
        ]
    elif source.is_dir():
        tars = sorted(source.glob("*.tar"))
        records = [record for tar in tars for record in _from_tar(tar)] if tars else _from_folder(source)
    elif source.suffix == ".tar":
        records = _from_tar(source)
    elif source.suffix in (".csv", ".parquet", ".json", ".jsonl"):
        records = _from_table(source, categories)
    else:
        raise ValueError(f"input={source}: expected a folder, .tar, .csv, .parquet, .json or .jsonl")
    records = records[:limit]
    if not records:
        raise ValueError(f"input={source}: no photographs ({', '.join(PHOTOGRAPHS)}) found in it")
    records = _with_categories(records, categories, is_table=source.is_file() and source.suffix != ".tar")
    if captions is not None:
        table = _read_mapping(Path(captions), CAPTION_COLUMNS, "captions")
        records = [
            dataclasses.replace(record, caption=_look_up(table, record.name) or record.caption) for record in records
        ]
    return records


def _from_folder(root: Path) -> list[Record]:
    records = []
    for path in sorted(_walk(root), key=lambda path: path.relative_to(root).as_posix()):
        # a name that is no UTF-8 can be opened, but not written into a report: its odd bytes show as \\xff
        name = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
        if path.suffix.lower() not in PHOTOGRAPHS or name.lower().endswith(MASK_ENDINGS):
            continue
        sidecar = path.with_suffix(".txt")
        masks = [path.with_suffix(ending) for ending in MASK_ENDINGS if path.with_suffix(ending).is_file()]
        folder = name.split("/")[-2] if path.parent != root else None
        records.append(
            Record(
                name=name,
                file=str(path),
                mask=str(masks[0]) if masks else None,
                caption=_clean(sidecar.read_text("utf-8", "replace")) if sidecar.is_file() else None,
                subject_text=_words(folder) if folder else None,
            )
        )
    return records


def _walk(root: Path) -> Iterator[Path]:
    """Files below ``root``; hidden ones and links to folders are left out, so a loop of links cannot trap the job."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _from_tar(tar: Path) -> list[Record]:
    index, records = scan_tar(tar), []
    with tar.open("rb") as file:

        def read(member) -> bytes:
            file.seek(member.offset)
            return file.read(min(member.size, 1 << 20))

        for number in range(len(index)):
            members = {member.suffix.lower(): member for member in index.members(number)}
            photograph = next((members[end[1:]] for end in PHOTOGRAPHS if end[1:] in members), None)
            if photograph is None:
                continue
            facts = json_object(read(members["json"])) if "json" in members else {}
            text = read(members["txt"]) if "txt" in members else None
            caption, subject_text = tar_texts(facts, text)
            records.append(
                Record(
                    name=f"{tar.name}/{index.key(number)}.{photograph.suffix}",
                    file=str(tar),
                    offset=photograph.offset,
                    size=photograph.size,
                    caption=caption,
                    subject_text=subject_text,
                )
            )
    return records


def tar_texts(facts: Mapping[str, Any], text: bytes | None) -> tuple[str | None, str | None]:
    """Caption and category of a tar's sample, from its JSON's object and its .txt; None where there is none."""
    caption = text.decode("utf-8", "replace") if text is not None else _first(facts, CAPTION_COLUMNS)
    return _clean(caption), _clean(_first(facts, CATEGORY_COLUMNS))


def _from_table(table: Path, categories: str | None) -> list[Record]:
    rows = _read_rows(table)
    columns = list(rows[0]) if rows else []
    path_column = next((name for name in PATH_COLUMNS if name in columns), None)
    if path_column is None:
        raise ValueError(f"input={table}: columns {columns}, expected one of {', '.join(PATH_COLUMNS)} with the path")
    category_columns = (categories,) if categories in columns else CATEGORY_COLUMNS
    records = []
    for row in rows:
        name = str(row[path_column])
        mask = row.get("mask")
        records.append(
            Record(
                name=name,
                file=str(table.parent / name),
                mask=str(table.parent / mask) if mask else None,
                caption=_clean(_first(row, CAPTION_COLUMNS)),
                subject_text=_clean(_first(row, category_columns)),
            )
        )
    return records


def _with_categories(records: list[Record], categories: str | None, *, is_table: bool) -> list[Record]:
    if categories is None:
        return records
    if categories.endswith((".csv", ".json")):
        table = _read_mapping(Path(categories), CATEGORY_COLUMNS, "categories")
        return [
            dataclasses.replace(record, subject_text=_look_up(table, record.name) or record.subject_text)
            for record in records
        ]
    if is_table and any(record.subject_text for record in records) and " " not in categories:
        # the word named a column, and _from_table has read it
        return records
    return [dataclasses.replace(record, subject_text=categories) for record in records]


def _read_rows(table: Path) -> list[dict[str, Any]]:
    try:
        if table.suffix == ".csv":
            with table.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file))
        if table.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(table).to_pylist()
        text = table.read_text("utf-8")
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if table.suffix == ".jsonl"
            else json.loads(text)
        )
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read as {table.suffix}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{table}: expected a list of objects, one a photograph")
    return rows


def _read_mapping(path: Path, value_columns: tuple[str, ...], key: str) -> dict[str, str]:
    """Path → text, from a JSON object or a CSV whose columns are named or are simply the first two."""
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file")
    if path.suffix == ".json":
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            return {str(name): str(text) for name, text in value.items()}
    rows = _read_rows(path)
    table = {}
    for row in rows:
        values = list(row.values())
        name = _first(row, PATH_COLUMNS) or values[0]
        text = _first(row, value_columns) or (values[1] if len(values) > 1 else None)
        if text is None:
            raise ValueError(
                f"{key}={path}: columns {list(row)}, expected a path and one of {', '.join(value_columns)}"
            )
        table[str(name)] = str(text)
    return table


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    """The entry of the file, of its name without suffix, or of the nearest folder above it."""
    path = Path(name)
    for candidate in (
        name,
        path.with_suffix("").as_posix(),
        path.name,
        *(parent.as_posix() for parent in path.parents),
    ):
        if candidate in table:
            return _clean(table[candidate])
    return None


def _first(row: Mapping[str, Any], names: tuple[str | None, ...]) -> str | None:
    return next((str(row[name]) for name in names if name in row and row[name] not in (None, "")), None)


def json_object(data: bytes) -> dict[str, Any]:
    """The object that ``data`` holds; an empty one where it holds none."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _words(folder: str) -> str:
    return " ".join(folder.replace("_", " ").replace("-", " ").split())


def _clean(text: str | None) -> str | None:
    return " ".join(text.split()) or None if text is not None else None
