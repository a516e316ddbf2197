"""What is made for samples after their shards were written, kept beside the shards: mattes and latents.

An entry belongs to one sample and one set of settings. Its file is ``NAME-SETTINGS/SHARD-CONTENT/NUMBER.entry``, where
SETTINGS is a hash of all that decides what is in it and CONTENT one of the shard it was made from: an entry of other
settings or another shard is not found, so it cannot be used by mistake, and is made anew. Files appear whole or not at
all, and two processes that make the same entry write the same bytes, so nobody needs a lock.

In a file stand a checksum of all the rest, a line of JSON (of which sample and settings, which members, how long, or
why there are none), and the members.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blipdiff_train.common.files import atomic_path, write_json
from blipdiff_train.data.cache import protocol
from blipdiff_train.data.shards import MAX_SAMPLE_BYTES, SampleError, ShardSet

FOLDER = ".made"
"""Beside the shards; hidden, so that a folder of shards stays a folder of shards."""

SETTINGS = "settings.json"
_SUFFIX = ".entry"
_MAX_ENTRY_BYTES = MAX_SAMPLE_BYTES + 65_536

Members = Mapping[str, bytes]


class SampleStore:
    """Members made for samples, by settings.

    Args:
        name: what is kept, e.g. ``latents``.
        settings: everything that decides the content of an entry; plain data.
        folder: of the store; None puts it beside each shard, for remote shards into their cache.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], folder: str | Path | None = None):
        self.name, self.settings = name, json.loads(json.dumps(settings))
        text = json.dumps(self.settings, sort_keys=True)
        self.key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.folder = Path(folder) if folder is not None else None
        self._described: set[Path] = set()

    def read(self, shards: ShardSet, index: int) -> dict[str, bytes] | None:
        """The members made for a sample; None if there are none yet, or the file is damaged.

        Raises:
            SampleError: the sample was found to be bad when they were to be made.
        """
        path = self._path(shards, index)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                data = file.read(size) if size <= _MAX_ENTRY_BYTES else b""
        except FileNotFoundError:
            return None
        try:
            if int(data[:8], 16) != zlib.crc32(data[8:]):
                return None
            line, body = data[8:].split(b"\n", 1)
            head = json.loads(line)
            if head["settings"] != self.key or head["sample"] != shards.key(index):
                return None
            fault = None if head["fault"] is None else SampleError(str(head["fault"][0]), str(head["fault"][1]))
            members, start = {}, 0
            for suffix, length in head["members"]:
                members[str(suffix)] = body[start : start + length]
                start += len(members[str(suffix)])
            if start != len(body):
                return None
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if fault is not None:
            raise fault
        return members

    def need(self, shards: ShardSet, index: int) -> dict[str, bytes]:
        """:meth:`read` where an entry must be: a damaged one is removed, so that the next start makes it anew.

        Raises:
            SampleError: see :meth:`read`.
            FileNotFoundError: there is none, or it was damaged. Another sample in its place would be another run.
        """
        members = self.read(shards, index)
        if members is not None:
            return members
        path = self._path(shards, index)
        what = "is damaged and was removed" if path.exists() else "is not there any more"
        path.unlink(missing_ok=True)
        raise FileNotFoundError(f"{path} {what}: start the same command again, it makes what is missing and continues")

    def write(self, shards: ShardSet, index: int, made: Members | SampleError) -> None:
        """Keep what was made for a sample, or why nothing can be.

        Raises:
            OSError: the folder cannot be written; says where, and how to choose another.
        """
        fault = [made.cause, str(made)[:4000]] if isinstance(made, SampleError) else None
        members = {} if isinstance(made, SampleError) else made
        head = {
            "settings": self.key,
            "sample": shards.key(index),
            "fault": fault,
            "members": [[suffix, len(data)] for suffix, data in members.items()],
        }
        content = json.dumps(head).encode() + b"\n" + b"".join(members.values())
        path = self._path(shards, index)
        try:
            self._describe(path.parent.parent)
            with atomic_path(path) as temporary:
                temporary.write_bytes(b"%08x" % zlib.crc32(content) + content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path.parent}: what is made for samples cannot be kept there ({error.strerror}); make room, or name "
                "another folder with data.store=…",
            ) from error

    def has(self, shards: ShardSet, index: int) -> bool:
        """Whether a sample has an entry."""
        return self._path(shards, index).exists()

    def where(self, shards: ShardSet, index: int) -> Path:
        """The folder of a sample's entry."""
        return self._path(shards, index).parent

    def missing(self, shards: ShardSet, indices: Iterable[int]) -> list[int]:
        """Those of ``indices`` that have no entry: one look into the folder of each shard, not one at each sample."""
        there: dict[int, set[str]] = {}
        found = []
        for index in indices:
            shard, number = shards.locate(index)
            if shard not in there:
                there[shard] = set()
                with suppress(FileNotFoundError), os.scandir(self._folder(shards, shard)) as entries:
                    there[shard] = {entry.name for entry in entries}
            if _file_name(number) not in there[shard]:
                found.append(index)
        return found

    def others(self, shards: ShardSet) -> list[str]:
        """Stores of the same name and other settings beside the first shard, each with what is different there."""
        root = self._root(shards, 0)
        lines = []
        for path in sorted(root.glob(f"{self.name}-*/{SETTINGS}")):
            try:
                settings = json.loads(path.read_text("utf-8"))
                different = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
            except (OSError, ValueError, TypeError):
                continue
            if different:
                words = (f"{k} {_short(settings.get(k))}, now {_short(self.settings.get(k))}" for k in different)
                lines.append(f"{path.parent}: {'; '.join(words)}")
        return lines

    def _describe(self, folder: Path) -> None:
        """``settings.json`` in the store's folder: for people, and to say what is different elsewhere."""
        if folder not in self._described:
            if not (folder / SETTINGS).is_file():
                write_json(folder / SETTINGS, self.settings)
            self._described.add(folder)

    def _root(self, shards: ShardSet, shard: int) -> Path:
        if self.folder is not None:
            return self.folder
        name = shards.shards[shard].name
        if protocol(name) is not None:
            return shards.cache.directory / FOLDER
        return Path(name).parent / FOLDER

    def _path(self, shards: ShardSet, index: int) -> Path:
        shard, number = shards.locate(index)
        return self._folder(shards, shard) / _file_name(number)

    def _folder(self, shards: ShardSet, shard: int) -> Path:
        stem = os.path.basename(shards.shards[shard].name.split("?", 1)[0]).removesuffix(".tar")
        return self._root(shards, shard) / f"{self.name}-{self.key}" / f"{stem}-{shards.content(shard)}"


def _file_name(number: int) -> str:
    return f"{number:06d}{_SUFFIX}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
