"""Shards: plain WebDataset tars, written whole or not at all, read at random through an index.

One sample is a run of members with one key: ``KEY.jpg``, ``KEY.json``, ``KEY.alpha.png`` … (table in docs/data.md's
"Shards"). The writer is webdataset's own, so any webdataset reader reads them; the reader never unpickles, never runs a
URL as a command and never reads more than a member may have.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from blipdiff_train.common.files import atomic_path
from blipdiff_train.data.cache import ShardCache, protocol, read_remote_file
from blipdiff_train.data.tar_index import (
    INDEX_SUFFIX,
    MAX_INDEX_BYTES,
    Member,
    ShardError,
    TarIndex,
    fingerprint,
    read_index,
    scan_tar,
    write_index,
)

# webdataset reads this when it is imported: without it, opening "pipe:…" would run a command
os.environ["WDS_SECURE"] = "1"

MAX_MEMBER_BYTES = 128 * 2**20
"""No photograph below the pixel limit needs more; a larger member is refused before memory is asked for."""

MAX_SAMPLE_BYTES = 256 * 2**20
"""Limit of all members of a sample that are read at once."""

MAX_TEXT_BYTES = 2**20
"""Limit of ``.json`` and ``.txt`` members."""

MAX_SHARDS = 1_000_000

_READ_ATTEMPTS = 3
_TEXT_SUFFIXES = ("json", "txt")


class SampleError(ValueError):
    """One bad sample. ``cause`` is a short word to count by; the message names shard and key."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return type(self), (self.cause, str(self))


# ------------------------------------------------------------------------------------------------------- writing


def write_shards(
    samples: Iterable[Mapping[str, object]],
    directory: str | Path,
    *,
    prefix: str = "shard",
    samples_per_shard: int = 1000,
    max_shard_bytes: int = 10**9,
    overwrite: bool = False,
) -> list[Path]:
    """Write samples to ``directory/prefix-000000.tar`` … with an index beside each.

    Each shard appears complete or not at all: it is written under a temporary name, read back, flushed and renamed. The
    same samples give the same bytes.

    Args:
        samples: each a mapping with ``"__key__"`` and one entry per member, suffix without its first dot
            (``{"__key__": "000001", "jpg": b"…", "json": {…}, "alpha.png": b"…"}``). bytes are stored as they are, str
            as UTF-8, a mapping or list as JSON.
        directory: made if it is not there.
        prefix: of the file names.
        samples_per_shard, max_shard_bytes: a shard is closed when it reaches either.
        overwrite: replace shards of that prefix; otherwise they are an error.

    Returns:
        The paths, in order; none when there are no samples.

    Raises:
        ValueError: shards exist, a key is missing, empty, unsafe or twice, a value of another type.
        OSError: the directory cannot be written; shards finished before stay.
    """
    import webdataset

    directory = Path(directory)
    if samples_per_shard < 1 or max_shard_bytes < 1:
        raise ValueError(f"samples_per_shard={samples_per_shard}, max_shard_bytes={max_shard_bytes}: expected ≥ 1")
    if "%" in prefix or "/" in prefix or not prefix:
        raise ValueError(f"prefix {prefix!r}: expected a plain file name")
    directory.mkdir(parents=True, exist_ok=True)
    existing = sorted(directory.glob(f"{glob.escape(prefix)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"))
    if existing and not overwrite:
        raise ValueError(f"{directory} has {len(existing)} shards {prefix}-*.tar; choose another folder or overwrite")
    transaction = _ShardTransaction()
    writer = None
    keys: set[bytes] = set()
    try:
        for sample in samples:
            record = _encode(sample, keys)
            if writer is None:  # made with the first sample, because the writer opens a shard at once
                writer = webdataset.ShardWriter(
                    str(directory / f"{prefix.replace('%', '%%')}-%06d.tar"),
                    maxcount=samples_per_shard,
                    maxsize=max_shard_bytes,
                    opener=transaction.open,
                    post=transaction.publish,
                    verbose=0,
                    encoder=False,
                    mtime=0,
                    format="PAX_FORMAT",
                )
            writer.write(record)
        if writer is not None:
            writer.close()
    except BaseException:
        transaction.abort(writer)
        raise
    for old in existing:
        if old not in transaction.published:
            old.unlink(missing_ok=True)
            Path(f"{old}{INDEX_SUFFIX}").unlink(missing_ok=True)
    return transaction.published


