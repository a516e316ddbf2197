"""Where everything lies in a tar: one bounded pass over its headers, kept as a small file beside it.

The pass never follows a link, never trusts a size and never reads a payload, so a hostile archive costs one 512-byte
block a member. What it accepts is what webdataset's writer makes: plain USTAR or PAX files, the members of one sample
contiguous. Everything else is refused with the archive, the member and the offset.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blipdiff_train.common.files import atomic_path

INDEX_SUFFIX = ".idx"
"""Appended to the tar's name."""

PICKLE_SUFFIXES = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "joblib", "dill"})
"""Members that webdataset or torch would unpickle: reading one may run code, so a shard that has one is refused."""

MAX_HEADER_BYTES = 65_536
"""Limit of a PAX or GNU long-name block; a path has at most 4096 bytes."""

MAX_MEMBERS = 4_000_000
MAX_INDEX_BYTES = 256 * 2**20

_BLOCK = 512
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")
_COLUMNS = (
    ("first_member", "<u4"),  # per sample, and one more: members of sample i are first_member[i] : first_member[i+1]
    ("key_end", "<u4"),  # per sample: end of its key in the key bytes
    ("suffix", "<u2"),  # per member
    ("offset", "<u8"),  # of the payload; its header is the block before
    ("size", "<u8"),
    ("header_crc", "<u4"),
)


class ShardError(ValueError):
    """A shard that cannot be used as it is; the message names it, the place and what to do."""


class Member(NamedTuple):
    """One file of a sample: payload at ``offset`` with ``size`` bytes; the CRCs guard header and (if known) payload."""

    suffix: str
    offset: int
    size: int
    header_crc: int
    payload_crc: int | None


@dataclass(frozen=True)
class TarIndex:
    """Members of one tar, grouped into samples; arrays as in :data:`_COLUMNS`.

    ``fingerprint`` is made of the tar's size, first and last 64 KiB: an index whose tar was replaced is recognised.
    ``payload_crc`` is there when the index was made together with the tar.
    """

    fingerprint: str
    tar_bytes: int
    suffixes: tuple[str, ...]
    first_member: np.ndarray
    key_end: np.ndarray
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    header_crc: np.ndarray
    keys: bytes
    payload_crc: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.first_member) - 1

    def key(self, number: int) -> str:
        start = int(self.key_end[number - 1]) if number else 0
        return self.keys[start : int(self.key_end[number])].decode("utf-8", "replace")

    def members(self, number: int) -> list[Member]:
        """The members of sample ``number``, in the order they lie in the tar."""
        first, last = int(self.first_member[number]), int(self.first_member[number + 1])
        return [
            Member(
                suffix=self.suffixes[int(self.suffix[m])],
                offset=int(self.offset[m]),
                size=int(self.size[m]),
                header_crc=int(self.header_crc[m]),
                payload_crc=None if self.payload_crc is None else int(self.payload_crc[m]),
            )
            for m in range(first, last)
        ]


def fingerprint(descriptor: int) -> str:
    """Size, first and last 64 KiB of an open file, hashed."""
    size = os.fstat(descriptor).st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    digest.update(os.pread(descriptor, 65_536, 0))
    digest.update(os.pread(descriptor, 65_536, max(0, size - 65_536)))
    return digest.hexdigest()


def scan_tar(path: str | Path | int, *, name: str | None = None, payload_crc: bool = False) -> TarIndex:
    """Read the headers of a tar into an index.

    Args:
        path: the tar, uncompressed, or an open descriptor of it.
        name: what to call it in errors, e.g. its URL; its path if None.
        payload_crc: also read every payload and keep its CRC-32, so that later readers notice decay.

    Raises:
        ShardError: cut off, a size beyond the end, links, devices, sparse files, names with ``..``, pickled members,
            keys that come back later (interleaved) or twice (duplicates), too many members, not a tar.
        OSError: the file cannot be read.
    """
    name = name or str(path)
    if isinstance(path, int):
        return _scan(path, name, payload_crc)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _scan(descriptor, name, payload_crc)
    finally:
        os.close(descriptor)


