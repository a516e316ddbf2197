"""Runs recorded reference cases: which runner handles a folder, and what it found, quantity by quantity.

A kind of case is a module ``cases*.py`` beside this one that calls :func:`register`. The kind is told from what the
folder holds, never from its name, and all sizes come from its ``case.json``: new cases of a known kind need no code.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# what the issue of parity asks for; see the README of the goldens for the reasons
LOSS_TOLERANCE = 1e-5
ACTIVATION_TOLERANCE = 1e-5  # or 20 times what rounding alone does in the case, where that is more
GRADIENT_TOLERANCE = 1e-4  # relative, per tensor
NO_GRADIENT = 1e-7  # of the largest tensor's norm: rounding, in fp32


@dataclass(frozen=True)
class Comparison:
    """The largest error of one quantity of one case, and what it may be."""

    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Case:
    """A folder with its ``case.json``."""

    folder: Path
    info: dict[str, Any]

    def has(self, *names: str) -> bool:
        return all((self.folder / name).exists() for name in names)

    def tensors(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name)

    def rounding(self, quantity: str) -> float:
        """The largest difference between the reference in fp32 and in fp64."""
        return self.info["fp32_vs_fp64_max_abs"].get(quantity, 0.0)


Run = Callable[[Case], dict[str, Comparison]]
_kinds: list[tuple[str, Callable[[Case], bool], Run]] = []


def register(kind: str, recognises: Callable[[Case], bool]) -> Callable[[Run], Run]:
    """Decorator: the function compares all quantities of the cases that ``recognises`` accepts."""

    def decorate(run: Run) -> Run:
        _kinds.append((kind, recognises, run))
        return run

    return decorate


def find_cases(root: Path) -> list[Case]:
    """All cases at or below ``root``, by path."""
    files = sorted(Path(root).rglob("case.json"))
    return [Case(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def kind_of(case: Case) -> str | None:
    """The kind that handles ``case``, or None."""
    return next((kind for kind, recognises, _ in _registered() if recognises(case)), None)


def run_case(case: Case) -> dict[str, Comparison]:
    """Every quantity of a case against the recorded one.

    Raises:
        ValueError: no registered kind handles the folder.
    """
    for _, recognises, run in _registered():
        if recognises(case):
            return run(case)
    raise ValueError(f"{case.folder}: no runner knows this kind of case; known are {[kind for kind, *_ in _kinds]}")


def largest(errors: Iterable[float]) -> float:
    """The largest error; NaN where there is one, which Python's ``max`` may pass over."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs|; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours.detach().double() - theirs.double()).abs().max().item() if ours.numel() else 0.0


def compare_activation(case: Case, quantity: str, ours: Tensor, theirs: Tensor) -> Comparison:
    """Absolute difference within max(1e-5, 20 × what rounding does in this case)."""
    tolerance = max(ACTIVATION_TOLERANCE, 20 * case.rounding(quantity))
    return Comparison(largest_difference(ours, theirs), tolerance)


def compare_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor]) -> dict[str, Comparison]:
    """‖ours − theirs‖ / ‖theirs‖ of the worst tensor, within 1e-4.

    The bias of an attention's key shifts all scores of a row by one number, so its gradient is zero and what was
    recorded is rounding; such tensors are compared absolutely, and with them all whose recorded gradient is nothing
    beside the largest (a softmax over one key has none). A tensor without a recorded gradient must have none.
    """
    relative, absolute = [0.0], [0.0]
    nothing = NO_GRADIENT * max((gradient.norm().item() for gradient in theirs.values()), default=0.0)
    for name in sorted(set(ours) | set(theirs)):
        mine = ours.get(name)
        other = theirs.get(name, torch.zeros(())).double()
        difference = (torch.zeros_like(other) if mine is None else mine.detach().double()) - other
        if name.endswith("key.bias") or other.norm() <= nothing:
            absolute.append(difference.abs().max().item())
        else:
            relative.append((difference.norm() / other.norm()).item())
    return {
        "gradients (relative)": Comparison(largest(relative), GRADIENT_TOLERANCE),
        "gradients that are zero": Comparison(largest(absolute), 1e-6),
    }


def _registered() -> list[tuple[str, Callable[[Case], bool], Run]]:
    for file in sorted(Path(__file__).parent.glob("cases*.py")):
        importlib.import_module(f"{__package__}.{file.stem}")
    return _kinds