class _ShardTransaction:
    """One shard at a time: opened under a temporary name, published by fsync and rename."""

    def __init__(self):
        self.published: list[Path] = []
        self._pending = None

    def open(self, name: str):
        context = atomic_path(name)
        temporary = context.__enter__()
        file = temporary.open("wb")
        self._pending = (Path(name), context, temporary, file)
        return file

    def publish(self, name: str) -> None:
        path, context, temporary, file = self._pending
        file.close()
        index = scan_tar(temporary, name=str(path), payload_crc=True)
        # the old index must not stand beside the new shard, should the machine stop between the two renames
        Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)
        self._pending = None
        context.__exit__(None, None, None)
        write_index(index, f"{path}{INDEX_SUFFIX}")
        self.published.append(path)

    def abort(self, writer) -> None:
        """Drop the unfinished shard; the ones before it stay."""
        if self._pending is None:
            return
        _, context, temporary, file = self._pending
        self._pending = None
        with suppress(OSError, ValueError):  # a full disk fails here again
            if getattr(writer, "tarstream", None) is not None and not file.closed:
                writer.tarstream.close()
            file.close()
        temporary.unlink(missing_ok=True)
        context.gen.close()


def _encode(sample: Mapping[str, object], keys: set[bytes]) -> dict[str, object]:
    key = sample.get("__key__")
    if not isinstance(key, str) or not key or "." in key or key.startswith("/") or "\\" in key or not key.isprintable():
        raise ValueError(f"sample key {key!r}: expected a non-empty printable str without dots and backslashes")
    if key.startswith("__") or "//" in key or key.endswith("/"):
        raise ValueError(f"sample key {key!r}: names of this form are webdataset's own or no file names")
    digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
    if digest in keys:
        raise ValueError(f"sample key {key!r} comes twice; every sample needs its own")
    keys.add(digest)
    record: dict[str, object] = {"__key__": key}
    for suffix, value in sample.items():
        if suffix.startswith("__"):
            continue
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*", suffix):
            raise ValueError(f"sample {key!r} has a member {suffix!r}: expected a lower-case suffix such as 'jpg'")
        try:
            record[suffix] = member_bytes(value)
        except TypeError as error:
            raise ValueError(f"sample {key!r}, member {suffix!r}: {error}") from None
    if len(record) == 1:
        raise ValueError(f"sample {key!r} has no members")
    return record


def member_bytes(value: object) -> bytes:
    """What a member holds on the disk: bytes as they are, str as UTF-8, a mapping or list as JSON.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, (Mapping, list)):
        value = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise TypeError(f"{type(value).__name__}, expected bytes, str, mapping or list")
    return bytes(value)


# ------------------------------------------------------------------------------------------------------- reading


def expand(shards: str | Sequence[str]) -> list[str]:
    """Paths and URLs from what a user writes: a folder, a glob, ``shard-{000..010}.tar``, a URL, or a list of these.

    Local paths must exist. A folder gives its ``*.tar`` sorted by name; nothing else is sorted but globs.

    Raises:
        ShardError: nothing matches, a protocol that is not read, a compressed tar, one shard named twice.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    found: list[str] = []
    for pattern in map(os.fspath, patterns):
        scheme = protocol(pattern)
        # counted first: the expansion makes its whole list in memory
        ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
        if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
            raise ShardError(f"{pattern}: more than {MAX_SHARDS} shards")
        try:
            names = list(islice(braceexpand(pattern), MAX_SHARDS + 1))
        except UnbalancedBracesError as error:
            raise ShardError(f"{pattern}: unbalanced braces") from error
        if len(found) + len(names) > MAX_SHARDS:
            raise ShardError(f"{pattern}: more than {MAX_SHARDS} shards")
        if scheme is not None:
            found += names
            continue
        for name in names:
            found += _expand_local(name.removeprefix("file://").removeprefix("file:"), pattern)
    if not found:
        raise ShardError("no shards given; expected a folder, a glob, 'shard-{000..010}.tar' or URLs")
    for name in found:
        if not name.split("?", 1)[0].endswith(".tar"):
            raise ShardError(f"{name}: expected an uncompressed .tar; a compressed one cannot be read by offset")
    seen: set[str] = set()
    for name in found:
        if name in seen:
            raise ShardError(f"{name}: named twice; its samples would count double. Use mixing weights for that")
        seen.add(name)
    return found


def _expand_local(name: str, pattern: str) -> list[str]:
    if os.path.isdir(name):
        names = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not names:
            raise ShardError(f"{name}: the folder has no *.tar")
        return names
    if os.path.exists(name):
        return [name]
    names = sorted(glob.glob(name))
    if not names:
        raise ShardError(f"{name}: no such shard" + (f" (from {pattern})" if pattern != name else ""))
    return names


@dataclass
class Shard:
    """One tar: its path or URL, how many samples it has, and where its index lies (None: kept in ``index``)."""

    name: str
    num_samples: int
    index_path: str | None
    index: TarIndex | None = field(default=None, repr=False)


