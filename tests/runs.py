"""Whole training runs in this process, through the command line's own code, stopped wherever a test likes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from blipdiff_train import __main__ as cli
from blipdiff_train import config as configuration
from blipdiff_train import train
from blipdiff_train.stages import callbacks, loggers


class StopAfter(callbacks.StopSignals):
    """A SIGTERM that arrives during the n-th step of this start; None: never."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps
        super().__init__()

    @property
    def received(self) -> int | None:
        if self._left is None:
            return None
        self._left -= 1
        return signal.SIGTERM if self._left <= 0 else None

    @received.setter
    def received(self, value: int | None) -> None:
        pass


class Meanwhile(callbacks.StopSignals):
    """Something that happens outside while the run is in its n-th step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._left, self._action = step, action
        super().__init__()

    @property
    def received(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._action()

    @received.setter
    def received(self, value: int | None) -> None:
        pass


def configure(world: Path, output: Path, stage: int, *more: str) -> tuple[Any, dict[str, Any]]:
    """The checked configuration of a small run on the fixture ``world``, and the same as plain data."""
    words = [*tiny.overrides(world / "models", world / "data", output, stage), *more]
    plain = cli.compose("train", [cli.quote_stage(word) for word in words])
    config, problems = configuration.check_command("train", plain)
    assert not problems
    return config, plain


def fit(world: Path, output: Path, stage: int, *more: str, stop_after: int | None = None) -> Path:
    """One start of a run; returns its folder."""
    config, plain = configure(world, output, stage, *more)
    if stop_after is None:
        assert train.train(config, plain, StopAfter(None)) == 0
    else:
        with pytest.raises(callbacks.RunInterrupted):
            train.train(config, plain, StopAfter(stop_after))
    return Path(config.run_dir)


def losses(folder: Path) -> list[dict[str, float]]:
    """Losses and gradient norms in the rows of a run's two logs."""
    rows = [row for name in ("metrics.csv", "validation.csv") for row in loggers.CsvFile(folder / name).rows()]
    found = [{k: float(v) for k, v in row.items() if "loss" in k or k.startswith("grad")} for row in rows]
    assert found
    assert all(found)
    return found


def check_close(folder: Path, other: Path) -> None:
    """The losses of two runs agree to 1e-4."""
    for one, two in zip(losses(folder), losses(other), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-7)
