"""A log file gets whole lines, and the time left is of what this run has done itself."""

from __future__ import annotations

from blipdiff_train.common import progress
from blipdiff_train.common.progress import Progress, clock


def test_a_log_file_gets_lines_with_rate_and_time_left(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress(500, initial=100, name="hash", unit="files", seconds=15) as bar:
        now = 5.0
        bar.update(50)  # too early for a line
        now = 20.0
        bar.update(50)
        now = 80.0
        bar.update(300)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "hash: 200 of 500 files, 5 a second, 1:00 left",
        "hash: 500 of 500 files in 1:20",
    ]
    assert "\r" not in captured.err


def test_nothing_is_said_when_nothing_is_wanted_or_done(capsys):
    with Progress(3, name="a", unit="files", show=False, seconds=0) as bar:
        bar.update(3)
    with Progress(3, initial=3, name="b", unit="files", seconds=0):
        pass
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_the_clock():
    assert [clock(value) for value in (0, 61.9, 3723)] == ["0:00", "1:01", "1:02:03"]
