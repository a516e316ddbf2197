"""Remote shards as local files: whole shards, a bounded folder, safe with many workers.

A shard is downloaded to a temporary name, checked against its stated size and renamed, under a lock of its own, so
that of all workers of a machine one downloads and the others wait. The least recently used shards make room. A file
that is opened stays readable when it is evicted, so :meth:`ShardCache.open` hands out open descriptors, not paths.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from blipdiff_train.common.files import atomic_path
from blipdiff_train.data.tar_index import ShardError

PROTOCOLS = frozenset(
    {
        "http",
        "https",
        "s3",
        "s3a",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "adl",
        "hf",
        "hdfs",
        "webhdfs",
        "oci",
        "oss",
        "memory",
    }
)
"""fsspec protocols that only move bytes. Anything else (``pipe:``, ``python:``, chained ``a::b``) is refused."""

_ATTEMPTS = 4


def protocol(url: str) -> str | None:
    """The protocol of a URL, or None for a local path.

    Raises:
        ShardError: a protocol outside :data:`PROTOCOLS`, or a command.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.\-]+):", url)
    if match is None:
        if "::" in url or url.startswith("|"):
            raise ShardError(f"{url}: not a path; expected a local path or a URL of {', '.join(sorted(PROTOCOLS))}")
        return None
    name = match[1].lower()
    if name == "file":
        return None
    if name == "pipe":
        raise ShardError(f"{url}: pipe: URLs run commands and are refused; download the shards, or give their own URL")
    if name not in PROTOCOLS or "::" in url:
        raise ShardError(f"{url}: {name!r} is not among the protocols read: {', '.join(sorted(PROTOCOLS))}")
    return name


class ShardCache:
    """A folder of downloaded shards, kept below a size.

    Args:
        directory: the folder; shared by all workers and ranks of a machine.
        max_bytes: upper limit of what it holds. Downloads under way come on top: one shard a worker at most.
    """

    def __init__(self, directory: str | Path, max_bytes: int = 100 * 2**30):
        self.directory, self.max_bytes = Path(directory), int(max_bytes)
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: expected a size in bytes")

    def open(self, url: str) -> int:
        """A read-only descriptor of the shard at ``url``, downloaded first if it is not here; the caller closes it.

        Raises:
            ShardError: it cannot be downloaded, or it alone is larger than the cache.
        """
        path = self.path(url)
        for _ in range(_ATTEMPTS):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._download(url, path)
                continue  # another worker may evict it between rename and open: try again
            now = time.time_ns()
            with suppress(FileNotFoundError):
                os.utime(path, ns=(now, now))  # what least recently used goes by
            return descriptor
        raise ShardError(
            f"{url}: evicted {_ATTEMPTS} times while it was opened; {self.max_bytes} bytes of cache are too few"
        )

    def path(self, url: str) -> Path:
        """Where the shard at ``url`` lies when it is here."""
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", url.rsplit("/", 1)[-1])[-80:] or "shard"
        return self.directory / f"{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}-{stem}.shard"

    def index_path(self, url: str) -> Path:
        """Where the index of ``url`` is kept; it outlives the shard's eviction."""
        return self.path(url).with_suffix(".idx")

    def _download(self, url: str, path: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(str(path) + ".lock"):
            if path.exists():
                return
            for attempt in range(_ATTEMPTS):
                try:
                    self._fetch(url, path)
                    return
                except FileNotFoundError as error:
                    raise ShardError(f"{url}: no such shard ({error})") from error
                except ShardError:
                    raise
                except Exception as error:  # every protocol has its own kinds of error
                    if attempt == _ATTEMPTS - 1:
                        raise ShardError(f"{url}: cannot be downloaded after {_ATTEMPTS} attempts: {error}") from error
                    time.sleep(0.2 * 4**attempt)

    def _fetch(self, url: str, path: Path) -> None:
        file_system, inner = _file_system(url)
        expected = file_system.size(inner)
        if expected is not None and expected > self.max_bytes:
            raise ShardError(f"{url}: {expected} bytes, more than the cache of {self.max_bytes}; raise its limit")
        self._make_room(expected or 0)
        with atomic_path(path) as temporary:
            with file_system.open(inner, "rb") as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            found = temporary.stat().st_size
            if expected is not None and found != expected:
                raise OSError(f"got {found} of {expected} bytes")
            if found > self.max_bytes:
                raise ShardError(f"{url}: {found} bytes, more than the cache of {self.max_bytes}; raise its limit")
        self._make_room(0, keep=path)

    def _make_room(self, num_bytes: int, keep: Path | None = None) -> None:
        """Delete the least recently used shards until ``num_bytes`` more fit."""
        with FileLock(str(self.directory / "eviction.lock")):
            shards = []
            for file in self.directory.glob("*.shard"):
                try:
                    status = file.stat()
                except FileNotFoundError:
                    continue
                shards.append((status.st_mtime_ns, status.st_size, file))
            total = sum(size for _, size, _ in shards)
            for _, size, file in sorted(shards):
                if total + num_bytes <= self.max_bytes:
                    return
                if file != keep:
                    file.unlink(missing_ok=True)
                    total -= size


def read_remote_file(url: str, *, max_bytes: int) -> bytes | None:
    """A small remote file, or None when it is not there, too large or cannot be read."""
    try:
        file_system, inner = _file_system(url)
        if not file_system.exists(inner):
            return None
        with file_system.open(inner, "rb") as file:
            data = file.read(max_bytes + 1)
    except Exception:  # optional by contract: the caller makes its own
        return None
    return data if len(data) <= max_bytes else None


def _file_system(url: str):
    import fsspec

    name = protocol(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ShardError(f"{url}: reading {name}: needs a package that is not installed: {error}") from error
