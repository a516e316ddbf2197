"""How far a long piece of work is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType


class Progress:
    """Counts things done and says how many, how fast, and how long the rest takes.

    Rate and time left are of this run alone: what an earlier one had done (``initial``) took it no time.

    Args:
        total: things there are.
        initial: of which so many are done already.
        name: of the work, at the start of the line.
        unit: of the things, e.g. "photographs".
        seconds: between lines when standard error is no terminal.
        show: False says nothing.
    """

    def __init__(
        self, total: int, *, initial: int = 0, name: str, unit: str, seconds: float = 15.0, show: bool = True
    ) -> None:
        self.total, self.done, self.name, self.unit, self.seconds = total, initial, name, unit, seconds
        self._initial, self._bar = initial, None
        self._start = self._last_line = time.monotonic()
        self._lines = show and not sys.stderr.isatty()
        if show and not self._lines:
            from tqdm import tqdm

            # a terminal that does not know its width (a container's, a recorder's) would show nothing
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            form = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left"
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit=f" {unit}",
                bar_format=form,
                smoothing=0.1,
                dynamic_ncols=width > 0,
                ncols=None if width > 0 else 100,
                nrows=None if width > 0 else 24,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and kind is None and self.done > self._initial:
            took = time.monotonic() - self._start
            print(
                f"{self.name}: {self.done} of {self.total} {self.unit} in {clock(took)}", file=sys.stderr, flush=True
            )

    def update(self, count: int) -> None:
        """``count`` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._lines and self.done < self.total and time.monotonic() - self._last_line >= self.seconds:
            self._last_line = time.monotonic()
            rate = (self.done - self._initial) / max(1e-9, self._last_line - self._start)
            left = clock((self.total - self.done) / rate)
            words = f"{self.done} of {self.total} {self.unit}, {rate:.3g} a second, {left} left"
            print(f"{self.name}: {words}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
