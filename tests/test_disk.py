"""A disk that is full or read-only: a clear stop, its own exit code, nothing lost, and the same command goes on.

Injected errors run everywhere; real mounts where this process may mount.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from runs import Meanwhile, configure, fit

from blipdiff_train import train
from blipdiff_train.checkpoints import training
from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint, steps_in
from blipdiff_train.stages import callbacks, loggers

NO_VALIDATION = "every.validation=null"


def check_intact(run_dir: str, steps: list[int]) -> None:
    folder = Path(run_dir) / "checkpoints"
    assert steps_in(folder) == steps
    assert read_checkpoint(checkpoint_path(folder, steps[-1]))["step"] == steps[-1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "the disk is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
    ],
    ids=["full", "quota", "read-only", "forbidden"],
)
def test_a_checkpoint_that_cannot_be_written_stops_the_run(world, tmp_path, chaos, monkeypatch, capsys, error, words):
    honest = torch.save

    def fail(state, file):
        if state["step"] == 4:
            file.write(b"half")
            raise error
        honest(state, file)

    monkeypatch.setattr(training.torch, "save", fail)
    config, plain = configure(world, tmp_path, 1, NO_VALIDATION)
    assert train.run(config, plain) == train.EXIT_NOT_SAVED
    out = capsys.readouterr().out
    assert "stopped: the checkpoint of step 4 could not be written to" in out
    assert f"{words}; the checkpoint of step 2 is intact" in out
    check_intact(config.run_dir, [2])
    assert not list((Path(config.run_dir) / "checkpoints").glob(".*"))
    monkeypatch.undo()
    fit(world, tmp_path, 1, NO_VALIDATION)
    assert [row["step"] for row in chaos.rows(Path(config.run_dir) / "metrics.csv")] == list("123456")


def test_a_log_that_cannot_be_written_stops_the_run_and_the_step_is_kept(world, tmp_path, monkeypatch, capsys):
    honest = loggers.CsvFile.write

    def fail(self, metrics, step):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        honest(self, metrics, step)

    monkeypatch.setattr(loggers.CsvFile, "write", fail)
    config, plain = configure(world, tmp_path, 1, NO_VALIDATION)
    assert train.run(config, plain) == train.EXIT_NOT_SAVED
    out = capsys.readouterr().out
    assert "No space left on device" in out
    assert "metrics.csv" in out
    check_intact(config.run_dir, [2])
    monkeypatch.undo()
    fit(world, tmp_path, 1, NO_VALIDATION)
    rows = loggers.CsvFile(Path(config.run_dir) / "metrics.csv").rows()
    assert [row["step"] for row in rows] == list("123456")


# ---------------------------------------------------------------------------------------------------------- real mounts


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip() or done.returncode}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in ``tmp_path/disk``, of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder))
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(world, tmp_path, chaos, small_disk, monkeypatch, capsys):
    quiet = fit(world, tmp_path / "quiet", 1, NO_VALIDATION)
    filler = small_disk / "filler"

    def fill():
        filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 20_000))

    monkeypatch.setattr(callbacks, "StopSignals", lambda: Meanwhile(3, fill))
    config, plain = configure(world, small_disk, 1, NO_VALIDATION)
    assert train.run(config, plain) == train.EXIT_NOT_SAVED
    out = capsys.readouterr().out
    assert "the disk is full; the checkpoint of step 2 is intact. Make room" in out
    check_intact(config.run_dir, [2])
    monkeypatch.undo()
    assert train.run(config, plain) == train.EXIT_NOT_SAVED  # still full, in whatever it writes first
    capsys.readouterr()
    filler.unlink()
    assert chaos.differences(quiet, fit(world, small_disk, 1, NO_VALIDATION)) == []


def test_a_disk_that_becomes_read_only(world, tmp_path, chaos, small_disk, monkeypatch, capsys):
    quiet = fit(world, tmp_path / "quiet", 1, NO_VALIDATION)

    def protect():
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)

    monkeypatch.setattr(callbacks, "StopSignals", lambda: Meanwhile(3, protect))
    config, plain = configure(world, small_disk, 1, NO_VALIDATION)
    checkpoints = str(Path(config.run_dir) / "checkpoints")
    try:
        assert train.run(config, plain) == train.EXIT_NOT_SAVED
        assert "Read-only file system" in (out := capsys.readouterr().out)
        assert "the checkpoint of step 2 is intact" in out
        check_intact(config.run_dir, [2])
    finally:
        subprocess.run(["umount", "-l", checkpoints], check=True)
    monkeypatch.undo()
    assert chaos.differences(quiet, fit(world, small_disk, 1, NO_VALIDATION)) == []


def test_a_folder_that_is_read_only_from_the_start(world, small_disk, capsys, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr("blipdiff_train.build.parts", lambda *rest: pytest.fail("the models were built first"))
    config, plain = configure(world, small_disk, 1)
    assert train.run(config, plain) == train.EXIT_NOT_SAVED
    out = capsys.readouterr().out
    assert f"the run's folder {config.run_dir} cannot be written (Read-only file system); give another run_dir" in out


@pytest.mark.slow
def test_a_full_disk_ends_both_of_two_processes(world, small_disk):
    """The first process cannot save; the second must not wait for it."""
    (small_disk / "filler").write_bytes(bytes(5_000_000))
    words = [*tiny.overrides(world / "models", world / "data", small_disk, 1), NO_VALIDATION]
    words += ["trainer.devices=2", "keep_checkpoints=100", "total_steps=60"]
    done = tiny.run(*words, check=False)
    assert done.returncode == train.EXIT_NOT_SAVED, done.stdout + done.stderr
    assert "the disk is full; the checkpoint of step" in done.stdout
    folder = small_disk / "stage1" / "default"
    check_intact(str(folder), steps_in(folder / "checkpoints"))