def _scan(descriptor: int, name: str, with_payload_crc: bool) -> TarIndex:
    tar_bytes = os.fstat(descriptor).st_size
    suffix_numbers: dict[str, int] = {}
    first_member, key_end = [0], []
    suffixes, offsets, sizes, header_crcs, payload_crcs = [], [], [], [], []
    keys = bytearray()
    finished: dict[bytes, int] = {}  # digest of the key -> sample number; 16 bytes however long the key
    current_key, current_suffixes = None, set()
    position, long_name, pax = 0, None, {}
    num_headers = 0

    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if len(header) < _BLOCK:
            raise ShardError(
                f"{name}: cut off at byte {position} of {tar_bytes} after {len(offsets)} members: the end-of-archive "
                "mark is missing. Copy or write the shard again"
            )
        if header.count(0) == _BLOCK:
            break
        kind, member, size = _parse_header(header, name, position)
        num_headers += 1
        if num_headers > MAX_MEMBERS:
            raise ShardError(f"{name}: more than {MAX_MEMBERS} members; write smaller shards")
        payload = position + _BLOCK
        if kind in b"xgLK":
            if size > MAX_HEADER_BYTES:
                raise ShardError(f"{name}: extended header of {size} bytes at {position}, limit {MAX_HEADER_BYTES}")
            block = os.pread(descriptor, size, payload)
            if len(block) < size:
                raise ShardError(f"{name}: cut off inside the extended header at byte {position}")
            if kind == b"L":
                long_name = block.rstrip(b"\0").decode("utf-8", "replace")
            elif kind != b"K":
                records = _parse_pax(block, name, position)
                if any(field.startswith("GNU.sparse") for field in records):
                    raise ShardError(f"{name}: sparse member at byte {position}; write it as a plain file")
                if kind == b"x":
                    pax = records
                elif records.keys() & {"path", "size", "linkpath"}:
                    raise ShardError(f"{name}: global header at byte {position} changes path or size of every member")
            position = payload + _padded(size)
            continue
        member = pax.get("path", long_name or member)
        if "size" in pax:
            if not re.fullmatch(r"[0-9]{1,19}", pax["size"]):
                raise ShardError(f"{name}: member {member!r} has size {pax['size'][:40]!r} in its extended header")
            size = int(pax["size"])
        long_name, pax = None, {}

        if kind == b"5":
            _check_name(member, name, position)
            position = payload + _padded(size)
            continue
        if kind not in (b"0", b"\0", b"7"):
            what = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device"}
            what |= {b"6": "a FIFO", b"S": "a sparse file"}
            raise ShardError(
                f"{name}: member {member!r} at byte {position} is {what.get(kind, f'of unknown type {kind!r}')}; "
                "shards may hold plain files only"
            )
        _check_name(member, name, position)
        if payload + size > tar_bytes:
            raise ShardError(
                f"{name}: member {member!r} at byte {position} claims {size} bytes, but the file ends "
                f"{max(0, tar_bytes - payload)} bytes after its header: cut off, or its size is a lie. Write it again"
            )
        position = payload + _padded(size)

        match = _KEY_AND_SUFFIX.match(member)
        if match is None or _WEBDATASET_META.match(member):
            continue  # webdataset skips these too: no suffix, hidden, or its own metadata
        key, suffix = match[1], match[2].lower()
        if not PICKLE_SUFFIXES.isdisjoint(suffix.split(".")):
            raise ShardError(f"{name}: member {member!r} is a pickle; reading it could run code. Write without it")
        if key != current_key:
            digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in finished:
                earlier = finished[digest]
                raise ShardError(_repeated_key(name, key, suffix, earlier, first_member, suffixes, suffix_numbers))
            finished[digest] = len(key_end)
            if current_key is not None:
                first_member.append(len(offsets))
            current_key, current_suffixes = key, set()
            keys += key.encode("utf-8", "replace")
            key_end.append(len(keys))
        if suffix in current_suffixes:
            raise ShardError(f"{name}: member {member!r} is there twice (key {key!r}); write each key once")
        current_suffixes.add(suffix)
        number = suffix_numbers.setdefault(suffix, len(suffix_numbers))
        if number > 65_535:
            raise ShardError(f"{name}: more than 65535 different suffixes; is this a shard?")
        suffixes.append(number)
        offsets.append(payload)
        sizes.append(size)
        header_crcs.append(zlib.crc32(header))
        if with_payload_crc:
            payload_crcs.append(_crc_of(descriptor, payload, size))

    if current_key is not None:
        first_member.append(len(offsets))
    columns = {
        "first_member": first_member,
        "key_end": key_end,
        "suffix": suffixes,
        "offset": offsets,
        "size": sizes,
        "header_crc": header_crcs,
    }
    return TarIndex(
        fingerprint=fingerprint(descriptor),
        tar_bytes=tar_bytes,
        suffixes=tuple(suffix_numbers),
        keys=bytes(keys),
        payload_crc=np.array(payload_crcs, "<u4") if with_payload_crc else None,
        **{column: np.array(columns[column], dtype) for column, dtype in _COLUMNS},
    )


