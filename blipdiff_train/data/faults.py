"""Bad samples: counted by cause, listed once in ``quarantine.jsonl``, and too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

LISTED = 20
"""Bad samples named in the error that stops a run; the file has them all."""


class TooManyBadSamples(ValueError):
    """More bad samples than ``max_bad_fraction`` allows; the message lists them."""


class FaultMonitor:
    """Keeps count in one process; appends to a list that all processes share.

    Which sample replaces a bad one is decided elsewhere and does not depend on this object, so a run's content is the
    same however its processes count. The share is taken over the samples that this process was asked for.

    Args:
        quarantine: file that bad samples are appended to, one JSON object a line; None keeps no list.
        max_bad_fraction: share of bad samples that is still accepted, 0..1.
        min_bad: the run never stops before this many, so that one bad sample among the first ten is no verdict.
    """

    def __init__(self, quarantine: str | Path | None, *, max_bad_fraction: float = 0.01, min_bad: int = 10):
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise ValueError(f"max_bad_fraction={max_bad_fraction}: expected a share between 0 and 1")
        self.quarantine = Path(quarantine) if quarantine else None
        self.max_bad_fraction, self.min_bad = max_bad_fraction, min_bad
        self.num_seen = self.num_bad = 0
        self.causes: Counter[str] = Counter()
        self._listed: dict[tuple[str, str], str] = {}

    def seen(self) -> None:
        """A sample was asked for."""
        self.num_seen += 1

    def report(self, *, cause: str, message: str, shard: str, key: str) -> None:
        """A bad sample was found; it is listed the first time."""
        if (shard, key) in self._listed:
            return
        self._listed[shard, key] = message
        if self.quarantine is None:
            return
        entry = {"cause": cause, "shard": shard, "key": key, "message": message[:1000]}
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        # one write to a file opened for appending: lines of several processes do not mix
        descriptor = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)

    def replaced(self, cause: str) -> None:
        """A sample that was asked for was replaced.

        Raises:
            TooManyBadSamples: the share of replaced samples is above the limit.
        """
        self.num_bad += 1
        self.causes[cause] += 1
        if self.num_bad >= self.min_bad and self.num_bad > self.max_bad_fraction * self.num_seen:
            raise TooManyBadSamples(self.summary(f"more than max_bad_fraction={self.max_bad_fraction:g}"))

    def summary(self, why: str) -> str:
        """The counts and the first of the bad samples, as the text of an error."""
        causes = ", ".join(f"{count} × {cause}" for cause, count in self.causes.most_common())
        messages = list(self._listed.values())
        lines = "\n  ".join(messages[:LISTED])
        more = f"\n  and {len(messages) - LISTED} more" if len(messages) > LISTED else ""
        where = f"; all of them are in {self.quarantine}" if self.quarantine else ""
        return (
            f"{self.num_bad} of {self.num_seen} samples were bad ({causes or 'none counted yet'}), {why}. "
            f"Repair the shards, or raise data.max_bad_fraction{where}\n  {lines}{more}"
        )


def read_quarantine(path: str | Path) -> list[dict[str, str]]:
    """Bad samples listed in ``path``, each once, in the order found; lines cut by a crash are left out."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    path = Path(path)
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
                found.setdefault((entry["shard"], entry["key"]), entry)
            except (ValueError, KeyError, TypeError):
                continue
    return list(found.values())
