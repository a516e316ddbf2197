"""Every curve has every step once, however often the run was stopped, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
from runs import fit

from blipdiff_train.stages.loggers import CsvFile, CsvLogger

QUIET = {"WANDB_SILENT": "true", "WANDB_MODE": "offline"}


def wandb_records(file: Path) -> list:
    """The records of an offline session: blocks of 32 KiB with a header of 7 bytes before each piece of a record."""
    from wandb.proto import wandb_internal_pb2

    data, place, pieces, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            records.append(record)
            pieces = b""
    return records


def wandb_rows(folder: Path) -> tuple[set[str], list[dict[str, float]]]:
    """Run ids and rows of all sessions that ``wandb sync`` would take."""
    ids, rows = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


def check_wandb(folder: Path, *, steps: int, validations: list[int]) -> None:
    """One run; its rows are those of the CSV files, each once."""
    ids, rows = wandb_rows(folder)
    assert ids == {(folder / "wandb_run_id").read_text().strip()}
    training = {row["step"]: row for row in rows if "train/loss" in row}
    assert Counter(row["step"] for row in rows if "train/loss" in row) == dict.fromkeys(range(1, steps + 1), 1)
    assert sorted(row["step"] for row in rows if "val/loss" in row) == validations
    for step, metrics in CsvLogger(folder, step=steps).written():
        if "train/loss" in metrics:
            assert training[step]["train/loss"] == metrics["train/loss"]


def check_tensorboard(folder: Path, *, steps: int, validations: list[int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, steps + 1))
    assert [event.step for event in events.Scalars("val/loss")] == validations


@pytest.mark.slow
def test_wandb_and_tensorboard_go_on_after_a_kill_and_after_a_signal(world, tmp_path):
    """Killed with all its processes after a checkpoint, stopped in order before a validation, killed before any."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    more = ("logger.wandb=true", "logger.wandb_mode=offline", "logger.tensorboard=true", "total_steps=9")
    words = [*tiny.overrides(world / "models", world / "data", tmp_path, 1), *more]
    folder = tmp_path / "stage1" / "default"
    first = tiny.command(*words, "every.validation=100")
    job = subprocess.Popen(first, cwd=tiny.REPOSITORY, env=os.environ | QUIET, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not (folder / "checkpoints" / "step-00000002.json").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert CsvFile(folder / "metrics.csv").rows()
    fit(world, tmp_path, 1, *more, stop_after=1)
    fit(world, tmp_path, 1, *more)
    assert len(list(folder.glob("wandb/killed-offline-run-*"))) == 1
    check_tensorboard(folder, steps=9, validations=[3, 6, 9])
    check_wandb(folder, steps=9, validations=[3, 6, 9])


def test_a_validation_made_up_for_twice_is_one_row(world, tmp_path):
    """A stop before a validation; the next start makes it up and ends before its first checkpoint."""
    folder = fit(world, tmp_path, 1, stop_after=3)
    more = ("every.checkpoint=100", "logger.tensorboard=true")
    time.sleep(1.1)  # TensorBoard reads the files of several starts in the order of the seconds in their names
    job = _killed_after_validation(world, tmp_path, more)
    assert job == -signal.SIGKILL
    time.sleep(1.1)
    fit(world, tmp_path, 1, "logger.tensorboard=true")
    assert [row["step"] for row in CsvFile(folder / "validation.csv").rows()] == ["3", "6"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]


def _killed_after_validation(world: Path, output: Path, more: tuple[str, ...]) -> int:
    from runs import StopAfter, configure

    from blipdiff_train import train
    from blipdiff_train.stages.callbacks import ProgressLine

    def die(self, trainer, module):
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        ProgressLine.on_validation_end = die  # after the row has been written
        config, plain = configure(world, output, 1, *more)
        try:
            train.train(config, plain, StopAfter(None))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_going_back_by_hand_begins_another_wandb_run(world, tmp_path):
    pytest.importorskip("wandb")
    more = ("logger.wandb=true", "logger.wandb_mode=offline", "every.validation=null", "total_steps=4")
    folder = fit(world, tmp_path, 1, *more)
    before = (folder / "wandb_run_id").read_text()
    fit(world, tmp_path, 1, *more, f"resume={folder}/checkpoints/step-00000002.pt", "optim.lr=5e-4")
    assert (folder / "previous-1" / "wandb_run_id").read_text() == before != (folder / "wandb_run_id").read_text()
    check_wandb(folder, steps=4, validations=[])
