"""What goes in: every kind of input becomes one list of records, in an order that depends on names alone."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blipdiff_train.common.images import ImageError
from blipdiff_train.data.tar_index import Member, ShardError, scan_tar
from blipdiff_train.prepare.openimages import salient_subjects

PHOTOGRAPHS = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
OTHER_FORMATS = (
    ".heic", ".heif", ".avif", ".gif", ".tif", ".tiff", ".bmp", ".jp2", ".jxl",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
)  # fmt: skip
"""Photographs too, so they are listed; what is not a JPEG with another name is rejected, with a word on converting."""

ARCHIVES = (".zip", ".tgz", ".tar.gz", ".7z")
MASK_ENDINGS = (".alpha.png", ".mask.png")
TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
CAPTION_COLUMNS = ("caption", "text")
CATEGORY_COLUMNS = ("category", "subject", "subject_text", "class", "label")
MAX_TEXT_BYTES = 1 << 24
"""Limit of a sample's .json or .txt in a tar."""


@dataclass(frozen=True)
class Record:
    """One photograph to prepare. ``name`` is relative to the input and stands in provenance and messages.

    ``file`` with ``offset`` and ``size`` is a member of a tar, without them a file of its own; ``mask`` is the file of
    its matte. ``caption`` and ``subject_text`` are None where the input has none. ``problem`` says why there is nothing
    to read, where listing has shown that already: such a record is there to be rejected and counted.
    """

    name: str
    file: str
    offset: int | None = None
    size: int | None = None
    mask: str | None = None
    caption: str | None = None
    subject_text: str | None = None
    problem: str | None = None

    def read(self) -> bytes:
        """The photograph's bytes.

        Raises:
            OSError: the file is gone or cannot be read.
            ImageError: it has a ``problem``.
        """
        if self.problem is not None:
            raise ImageError(f"{self.name}: {self.problem}")
        try:
            with open(self.file, "rb") as file:
                if self.offset is None:
                    return file.read()
                file.seek(self.offset)
                return file.read(self.size)
        except ValueError as error:  # a table's path that no file can have
            raise OSError(str(error)) from error


