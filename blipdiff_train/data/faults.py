"""Bad samples: listed once each in ``quarantine.jsonl``, and too many of them stop the run.

Loader processes replace a bad sample and list it. How many are too many is judged where all ranks' batches are known,
after each step (``stages.callbacks.FaultLimit``): a verdict of one loader would depend on how many there are.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

LISTED = 20
"""Bad samples named in the error that stops a run; the file has them all."""

MIN_BAD = 10
"""A run never stops before so many: one bad sample among the first ten is no verdict."""


class TooManyBadSamples(ValueError):
    """More bad samples than ``max_bad_fraction`` allows; the message lists them."""


class NoGoodSample(ValueError):
    """Every sample where a good one was looked for is bad."""


class Quarantine:
    """The list of bad samples, one JSON object a line; all processes of a run and all its starts share it.

    Args:
        path: of the file; None keeps no list.
    """

    def __init__(self, path: str | Path | None):
        self.path = Path(path) if path else None
        self._known: set[tuple[str, str]] = set()
        self._read_to = 0

    def add(self, *, cause: str, message: str, shard: str, key: str) -> None:
        """List a bad sample unless it stands there already."""
        if self.path is None or (shard, key) in self._known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):  # a file system without locks: two processes may then list one sample twice
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            tail = self._read_what_others_wrote(descriptor)
            if (shard, key) in self._known:
                return
            self._known.add((shard, key))
            entry = {"cause": cause, "shard": shard, "key": key, "message": message[:1000]}
            # a line that a crash cut off must not swallow this one
            os.write(descriptor, (("\n" if tail else "") + json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)

    def _read_what_others_wrote(self, descriptor: int) -> bytes:
        """Take in the lines since the last look; returns the beginning of a line that has no end."""
        data = b""
        while block := os.pread(descriptor, 1 << 20, self._read_to + len(data)):
            data += block
        whole = data.rfind(b"\n") + 1
        self._read_to += whole
        self._known |= {(entry["shard"], entry["key"]) for entry in _entries(data[:whole])}
        return data[whole:]


def read_quarantine(path: str | Path) -> list[dict[str, str]]:
    """Bad samples listed in ``path``, each once, in the order found; lines cut by a crash are left out."""
    path = Path(path)
    if not path.exists():
        return []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for entry in _entries(path.read_bytes()):
        found.setdefault((entry["shard"], entry["key"]), entry)
    return list(found.values())


def _entries(lines: bytes) -> list[dict[str, str]]:
    entries = []
    for line in lines.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["shard"] and entry["key"]:
                entries.append(entry)
    return entries


def check_share(
    causes: Mapping[str, int], num_seen: int, *, max_bad_fraction: float, quarantine: str | Path | None
) -> None:
    """Stop when too many samples had to be replaced.

    Args:
        causes: replaced samples by cause.
        num_seen: samples that were asked for.
        max_bad_fraction: share that is still accepted, 0..1.
        quarantine: the list, see :class:`Quarantine`.

    Raises:
        TooManyBadSamples: with the counts and the first of the bad samples.
    """
    num_bad = sum(causes.values())
    if num_bad < MIN_BAD or num_bad <= max_bad_fraction * num_seen:
        return
    counts = ", ".join(f"{count} × {cause}" for cause, count in sorted(causes.items(), key=lambda item: -item[1]))
    messages = [entry["message"] for entry in (read_quarantine(quarantine) if quarantine else [])]
    lines = "".join(f"\n  {message}" for message in messages[:LISTED])
    more = f"\n  and {len(messages) - LISTED} more" if len(messages) > LISTED else ""
    where = f"; all of them are in {quarantine}" if quarantine else ""
    raise TooManyBadSamples(
        f"{num_bad} of {num_seen} samples were bad ({counts}), more than max_bad_fraction={max_bad_fraction:g}. "
        f"Repair the shards, or raise data.max_bad_fraction{where}{lines}{more}"
    )
