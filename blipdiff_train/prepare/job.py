"""The job: list, find duplicates, hand out units to processes, account for every photograph. Run it again to resume."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blipdiff_train.common.files import write_json, write_text
from blipdiff_train.common.progress import Progress
from blipdiff_train.data.tar_index import INDEX_SUFFIX
from blipdiff_train.prepare import local_engine
from blipdiff_train.prepare.filters import near_duplicates
from blipdiff_train.prepare.records import Record, list_records
from blipdiff_train.prepare.settings import Settings, make_settings
from blipdiff_train.prepare.work import (
    ACCOUNTS,
    Hasher,
    Unit,
    Worker,
    read_account,
    read_hashes,
)

HASH_CHUNK = 256
"""Photographs hashed in one task of the search for duplicates."""


@dataclass(frozen=True)
class Summary:
    """How a job ended. ``rejected`` counts by cause; ``seconds`` is the time of this run alone.

    ``not_chosen`` counts, by cause, the photographs in which OpenImages' tables show no salient subject: they are not
    among ``num_photographs``.

    ``num_units_missing`` counts what other parts have not finished yet.
    """

    output: str
    num_photographs: int
    num_samples: int
    num_shards: int
    rejected: dict[str, int]
    num_units_reused: int
    num_units_missing: int
    seconds: float
    not_chosen: dict[str, int]

    def __str__(self) -> str:
        again = f" ({_count(self.num_units_reused, 'shard')} from before)" if self.num_units_reused else ""
        if self.num_units_missing:
            again += f", {self.num_units_missing} to be made by other parts or steps"
        not_chosen = f"left out by openimages: {_by_cause(self.not_chosen)}\n" if self.not_chosen else ""
        return (
            f"{not_chosen}{_count(self.num_samples, 'sample')} of {_count(self.num_photographs, 'photograph')} in "
            f"{_count(self.num_shards, 'shard')}{again}, {self.seconds:.0f} s → {self.output}\n"
            f"rejected: {_by_cause(self.rejected)}"
        )


def _by_cause(causes: dict[str, int]) -> str:
    named = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items(), key=lambda entry: -entry[1]))
    return f"{sum(causes.values())}" + (f" ({named})" if named else "")


def run(*, progress: bool = True, **values: Any) -> Summary:
    """Prepare shards; ``python -m blipdiff_train prepare --help`` has the settings.

    A run that was stopped, by whatever means, continues where it was: a finished shard is not made again. The bytes of
    shards and ``rejected.jsonl`` depend on input and settings, and not on the engine, on the number of processes or
    machines, or on interruptions.

    With ``step`` and ``part`` several machines share a job: first ``step=duplicates`` for every part, then
    ``step=shards`` for every part, then ``step=report`` once.

    Args:
        progress: say on standard error what is to be done and how far it is.
        values: ``input``, ``output`` and any other setting, blocks as mappings.

    Raises:
        ValueError: a setting that makes no sense, an input without photographs or categories, an output that cannot be
            written, holds another job, or is being written by another process.
        RuntimeError: a worker process died (out of memory?); run again to resume.
    """
    settings = locate(make_settings(values))
    if settings.input == settings.output:
        raise ValueError(f"output={values['output']} is the input too; choose another output")
    started = time.perf_counter()
    not_chosen: Counter[str] = Counter()
    records = list_records(
        settings.input,
        categories=settings.categories,
        captions=settings.captions,
        openimages=settings.openimages.arguments(),
        limit=settings.limit,
        leave_out=settings.output,
        not_chosen=not_chosen,
    )
    output = Path(settings.output)
    if settings.kind == "subjects" and not any(record.subject_text for record in records):
        raise ValueError(
            f"input={settings.input}: none of its {_count(len(records), 'photograph')} has a category; put them into "
            "one folder for each category, or name it: categories=FILE, or categories='toy dog' for all of them "
            "(kind=backgrounds needs none)"
        )
    with _open_engine(settings) as engine, hold_output(output, settings):
        claim_output(output, settings, records)
        duplicates = _find_duplicates(records, settings, engine, progress)
        if duplicates is None and settings.step != "duplicates":
            raise ValueError(f"output={output}: hashes are missing; run step=duplicates for every part first")
        units = _split(records, duplicates or {}, settings.photographs_per_shard)
        accounts = {unit.index: account for unit in units if (account := read_account(output, unit.index))}
        reused = sum(account["shard"] is not None for account in accounts.values())
        if settings.step in ("all", "shards"):
            ours = take_share(units, settings.share())
            todo = [unit for unit in ours if unit.index not in accounts]
            done = sum(len(unit.records) for unit in ours) - sum(len(unit.records) for unit in todo)
            if progress:
                processes = _count(max(1, min(engine.workers, len(todo))), "process", "processes")
                there = f", {_count(len(ours) - len(todo), 'shard')} of {len(ours)} done before" if done else ""
                print(f"{_what(records, settings)}, {processes}{there}", file=sys.stderr, flush=True)
            with _bar(sum(len(unit.records) for unit in ours), done, "prepare", progress) as bar:
                for account in engine.run_all(Worker, settings, todo, workers=engine.workers, devices=engine.devices):
                    accounts[account["unit"]] = account
                    bar.update(account["photographs"])
    missing = [unit.index for unit in units if unit.index not in accounts]
    if missing and settings.step == "report":
        raise ValueError(
            f"output={output}: {len(missing)} of {len(units)} shards are not there yet (first: {missing[0]}); run "
            "step=shards for every part first"
        )
    ordered = [accounts[unit.index] for unit in units if unit.index in accounts]
    rejected = sorted(
        (entry for account in ordered for entry in account["rejected"]), key=lambda entry: entry["number"]
    )
    summary = Summary(
        output=str(values["output"]),
        num_photographs=len(records),
        num_samples=sum(len(account["samples"]) for account in ordered),
        num_shards=sum(account["shard"] is not None for account in ordered),
        rejected=dict(Counter(entry["cause"] for entry in rejected)),
        num_units_reused=reused,
        num_units_missing=len(missing),
        seconds=time.perf_counter() - started,
        not_chosen=dict(not_chosen),
    )
    if missing or settings.part:
        return summary
    write_text(output / "rejected.jsonl", "".join(_line(entry) for entry in rejected))
    if settings.report.enabled:
        from blipdiff_train.prepare.report import write_report

        write_report(output / "report.html", settings, records, ordered, rejected)
    return summary


def locate(settings: Settings) -> Settings:
    """The same settings with whole paths: a process elsewhere may have another current folder."""
    segmenter, captioner = (
        dataclasses.replace(block, model=str(Path(block.model).resolve()))
        if block.model is not None and Path(block.model).is_dir()
        else block
        for block in (settings.segmenter, settings.captioner)
    )
    return dataclasses.replace(
        settings,
        input=str(Path(settings.input).resolve()),
        output=str(Path(settings.output).resolve()),
        segmenter=segmenter,
        captioner=captioner,
    )


def _line(entry: dict[str, Any]) -> str:
    # sorted, because an account read back from its file has lost the order in which it was made
    return json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n"


@contextmanager
def hold_output(output: Path, settings: Settings) -> Iterator[None]:
    """Keep other processes out of the folder, except the other parts of the same step; released however this one ends.

    Raises:
        ValueError: another process is at work there, or the folder cannot be made or written.
    """
    locks = [(output / ".lock", fcntl.LOCK_SH if settings.part else fcntl.LOCK_EX)]
    if settings.part:
        part = settings.part.replace("/", "-of-")
        locks.append((output / ACCOUNTS / f"lock-{settings.step}-{part}", fcntl.LOCK_EX))
    with ExitStack() as held:
        for path, mode in locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(path.open("a+", encoding="utf-8"))
            except OSError as error:
                advice = "choose a folder that can be made and written"
                raise ValueError(f"output={output}: {error.strerror} ({path}); {advice}") from error
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "another process"
                share = f", part={settings.part}" if settings.part else ""
                raise ValueError(
                    f"output={output}{share}: {who} is preparing there now; let it finish, or stop it and run this "
                    "command again to continue. Machines share a job by step and part"
                ) from None
            except OSError:
                continue  # a file system without locks: two such jobs do the work twice, with the same bytes
            if mode == fcntl.LOCK_EX:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
        yield


def claim_output(output: Path, settings: Settings, records: Sequence[Record]) -> None:
    """Make the folder this job's own, or recognise it as such. A job that has not finished any shard is replaced.

    Raises:
        ValueError: it holds a job with other settings or inputs and ``overwrite`` is false.
    """
    digest = hashlib.sha256()
    for record in records:
        # where the folder lies does not matter, what is in it does
        facts = asdict(record) | {"file": _stat(record.file), "mask": _stat(record.mask) if record.mask else None}
        digest.update(json.dumps(facts, sort_keys=True).encode())
    identity = json.loads(json.dumps(settings.identity(), default=list))
    plan = {"settings": identity, "photographs": len(records), "inputs": digest.hexdigest()}
    path = output / ACCOUNTS / "plan.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = {}
        if found == plan and not settings.overwrite:
            return
        # other parts may be about to begin
        is_begun = settings.step != "all" or any((output / ACCOUNTS).glob("unit-*.json"))
        if is_begun and not settings.overwrite:
            raise ValueError(
                f"output={output} holds another job: {_difference(found, plan)}. Choose another output, or "
                "overwrite=true to make everything again"
            )
        for old in (*output.glob("shard-[0-9]*.tar"), *output.glob(f"shard-[0-9]*.tar{INDEX_SUFFIX}")):
            old.unlink()
        for name in ("rejected.jsonl", "report.html"):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / ACCOUNTS, ignore_errors=True)
    elif any(output.glob("shard-*.tar")):
        raise ValueError(f"output={output} has shards that no job of this kind made; choose another output")
    # parts that start together write the same plan
    write_json(path, plan)


def _difference(found: dict[str, Any], plan: dict[str, Any]) -> str:
    old, new = _leaves(found.get("settings", {})), _leaves(plan["settings"])
    changed = [f"{key} was {old.get(key)!r} and is {new[key]!r}" for key in new if old.get(key) != new[key]]
    if found.get("photographs") != plan["photographs"]:
        changed.append(f"{found.get('photographs')} photographs then, {plan['photographs']} now")
    return "; ".join(changed) or "the photographs, captions or categories have changed"


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, as on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _stat(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
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
    records: Sequence[Record], settings: Settings, engine: Engine, progress: bool
) -> dict[int, int] | None:
    """Number of each near-duplicate → number of the photograph it repeats; one pass over all, kept for resuming.

    None where the job's part is not the whole and the other parts' hashes are not all there.
    """
    if settings.filters.duplicate_distance is None:
        return {}
    output = Path(settings.output)
    starts = range(0, len(records), HASH_CHUNK)
    chunks = [(number, records[start : start + HASH_CHUNK]) for number, start in enumerate(starts)]
    if settings.step in ("all", "duplicates"):
        ours = take_share(chunks, settings.share())
        todo = [chunk for chunk in ours if read_hashes(output, chunk[0], len(chunk[1])) is None]
        done = sum(len(chunk[1]) for chunk in ours) - sum(len(chunk[1]) for chunk in todo)
        with _bar(sum(len(chunk[1]) for chunk in ours), done, "look for duplicates", progress) as bar:
            for _, count in engine.run_all(Hasher, settings, todo, workers=engine.workers):
                bar.update(count)
    hashes: list[int | None] = []
    for number, chunk in chunks:
        part = read_hashes(output, number, len(chunk))
        if part is None:
            return None
        hashes += part
    return near_duplicates(hashes, settings.filters.duplicate_distance)


def take_share(items: Sequence[Any], share: tuple[int, int]) -> Sequence[Any]:
    """Every ``n``-th item from the ``k``-th on, for ``share`` (k, n): the n shares are all items, each once."""
    number, count = share
    return items[number::count]


@dataclass(frozen=True)
class Engine:
    """Where the work is done: ``run_all`` of one of the engines, and what it is given."""

    run_all: Callable[..., Iterator[Any]]
    workers: int
    devices: tuple[str, ...] = ()


@contextmanager
def _open_engine(settings: Settings) -> Iterator[Engine]:
    if settings.engine == "ray":
        from blipdiff_train.prepare.ray_engine import Cluster

        with Cluster(settings.ray_address) as cluster:
            # an actor is told by Ray which GPU is its own, and sees no other
            devices = plan_devices(settings, cluster.num_gpus, "the cluster", lambda _: "cuda:0")
            left = cluster.num_cpus - len(devices)
            if left < 1:
                raise ValueError(
                    f"engine=ray: the cluster has {cluster.num_cpus} CPUs, and {len(devices)} processes with models "
                    "leave none for the workers; lower devices"
                )
            yield Engine(cluster.run_all, settings.workers or left, devices)
        return
    devices = plan_devices(settings, _count_gpus(settings), "this machine", lambda number: f"cuda:{number}")
    yield Engine(local_engine.run_all, settings.workers or len(os.sched_getaffinity(0)), devices)


def _count_gpus(settings: Settings) -> int:
    if not settings.has_models or settings.accelerator == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def plan_devices(
    settings: Settings, num_gpus: int, where: str, name_gpu: Callable[[int], str]
) -> tuple[str, ...]:
    """The devices (of torch) that get a process with the models each; none: every worker has the models itself.

    Raises:
        ValueError: more devices than there are, or a GPU where there is none; says how many there are.
    """
    if not settings.has_models or settings.step in ("duplicates", "report"):
        return ()
    there = f"{where} has {num_gpus} GPU{'' if num_gpus == 1 else 's'}"
    if settings.accelerator == "cpu" or (settings.accelerator == "auto" and num_gpus == 0):
        if settings.devices and settings.accelerator == "auto":
            advice = f"for {settings.devices} CPU processes with the models add accelerator=cpu"
            raise ValueError(f"devices={settings.devices}, but {there}; {advice}")
        return ("cpu",) * (settings.devices or 0)
    wanted = settings.devices or num_gpus
    if wanted > num_gpus or wanted == 0:
        advice = f"allowed are 1 to {num_gpus}" if num_gpus else "use accelerator=cpu"
        raise ValueError(f"accelerator={settings.accelerator}, devices={settings.devices}, but {there}; {advice}")
    return tuple(name_gpu(number) for number in range(wanted))


def _bar(total: int, initial: int, name: str, progress: bool) -> Progress:
    return Progress(total, initial=initial, name=name, unit="photographs", show=progress)


def _what(records: Sequence[Record], settings: Settings) -> str:
    photographs = _count(len(records), "photograph")
    if settings.kind == "backgrounds":
        return f"{photographs} as backgrounds"
    categories = len({record.subject_text for record in records if record.subject_text})
    return f"{photographs} of {_count(categories, 'category', 'categories')}, segmented by {settings.segmenter.name}"


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"