def list_records(
    source: str | Path,
    *,
    categories: str | None = None,
    captions: str | None = None,
    openimages: Mapping[str, Any] | None = None,
    limit: int | None = None,
    leave_out: str | Path | None = None,
    not_chosen: Counter[str] | None = None,
) -> list[Record]:
    """All photographs of ``source`` with what is known of their captions and categories.

    Args:
        source: a folder of photographs, of tars (img2dataset's layout: ``KEY.jpg`` with ``KEY.txt`` and ``KEY.json``)
            or of both, at any depth; one .tar; or a table (.csv, .tsv, .parquet, .json, .jsonl) with a path in each
            row, relative to the table.
        categories: None for the sub-folder's name, the ``.json`` beside the photograph or the table's column; a .csv
            or .json file of path → category, where a path may also be a folder; a table's column; or one category for
            all. A category has at least one letter: a number (a shard, a year, a class's index) is none.
        captions: None for a sidecar .txt or .json or the table's column; a .csv or .json file of path → caption.
        openimages: ``boxes`` and ``classes`` (CSV files), ``area`` and ``exclude``; see :mod:`.openimages`.
        limit: the first so many only.
        leave_out: a folder that is not looked into, should it lie inside ``source``.
        not_chosen: gets the number of photographs that ``openimages`` leaves out, by cause.

    Raises:
        ValueError: the input is not there, has no photographs, or a table lacks its column.
        OSError: a folder cannot be listed.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"input={source}: no such file or folder")
    is_table = source.is_file() and source.suffix.lower() in TABLES
    found: Counter[str] = Counter()
    if source.is_dir():
        records = _from_folder(source, leave_out, found)
    elif source.suffix == ".tar":
        records = _from_tar(source, source.name)
    elif is_table:
        records = _from_table(source, categories)
    else:
        raise ValueError(f"input={source}: expected a folder, .tar, {', '.join(TABLES)}")
    if records and all(record.problem is not None for record in records):
        first = records[0]
        raise ValueError(f"input={source}: nothing in it can be read; {first.name}: {first.problem}")
    if not records:
        others = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.most_common(5))
        raise ValueError(
            f"input={source}: no photographs ({', '.join(PHOTOGRAPHS)}) and no .tar found in it; "
            f"{f'there are others: {others}; a table is given by its own name' if others else 'it is empty'}"
        )
    if openimages is not None:
        records = _with_salient_subjects(source, records, openimages, not_chosen)
    records = _with_categories(records, categories, is_table)
    if captions is not None:
        entries = _read_mapping(Path(captions), CAPTION_COLUMNS, "captions")
        texts = _look_up_all(entries, records, f"captions={captions}")
        records = [
            dataclasses.replace(record, caption=text or record.caption)
            for record, text in zip(records, texts, strict=True)
        ]
    return records[:limit]


def _from_folder(root: Path, leave_out: str | Path | None, found: Counter[str]) -> list[Record]:
    """Photographs and tars below ``root``; ``found`` gets the number of other files by suffix."""
    records: list[tuple[str, list[Record]]] = []
    for folder, files in _walk(root, os.path.realpath(leave_out) if leave_out else None):
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else f"{_printable(below)}/"
        subject_text = _folder_category(prefix)
        there = set(files)
        for file in files:
            name, path = prefix + _printable(file), os.path.join(folder, file)
            lower = file.lower()
            if lower.endswith(".tar"):
                records.append((name, _from_tar(Path(path), name)))
            elif lower.endswith(ARCHIVES):
                records.append((name, [Record(name, path, problem="an archive; unpack it, only plain .tar is read")]))
            elif lower.endswith(PHOTOGRAPHS + OTHER_FORMATS) and not lower.endswith(MASK_ENDINGS):
                stem = os.path.splitext(file)[0]
                mask = next((stem + ending for ending in MASK_ENDINGS if stem + ending in there), None)
                text = _bytes_of(folder, f"{stem}.txt") if f"{stem}.txt" in there else None
                facts = json_object(_bytes_of(folder, f"{stem}.json")) if f"{stem}.json" in there else {}
                caption, own_subject_text = tar_texts(facts, text)
                record = Record(
                    name=name,
                    file=path,
                    mask=os.path.join(folder, mask) if mask else None,
                    caption=caption,
                    subject_text=own_subject_text or subject_text,
                )
                records.append((name, [record]))
            else:
                found[os.path.splitext(lower)[1]] += 1
    return [record for _, some in sorted(records, key=lambda entry: entry[0]) for record in some]


def _walk(root: Path, leave_out: str | None) -> Iterator[tuple[str, list[str]]]:
    """Each folder from ``root`` down with the names of its files; hidden files and folders are left out.

    Links to folders are followed, except to one that the link itself lies in: a loop of links cannot trap the job.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(root), frozenset())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(folder)
        here = status.st_dev, status.st_ino
        if here in above or os.path.realpath(folder) == leave_out:
            continue
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((entry.path, above | {here}))
                else:
                    files.append(entry.name)
        yield folder, sorted(files)


