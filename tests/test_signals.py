"""A scheduler's warning reaches every process of a job, loaders included: saved, its own exit code, continued."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny

SAVED = 85


def logged_steps(run: Path) -> list[int]:
    file = run / "metrics.csv"
    if not file.is_file():
        return []
    with file.open() as lines:
        return [int(row["step"]) for row in csv.DictReader(lines) if row["step"]]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_to_the_whole_job_saves_and_the_same_command_continues(tmp_path, number, processes) -> None:
    tiny.write_models(tmp_path / "models")
    tiny.write_data(tmp_path / "data")
    words = tiny.overrides(tmp_path / "models", tmp_path / "data", tmp_path / "runs", 1)
    words += ["data.workers=1", "total_steps=60", "every.checkpoint=1000", "every.validation=null"]
    words += [f"trainer.devices={processes}"]
    run = tmp_path / "runs" / "stage1" / "default"

    job = subprocess.Popen(
        tiny.command(*words),
        cwd=tiny.REPOSITORY,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while len(logged_steps(run)) < 3 and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        before = len(logged_steps(run))
        os.killpg(job.pid, number)
        output, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == SAVED, output
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    assert checkpoints, output
    saved = logged_steps(run)
    assert 3 <= before <= len(saved) < 60

    done = tiny.run(*words)
    assert f"continuing after step {len(saved)} of 60" in done.stdout
    assert logged_steps(run) == list(range(1, 61))
