"""The table of cases that are not ours: any folder of the known kinds, and one that breaks does not hide the rest."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from .runner import compare_gradients

ROOT = Path(__file__).parents[2]
FEATURES = ROOT / "tests" / "goldens" / "stage1_features" / "freq1"
sys.path.insert(0, str(ROOT / "scripts"))

import parity_table  # noqa: E402


def test_a_broken_case_is_reported_beside_the_others(tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(FEATURES, tmp_path / "some" / "where")
    monkeypatch.setattr(sys, "argv", ["parity_table.py", "--golden", str(tmp_path)])
    assert parity_table.main() == 0
    assert "| some/where | features | image.image_embeds |" in capsys.readouterr().out

    shutil.copytree(FEATURES, tmp_path / "broken")
    weights = tmp_path / "broken" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shutil.copytree(FEATURES, tmp_path / "unknown")
    (tmp_path / "unknown" / "weights.safetensors").unlink()
    assert parity_table.main() == 1
    shown = capsys.readouterr().out
    assert "| some/where | features | image.image_embeds |" in shown
    assert "**failed**" in next(line for line in shown.splitlines() if line.startswith("| broken |"))
    assert "| unknown | no runner |" in shown

    monkeypatch.setattr(sys, "argv", ["parity_table.py", "--golden", str(tmp_path / "nothing")])
    assert parity_table.main() == 1


@pytest.mark.parametrize(
    ("ours", "good"),
    [
        ({"a.weight": torch.ones(3), "b.weight": torch.zeros(2)}, True),
        ({"a.weight": torch.ones(3), "b.weight": torch.full((2,), 5e-7)}, True),  # nothing beside the largest
        ({"a.weight": torch.ones(3), "b.weight": torch.full((2,), 5e-6)}, False),
        ({"a.weight": torch.ones(3) + 2e-4, "b.weight": torch.zeros(2)}, False),
        ({"a.weight": None, "b.weight": torch.zeros(2)}, False),
        ({"a.weight": torch.ones(3), "b.weight": torch.zeros(2), "c.weight": torch.ones(1)}, False),
        ({"a.weight": torch.ones(3) * torch.nan, "b.weight": torch.zeros(2)}, False),
    ],
)
def test_gradients_are_compared_by_norm_and_zeros_by_value(ours, good) -> None:
    theirs = {"a.weight": torch.ones(3), "b.weight": torch.full((2,), 1e-9)}
    assert all(found.good for found in compare_gradients(ours, theirs).values()) == good