def _repeated_key(name, key, suffix, number, first_member, suffixes, suffix_numbers) -> str:
    """Interleaved (the sample goes on later) or duplicate (the same member again): the remedies differ."""
    end = first_member[number + 1] if number + 1 < len(first_member) else len(suffixes)
    names = {value: text for text, value in suffix_numbers.items()}
    earlier = {names[s] for s in suffixes[first_member[number] : end]}
    if suffix in earlier:
        return f"{name}: duplicate key {key!r} (sample {number} has .{suffix} already); give every sample its own key"
    return (
        f"{name}: interleaved key {key!r}: .{suffix} comes after other samples began, apart from sample {number}. "
        "Keep the members of a sample together, e.g. by `tar --sort=name`"
    )


def _parse_header(header: bytes, name: str, position: int) -> tuple[bytes, str, int]:
    """Type flag, member name and size of one 512-byte block."""
    checksum = _parse_number(header[148:156])
    rest = header[:148] + b" " * 8 + header[156:]  # the checksum field counts as spaces
    # old writers summed signed bytes
    if checksum != sum(rest) and checksum != sum(rest) - 256 * sum(byte > 127 for byte in rest):
        compressed = header[:2] == b"\x1f\x8b"
        hint = "a compressed tar cannot be read by offset: decompress it" if compressed else "write the shard again"
        raise ShardError(f"{name}: no valid tar header at byte {position}; {hint}")
    size = _parse_number(header[124:136])
    member = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace")
        member = f"{prefix}/{member}" if prefix else member
    if size is None or size < 0 or size >= 2**63:
        raise ShardError(f"{name}: member {member!r} at byte {position} has no readable size")
    return header[156:157], member, size