class ShardSet:
    """Samples of many shards as one indexed sequence; read at random, from any process.

    Opening reads (or makes) every index and checks it against its shard; all bad shards are reported at once. Content
    that turns out bad later is a :class:`SampleError`, a shard that cannot be opened any more an ``OSError``: the first
    is a property of the data and may be replaced, the second is not, and replacing it would make a run unrepeatable.

    Args:
        shards: see :func:`expand`.
        cache: where remote shards are kept; needed for URLs.
        index_dir: where indexes go whose shard's folder cannot be written; in memory if None.
        max_open: shards held open in a process.

    Raises:
        ShardError: no shards, or unusable ones, each named with its reason.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        cache: ShardCache | None = None,
        index_dir: str | Path | None = None,
        max_open: int = 96,
    ):
        self.cache = cache
        self.index_dir = Path(index_dir) if index_dir else (cache.directory if cache else None)
        self.max_open = max_open
        self.shards: list[Shard] = []
        problems: list[str] = []
        for name in expand(shards):
            try:
                self.shards.append(self._open_shard(name))
            except (ShardError, OSError) as error:
                problems.append(str(error))
        if problems:
            listed = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
            total = len(problems) + len(self.shards)
            raise ShardError(f"{len(problems)} of {total} shards cannot be used:\n  {listed}")
        self.sizes = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._contents: dict[int, str] = {}
        self._forget()

    def _forget(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, TarIndex] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for name in ("_descriptors", "_indexes"):
            state[name] = OrderedDict()  # descriptors belong to one process
        return state

    def __del__(self):
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in getattr(self, "_descriptors", {}).values():
                os.close(descriptor)

    def fingerprint(self) -> str:
        """Names and sample counts of all shards, hashed: what the order depends on besides the seed."""
        text = "\n".join(f"{os.path.basename(shard.name)}\t{shard.num_samples}" for shard in self.shards)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def locate(self, index: int) -> tuple[int, int]:
        """Shard number and number inside the shard of sample ``index``.

        Raises:
            IndexError: outside 0..len-1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - (self._ends[shard] - self.sizes[shard]))

    def key(self, index: int) -> str:
        shard, number = self.locate(index)
        return self._index(shard).key(number)

    def content(self, shard: int) -> str:
        """A short hash of what the index knows of a shard: names, sizes, times, and checksums where it has them."""
        if shard not in self._contents:
            index = self._index(shard)
            digest = hashlib.blake2b(index.fingerprint.encode() + index.keys, digest_size=6)
            for column in (index.first_member, index.offset, index.size, index.header_crc, index.payload_crc):
                digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
            self._contents[shard] = digest.hexdigest()
        return self._contents[shard]

    def suffixes(self, index: int) -> list[str]:
        """Suffixes of the members of sample ``index``, from the index alone."""
        shard, number = self.locate(index)
        return [member.suffix for member in self._index(shard).members(number)]

    def read(self, index: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes | str]:
        """Members of sample ``index``: suffix → bytes, with ``"__key__"`` and ``"__shard__"`` as str.

        Args:
            index: 0..len-1.
            suffixes: members wanted; all if None. Those that are not there are left out.

        Raises:
            SampleError: a member is too large, cut off, or not what the index says.
            OSError: the shard cannot be opened or read, after several attempts.
        """
        shard, number = self.locate(index)
        tar = self._index(shard)
        name, key = self.shards[shard].name, tar.key(number)
        members = tar.members(number)
        if suffixes is not None:
            members = [member for member in members if member.suffix in suffixes]
        for member in members:
            limit = MAX_TEXT_BYTES if member.suffix in _TEXT_SUFFIXES else MAX_MEMBER_BYTES
            if member.size > limit:
                message = f"{name}: {key}.{member.suffix} has {member.size} bytes, limit {limit}"
                raise SampleError("member too large", message)
        if sum(member.size for member in members) > MAX_SAMPLE_BYTES:
            raise SampleError("member too large", f"{name}: {key} has more than {MAX_SAMPLE_BYTES} bytes in all")
        sample: dict[str, bytes | str] = {"__key__": key, "__shard__": name}
        for group in _neighbours(members):
            start = group[0].offset - 512
            block = self._pread(shard, group[-1].offset + group[-1].size - start, start)
            for member in group:
                offset = member.offset - start
                sample[member.suffix] = _checked(block, offset, member, name, key)
        return sample

    def _pread(self, shard: int, length: int, offset: int) -> bytes:
        """Bytes of a shard; a hiccup of the file system is retried, a lasting fault is an error naming the shard."""
        for attempt in range(_READ_ATTEMPTS):
            try:
                return os.pread(self._descriptor(shard), length, offset)
            except OSError as error:
                self._close(shard)
                if attempt == _READ_ATTEMPTS - 1:
                    raise OSError(
                        error.errno,
                        f"shard {self.shards[shard].name} could be read at the start and cannot be read now "
                        f"({error.strerror}). Nothing is replaced, because a later run would differ: bring it back and "
                        "start the same command again; it continues where it stopped",
                    ) from error
                time.sleep(0.1 * 5**attempt)
        raise AssertionError("unreachable")

    def _descriptor(self, shard: int) -> int:
        if self._process != os.getpid():  # forked: the parent's descriptors stay the parent's
            self._forget()
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        name = self.shards[shard].name
        descriptor = os.open(name, os.O_RDONLY) if protocol(name) is None else self._cache(name).open(name)
        self._descriptors[shard] = descriptor
        while len(self._descriptors) > self.max_open:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor

    def _close(self, shard: int) -> None:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def _cache(self, name: str) -> ShardCache:
        if self.cache is None:
            raise ShardError(f"{name}: remote shards need a cache folder (data.cache)")
        return self.cache

    def _index(self, shard: int) -> TarIndex:
        if self.shards[shard].index is not None:
            return self.shards[shard].index
        if shard not in self._indexes:
            try:
                self._indexes[shard] = read_index(self.shards[shard].index_path)
            except (OSError, ShardError):  # deleted or damaged since: it can be made again
                self._indexes[shard] = self._make_index(self.shards[shard].name)
            if len(self._indexes[shard]) != self.shards[shard].num_samples:
                raise OSError(f"shard {self.shards[shard].name} was replaced during the run by one of another length")
            while len(self._indexes) > 2 * self.max_open:
                self._indexes.popitem(last=False)
        else:
            self._indexes.move_to_end(shard)
        return self._indexes[shard]

    # ------------------------------------------------------------------------------------------------ opening

    def _open_shard(self, name: str) -> Shard:
        if protocol(name) is None:
            candidates = [Path(f"{name}{INDEX_SUFFIX}")]
            if self.index_dir is not None:
                candidates.append(self._spare_index_path(name))
            descriptor = os.open(name, os.O_RDONLY)
            try:
                mark = fingerprint(descriptor)
            finally:
                os.close(descriptor)
        else:
            candidates, mark = [self._cache(name).index_path(name)], None
            if not candidates[0].exists():
                remote = read_remote_file(name + INDEX_SUFFIX, max_bytes=MAX_INDEX_BYTES)
                if remote is not None:
                    with atomic_path(candidates[0]) as temporary:
                        temporary.write_bytes(remote)
        for path in candidates:
            if not path.is_file():
                continue
            try:
                index = read_index(path)
            except (ShardError, OSError):
                continue  # damaged: made anew below
            if mark is None or index.fingerprint == mark:
                return Shard(name, len(index), str(path))
        index = self._make_index(name)
        for path in candidates:
            try:
                write_index(index, path)
                return Shard(name, len(index), str(path))
            except OSError:
                continue  # a read-only folder: try the next place
        return Shard(name, len(index), None, index)

    def _spare_index_path(self, name: str) -> Path:
        digest = hashlib.blake2b(os.path.abspath(name).encode(), digest_size=12).hexdigest()
        return self.index_dir / f"{digest}{INDEX_SUFFIX}"

    def _make_index(self, name: str) -> TarIndex:
        if protocol(name) is None:
            return scan_tar(name)
        descriptor = self._cache(name).open(name)
        try:
            return scan_tar(descriptor, name=name)
        finally:
            os.close(descriptor)


def _neighbours(members: list[Member], *, gap: int = 65_536) -> Iterator[list[Member]]:
    """Members that lie close enough to be read in one piece."""
    group: list[Member] = []
    for member in members:
        if group and not 0 <= member.offset - (group[-1].offset + group[-1].size) <= gap:
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _checked(block: bytes, offset: int, member: Member, name: str, key: str) -> bytes:
    """The member's bytes out of what was read, after comparing header and content with the index."""
    data = block[offset : offset + member.size]
    if len(data) < member.size:
        raise SampleError("cut off", f"{name}: {key}.{member.suffix} ends after {len(data)} of {member.size} bytes")
    if zlib.crc32(block[offset - 512 : offset]) != member.header_crc:
        raise SampleError("stale index", f"{name}: {key}.{member.suffix} is not where the index says; delete the index")
    if member.payload_crc is not None and zlib.crc32(data) != member.payload_crc:
        raise SampleError("checksum", f"{name}: {key}.{member.suffix} changed since it was written")
    return data