def _from_tar(tar: Path, name: str) -> list[Record]:
    """The tar's photographs; a tar that cannot be used, and a sample without photograph, is a record with a problem."""
    try:
        index = scan_tar(tar, name=name)
    except ShardError as error:
        return [Record(name, str(tar), problem=str(error).removeprefix(f"{name}: "))]
    except OSError as error:
        return [Record(name, str(tar), problem=str(error.strerror or error))]
    records = []
    with tar.open("rb") as file:

        def read(member: Member) -> bytes:
            file.seek(member.offset)
            return file.read(min(member.size, MAX_TEXT_BYTES))

        for number in range(len(index)):
            members = {member.suffix: member for member in index.members(number)}
            photograph = next((members[end[1:]] for end in PHOTOGRAPHS + OTHER_FORMATS if end[1:] in members), None)
            key = f"{name}/{_printable(index.key(number))}"
            if photograph is None:
                expected = ", ".join(PHOTOGRAPHS)
                there = ", ".join(f".{suffix}" for suffix in list(members)[:5])
                problem = f"has {there}, expected a photograph ({expected}); the suffix begins at the first dot"
                records.append(Record(key, str(tar), problem=problem))
                continue
            facts = json_object(read(members["json"])) if "json" in members else {}
            text = read(members["txt"]) if "txt" in members else None
            caption, subject_text = tar_texts(facts, text)
            records.append(
                Record(
                    name=f"{key}.{photograph.suffix}",
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
    caption = _clean(text.decode("utf-8-sig", "replace")) if text is not None else None
    return caption or _clean(_first(facts, CAPTION_COLUMNS)), _category(_first(facts, CATEGORY_COLUMNS))


def _from_table(table: Path, categories: str | None) -> list[Record]:
    columns, rows = _read_rows(table)
    path_column = next((name for name in PATH_COLUMNS if name in columns), None)
    if path_column is None or (rows and isinstance(rows[0][path_column], (bytes, dict))):
        raise ValueError(f"input={table}: {_no_path(columns, rows)}")
    category_columns = CATEGORY_COLUMNS
    if categories is not None and categories.lower() in columns:
        category_columns = (categories.lower(),)
    elif categories is not None and not categories.lower().endswith(MAPPINGS):
        similar = difflib.get_close_matches(categories.lower(), columns, n=1)
        similar = similar or [name for name in CATEGORY_COLUMNS if name in columns]
        if similar:
            raise ValueError(
                f"categories={categories}: {table} has no such column, it has {', '.join(columns)}; did you mean "
                f"{similar[0]}?"
            )
    records: list[Record] = []
    for number, row in enumerate(rows, start=1):
        name, mask = (_as_path(_first(row, (column,)), table.parent) for column in (path_column, "mask"))
        records.append(
            Record(
                name=_printable(name) if name else f"{table.name}, row {number}",
                file=str(table.parent / name) if name else str(table),
                mask=str(table.parent / mask) if mask else None,
                caption=_clean(_first(row, CAPTION_COLUMNS)),
                subject_text=_category(_first(row, category_columns)),
                problem=None if name else f"its {path_column} is empty",
            )
        )
    first = [record for record in records[:100] if record.problem is None]
    if first and not any(os.path.isfile(record.file) for record in first):
        raise ValueError(
            f"input={table}: none of its first {len(first)} photographs is there, e.g. {first[0].file}; paths are "
            "relative to the table's folder"
        )
    return records


def _as_path(name: str | None, folder: Path) -> str | None:
    """``name``, with slashes where it was written on Windows."""
    if name is None or "\\" not in name or (folder / name).exists():
        return name
    return name.replace("\\", "/")


def _no_path(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0] if rows else {}
    inside = [name for name in columns if isinstance(first.get(name), (bytes, dict))]
    if inside:
        return (
            f"the photographs are inside its column {inside[0]}, which is not read; write them into tars or files "
            "(img2dataset: output_format=webdataset or files)"
        )
    hint = "; URLs are not fetched here: fetch them with img2dataset and give its folder" if "url" in columns else ""
    return f"columns {', '.join(columns)}; expected one of {', '.join(PATH_COLUMNS)} with the path{hint}"


def _with_salient_subjects(
    source: Path, records: list[Record], openimages: Mapping[str, Any], not_chosen: Counter[str] | None
) -> list[Record]:
    by_image = {Path(record.name).stem for record in records if record.problem is None}
    left_out: Counter[str] = Counter()
    chosen = salient_subjects(**openimages, images=by_image, left_out=left_out)
    kept = [
        dataclasses.replace(record, subject_text=chosen.get(Path(record.name).stem, record.subject_text))
        for record in records
        if record.problem is not None or Path(record.name).stem in chosen
    ]
    if not chosen:
        causes = ", ".join(f"{cause} {count}" for cause, count in left_out.most_common())
        raise ValueError(f"input={source}: openimages leaves out all {len(by_image)} photographs ({causes})")
    if not_chosen is not None:
        not_chosen.update(left_out)
    return kept


def _with_categories(records: list[Record], categories: str | None, is_table: bool) -> list[Record]:
    if categories is None:
        return records
    if categories.lower().endswith(MAPPINGS):
        entries = _read_mapping(Path(categories), CATEGORY_COLUMNS, "categories")
        texts = _look_up_all(entries, records, f"categories={categories}")
        return [
            dataclasses.replace(record, subject_text=_category(text) or record.subject_text)
            for record, text in zip(records, texts, strict=True)
        ]
    if is_table and any(record.subject_text for record in records):
        # the word named a column, and _from_table has read it
        return records
    return [dataclasses.replace(record, subject_text=_category(categories)) for record in records]


def _read_rows(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns in lower case, and the rows by these names.

    Raises:
        ValueError: not readable as what its suffix says, or rows that are no rows; names the file and the line.
    """
    suffix = table.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return _read_csv(table)
        if suffix == ".parquet":
            return _read_parquet(table)
        text = table.read_text("utf-8-sig")
        rows = _json_lines(text) if suffix == ".jsonl" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: is not UTF-8 ({error}); save it as UTF-8") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: cannot be read as {suffix}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{table}: expected a list of objects, one a photograph")
    rows = [{str(name).strip().lower(): value for name, value in row.items()} for row in rows]
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    # not splitlines: JSON leaves U+2028 and its like as they are
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(f"line {number} of the file: {error.msg}", error.doc, error.pos) from error
    return rows


def _read_csv(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        # spreadsheets write semicolons where the comma is the decimal mark
        delimiter = max(",;\t", key=head.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        columns = [name.strip().lower() for name in next(reader, [])]
        rows = []
        for cells in reader:
            if len(cells) > len(columns):
                raise ValueError(
                    f"{table}: line {reader.line_num} has {len(cells)} cells, the heading {len(columns)}; put text "
                    f"with a {delimiter!r} in it into double quotes"
                )
            if cells:
                rows.append(dict(zip(columns, cells, strict=False)))
    return columns, rows


def _read_parquet(table: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{table}: reading Parquet needs pyarrow: pip install 'blipdiff_train[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            types = {entry.name: entry.type for entry in file.schema_arrow}
            # photographs inside a table are not used, and would fill the memory
            large = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_struct)
            inside = [name for name, kind in types.items() if any(is_large(kind) for is_large in large)]
            rows = file.read(columns=[name for name in types if name not in inside]).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{table}: cannot be read as .parquet: {error}") from error
    marks = dict.fromkeys((name.lower() for name in inside), b"")
    return [name.strip().lower() for name in types], [
        {name.strip().lower(): value for name, value in row.items()} | marks for row in rows
    ]


MAPPINGS = (".csv", ".tsv", ".json", ".jsonl")


def _read_mapping(path: Path, value_columns: tuple[str, ...], key: str) -> dict[str, str]:
    """Path → text, from a JSON object or a table whose columns are named or are simply the first two."""
    if not path.is_file():
        raise ValueError(f"{key}={path}: no such file")
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{key}={path}: cannot be read as .json: {error}") from error
        if isinstance(value, dict):
            return {_printable(str(name)): str(text) for name, text in value.items() if text is not None}
    columns, rows = _read_rows(path)
    named = [next((name for name in names if name in columns), None) for names in (PATH_COLUMNS, value_columns)]
    path_column, text_column = (
        name or (columns[place] if place < len(columns) else None) for place, name in enumerate(named)
    )
    if text_column is None or text_column == path_column:
        expected = f"a path and one of {', '.join(value_columns)}"
        raise ValueError(f"{key}={path}: columns {', '.join(columns)}; expected {expected}")
    return {
        _printable(name): text
        for row in rows
        if (name := _first(row, (path_column,))) and (text := _first(row, (text_column,)))
    }


def _look_up_all(entries: Mapping[str, str], records: Sequence[Record], what: str) -> list[str | None]:
    """The entry of each record.

    Raises:
        ValueError: none has any; shows a name of both sides.
    """
    texts = [_look_up(entries, record.name) for record in records]
    if not any(texts):
        there = f"its first entry is {next(iter(entries))!r}" if entries else "it has no entries"
        raise ValueError(f"{what}: none of the photographs is in it; {there}, the first photograph {records[0].name!r}")
    return texts


def _look_up(entries: Mapping[str, str], name: str) -> str | None:
    """The entry of the file, of its name without suffix, or of the nearest folder above it."""
    path = PurePosixPath(name)
    for candidate in (
        name,
        path.with_suffix("").as_posix(),
        path.name,
        *(parent.as_posix() for parent in path.parents),
    ):
        if candidate in entries:
            return _clean(entries[candidate])
    return None


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the named cells that is not empty, where NaN is pandas's word for empty."""
    for name in names:
        value = row.get(name)
        if value not in (None, "", b"") and not (isinstance(value, float) and math.isnan(value)):
            return str(value)
    return None


def json_object(data: bytes) -> dict[str, Any]:
    """The object that ``data`` holds; an empty one where it holds none."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _bytes_of(folder: str, file: str) -> bytes:
    with open(os.path.join(folder, file), "rb") as opened:
        return opened.read(MAX_TEXT_BYTES)


def _folder_category(prefix: str) -> str | None:
    """Words of the innermost folder that has a letter in its name, of ``dog/2023/`` the dog."""
    for folder in reversed(prefix.split("/")):
        if category := _category(folder.replace("_", " ").replace("-", " ")):
            return category
    return None


def _category(text: str | None) -> str | None:
    cleaned = _clean(text)
    return cleaned if cleaned and any(letter.isalpha() for letter in cleaned) else None


def _clean(text: str | None) -> str | None:
    return unicodedata.normalize("NFC", " ".join(text.split())) or None if text is not None else None


def _printable(name: str) -> str:
    """A file's name as text: what is not UTF-8 escaped, and accents composed (macOS keeps them apart)."""
    try:
        data = os.fsencode(name)
    except UnicodeEncodeError:  # of a JSON file, and no file's name
        data = name.encode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", data.decode("utf-8", "backslashreplace"))