def _parse_number(field: bytes) -> int | None:
    """Octal digits, or GNU's base-256 for large values; None if neither."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - (1 << (8 * (len(field) - 1))) if field[0] == 0xFF else value
    text = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        return None
    return int(text or b"0", 8)


def _parse_pax(block: bytes, name: str, position: int) -> dict[str, str]:
    """Records ``"<length> <field>=<value>\\n"``."""
    records, start = {}, 0
    while start < len(block) and block[start] != 0:
        match = re.compile(rb"([0-9]{1,6}) ([^=]+)=").match(block, start)
        length = int(match[1]) if match else 0
        if not match or start + length > len(block) or start + length <= match.end() or block[start + length - 1] != 10:
            raise ShardError(f"{name}: broken extended header at byte {position}")
        value = block[match.end() : start + length - 1]
        records[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        start += length
    return records


def _check_name(member: str, name: str, position: int) -> None:
    if member.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member) or "\0" in member:
        raise ShardError(f"{name}: member {member!r} at byte {position} points outside the archive")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _crc_of(descriptor: int, offset: int, size: int) -> int:
    crc, end = 0, offset + size
    while offset < end:
        block = os.pread(descriptor, min(1 << 20, end - offset), offset)
        if not block:
            break
        crc = zlib.crc32(block, crc)
        offset += len(block)
    return crc


# ------------------------------------------------------------------------------------------------ the index file


def write_index(index: TarIndex, path: str | Path) -> None:
    """A line of JSON (what and how many), then the columns as little-endian bytes, then the keys.

    Raises:
        OSError: the folder cannot be written.
    """
    columns = [np.ascontiguousarray(getattr(index, column), dtype).tobytes() for column, dtype in _COLUMNS]
    if index.payload_crc is not None:
        columns.append(np.ascontiguousarray(index.payload_crc, "<u4").tobytes())
    body = b"".join([*columns, index.keys])
    head = {
        "blipdiff_index": 1,
        "samples": len(index),
        "members": len(index.offset),
        "suffixes": list(index.suffixes),
        "tar_bytes": index.tar_bytes,
        "fingerprint": index.fingerprint,
        "payload_crc": index.payload_crc is not None,
        "key_bytes": len(index.keys),
        "body_crc": zlib.crc32(body),
    }
    with atomic_path(path) as temporary:
        temporary.write_bytes(json.dumps(head).encode() + b"\n" + body)


def read_index(path: str | Path) -> TarIndex:
    """An index from its file; every offset is checked against the size it states.

    Raises:
        ShardError: damaged, of another version, or not an index.
        OSError: the file cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise ShardError(f"{path}: an index of {size} bytes, limit {MAX_INDEX_BYTES}")
    data = path.read_bytes()
    try:
        line, body = data.split(b"\n", 1)
        head = json.loads(line)
        if head["blipdiff_index"] != 1 or zlib.crc32(body) != head["body_crc"]:
            raise ValueError("other version or damaged")
        num_samples, num_members = int(head["samples"]), int(head["members"])
        lengths = {"first_member": num_samples + 1, "key_end": num_samples}
        arrays, start = {}, 0
        columns = [*_COLUMNS, ("payload_crc", "<u4")] if head["payload_crc"] else list(_COLUMNS)
        for column, dtype in columns:
            count = lengths.get(column, num_members)
            end = start + count * np.dtype(dtype).itemsize
            if count < 0 or end > len(body):
                raise ValueError(f"{column} ends beyond the file")
            arrays[column] = np.frombuffer(body[start:end], dtype)
            start = end
        index = TarIndex(
            fingerprint=str(head["fingerprint"]),
            tar_bytes=int(head["tar_bytes"]),
            suffixes=tuple(str(suffix) for suffix in head["suffixes"]),
            keys=body[start:],
            **arrays,
        )
        _check_index(index)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: not a usable index ({error}); delete it and it is made again") from error
    return index


def _check_index(index: TarIndex) -> None:
    first, ends = index.first_member.astype(np.int64), index.key_end.astype(np.int64)
    good = first[0] == 0 and first[-1] == len(index.offset) and bool(np.all(np.diff(first) > 0))
    good = good and bool(np.all(np.diff(ends, prepend=0) > 0))
    good = good and (int(ends[-1]) if len(ends) else 0) == len(index.keys)
    good = good and (len(index.suffix) == 0 or int(index.suffix.max()) < len(index.suffixes))
    good = good and bool(np.all(index.size < 2**62)) and bool(np.all(index.offset < 2**62))
    good = good and bool(np.all(index.offset >= _BLOCK)) and bool(np.all(index.offset + index.size <= index.tar_bytes))
    pickled = any(not PICKLE_SUFFIXES.isdisjoint(suffix.split(".")) for suffix in index.suffixes)
    if not good or pickled:
        raise ValueError("its numbers contradict each other" if not good else "it lists pickled members")
