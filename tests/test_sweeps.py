"""A sweep in real processes: a folder for each job, a signal in the middle, and the same sweep again."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny

from blipdiff_train.__main__ import INTERRUPTED


def steps(run: Path) -> int:
    """Rows of a run's log, its header left out."""
    file = run / "metrics.csv"
    return len(file.read_text().splitlines()) - 1 if file.is_file() else 0


@pytest.mark.slow
def test_the_same_sweep_again_skips_what_is_finished_and_continues_the_rest(tmp_path) -> None:
    """As typed: -m stage=1 optim.lr=1e-3,2e-3 …"""
    tiny.write_models(tmp_path / "models")
    tiny.write_data(tmp_path / "data")
    words = tiny.overrides(tmp_path / "models", tmp_path / "data", tmp_path / "runs", 1)
    words = ["-m", *(word for word in words if not word.startswith("optim.lr=")), "optim.lr=1e-3,2e-3"]
    words += ["total_steps=40", "every.checkpoint=1000", "every.validation=null"]
    runs = [tmp_path / "runs" / "stage1" / "default" / f"optim.lr={lr}" for lr in ("0.001", "0.002")]

    sweep = subprocess.Popen(
        tiny.command(*words), cwd=tiny.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while steps(runs[1]) < 3 and sweep.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        sweep.send_signal(signal.SIGTERM)
        output, _ = sweep.communicate(timeout=500)
    finally:
        sweep.kill()
    assert sweep.returncode == INTERRUPTED, output
    assert "1 of 2 jobs finished" in output
    assert [(run / "model").is_dir() for run in runs] == [True, False]
    saved = steps(runs[1])
    assert 3 <= saved < 40

    again = tiny.run(*words).stdout
    assert "this run is finished: 40 of 40 steps" in again
    assert f"continuing after step {saved} of 40" in again
    assert "2 of 2 jobs finished" in again
    assert [steps(run) for run in runs] == [40, 40]
    assert [(run / "model").is_dir() for run in runs] == [True, True]
