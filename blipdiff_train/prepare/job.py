"""The job: list, find duplicates, hand out units to processes, account for every photograph. Run it again to resume."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blipdiff_train.common.files import write_json, write_text
from blipdiff_train.data.tar_index import INDEX_SUFFIX
from blipdiff_train.prepare.filters import near_duplicates
from blipdiff_train.prepare.records import Record, list_records
from blipdiff_train.prepare.settings import Settings, make_settings
from blipdiff_train.prepare.work import (
    ACCOUNTS,
    Unit,
    Worker,
    hash_photographs,
    limit_threads,
    read_account,
)

HASH_CHUNK = 256
"""Photographs hashed in one task of the search for duplicates."""


@dataclass(frozen=True)
class Summary:
    """How a job ended. ``rejected`` counts by cause; ``seconds`` is the time of this run alone."""

    output: str
    num_photographs: int
    num_samples: int
    num_shards: int
    rejected: dict[str, int]
    num_units_reused: int
    seconds: float

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.rejected.items(), key=lambda c: -c[1]))
        again = f" ({self.num_units_reused} shards were there already)" if self.num_units_reused else ""
        return (
            f"{self.num_samples} samples of {self.num_photographs} photographs in {self.num_shards} shards"
            f"{again}, {self.seconds:.0f} s → {self.output}\n"
            f"rejected: {sum(self.rejected.values())}" + (f" ({causes})" if causes else "")
        )


def run(*, progress: bool = True, **values: Any) -> Summary:
    """Prepare shards; see the table in :mod:`blipdiff_train.prepare` for the settings.

    A run that was stopped, by whatever means, continues where it was: a finished shard is not made again. The bytes of
    shards and ``rejected.jsonl`` depend on input and settings, and not on ``workers`` or on interruptions.

    Args:
        progress: show a bar.
        values: ``input``, ``output`` and any other setting, blocks as mappings.

    Raises:
        ValueError: a setting that makes no sense, an input without photographs, or an output that holds another job.
        RuntimeError: a worker process died (out of memory?); run again to resume.
    """
    settings = make_settings(values)
    started = time.perf_counter()
    records = list_records(
        settings.input,
        categories=settings.categories,
        captions=settings.captions,
        openimages=settings.openimages,
        limit=settings.limit,
    )
    output = Path(settings.output)
    claim_output(output, settings, records)
    workers = settings.workers or len(os.sched_getaffinity(0))
    duplicates = _find_duplicates(records, settings, output, workers, progress)
    units = _split(records, duplicates, settings.photographs_per_shard)
    accounts = {unit.index: account for unit in units if (account := read_account(output, unit.index)) is not None}
    reused = sum(account["shard"] is not None for account in accounts.values())
    todo = [unit for unit in units if unit.index not in accounts]
    with _bar(len(records), sum(len(u.records) for u in units if u.index in accounts), "prepare", progress) as bar:
        for account in _run_all(Worker, "run", (settings,), todo, workers):
            accounts[account["unit"]] = account
            bar.update(account["photographs"])
    ordered = [accounts[unit.index] for unit in units]
    rejected = sorted(
        (entry for account in ordered for entry in account["rejected"]), key=lambda entry: entry["number"]
    )
    write_text(output / "rejected.jsonl", "".join(_line(entry) for entry in rejected))
    summary = Summary(
        output=str(output),
        num_photographs=len(records),
        num_samples=sum(len(account["samples"]) for account in ordered),
        num_shards=sum(account["shard"] is not None for account in ordered),
        rejected=dict(Counter(entry["cause"] for entry in rejected)),
        num_units_reused=reused,
        seconds=time.perf_counter() - started,
    )
    if settings.report.enabled:
        from blipdiff_train.prepare.report import write_report

        write_report(output / "report.html", settings, records, ordered, rejected)
    return summary


def _line(entry: dict[str, Any]) -> str:
    # sorted, because an account read back from its file has lost the order in which it was made
    return json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n"


def claim_output(output: Path, settings: Settings, records: Sequence[Record]) -> None:
    """Make the folder this job's own, or recognise it as such.

    Raises:
        ValueError: it holds a job with other settings or inputs and ``overwrite`` is false.
    """
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([asdict(record), _stat(record.file)], sort_keys=True).encode())
    identity = json.loads(json.dumps(settings.identity(), default=list))
    plan = {"settings": identity, "photographs": len(records), "inputs": digest.hexdigest()}
    path = output / ACCOUNTS / "plan.json"
    if path.is_file() and not settings.overwrite:
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = {}
        if found == plan:
            return
        raise ValueError(
            f"output={output} holds another job: {_difference(found, plan)}. Choose another output, or overwrite=true"
        )
    if not path.is_file() and any(output.glob("shard-*.tar")):
        raise ValueError(f"output={output} has shards that no job of this kind made; choose another output")
    for old in (*output.glob("shard-[0-9]*.tar"), *output.glob(f"shard-[0-9]*.tar{INDEX_SUFFIX}")):
        old.unlink()
    for name in ("rejected.jsonl", "report.html"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / ACCOUNTS, ignore_errors=True)
    write_json(path, plan)


def _difference(found: dict[str, Any], plan: dict[str, Any]) -> str:
    old, new = found.get("settings", {}), plan["settings"]
    changed = [f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in new if old.get(key) != new[key]]
    if found.get("photographs") != plan["photographs"]:
        changed.append(f"{found.get('photographs')} photographs then, {plan['photographs']} now")
    return "; ".join(changed) or "the photographs, captions or categories have changed"


def _stat(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _split(records: Sequence[Record], duplicates: dict[int, int], size: int) -> list[Unit]:
    units = []
    for start in range(0, len(records), size):
        numbers = tuple(range(start, min(start + size, len(records))))
        repeated = {number: records[duplicates[number]].name for number in numbers if number in duplicates}
        units.append(Unit(start // size, numbers, tuple(records[start : start + size]), repeated))
    return units


def _find_duplicates(
    records: Sequence[Record], settings: Settings, output: Path, workers: int, progress: bool
) -> dict[int, int]:
    """Number of each near-duplicate → number of the photograph it repeats; one pass over all, kept for resuming."""
    if settings.filters.duplicate_distance is None:
        return {}
    path = output / ACCOUNTS / "hashes.json"
    try:
        hashes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        hashes = None
    if hashes is None or len(hashes) != len(records):
        chunks = [records[start : start + HASH_CHUNK] for start in range(0, len(records), HASH_CHUNK)]
        found: dict[int, list[int | None]] = {}
        with _bar(len(records), 0, "look for duplicates", progress) as bar:
            for number, part in _run_all(_Hasher, "run", (settings,), list(enumerate(chunks)), workers):
                found[number] = part
                bar.update(len(part))
        hashes = [value for number in range(len(chunks)) for value in found[number]]
        write_json(path, hashes)
    return near_duplicates(hashes, settings.filters.duplicate_distance)


class _Hasher:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self, task: tuple[int, Sequence[Record]]) -> tuple[int, list[int | None]]:
        return task[0], hash_photographs(task[1], self.settings)


# ---- processes -----------------------------------------------------------------------------------------------------

_worker: Any = None


def _start_worker(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _worker
    limit_threads()
    _worker = make(*arguments)


def _call_worker(method: str, task: Any) -> Any:
    return getattr(_worker, method)(task)


def _run_all(
    make: Callable[..., Any], method: str, arguments: tuple[Any, ...], tasks: Sequence[Any], workers: int
) -> Iterator[Any]:
    """``make(*arguments).method(task)`` for every task, in this process or in several; results as they come."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        if tasks:
            worker = make(*arguments)
            yield from (getattr(worker, method)(task) for task in tasks)
        return
    # spawn: a fork would copy the threads' locks of torch, numba and OpenCV in whatever state they are
    context = multiprocessing.get_context("spawn")
    waiting, pending = iter(tasks), set[Future]()
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make, arguments))
    try:
        while True:
            # a short queue: memory stays bounded however many tasks there are
            while len(pending) < 2 * workers and (task := next(waiting, None)) is not None:
                pending.add(executor.submit(_call_worker, method, task))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, perhaps for want of memory; use fewer workers. What is finished is kept: run the "
            "same command again to resume"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _bar(total: int, initial: int, name: str, progress: bool) -> tqdm:
    return tqdm(total=total, initial=initial, desc=name, unit=" photographs", disable=not progress, smoothing=0.1)
