"""Our text encoder, stage-2 loss and generation against the recorded reference implementations."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runner import find_cases, kind_of, run_case

GOLDENS = Path(__file__).parents[1] / "goldens"
KINDS = ("text encoder with a subject", "stage 2", "generation", "generation with a ControlNet")
SHARED = GOLDENS.parents[2] / "shared" / "golden" / "controlnet"  # too large to be kept here; run where it is at hand
CASES = [case for root in (GOLDENS, SHARED) for case in find_cases(root) if kind_of(case) in KINDS]


def test_each_kind_has_a_case() -> None:
    assert {kind_of(case) for case in CASES} >= set(KINDS[:3])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.info["case"])
def test_agrees_with_the_reference(case) -> None:
    found = run_case(case)
    assert found
    wrong = [f"{name}: {c.error:.2e} > {c.tolerance:.0e}" for name, c in found.items() if not c.good]
    assert not wrong, "\n".join(wrong)
