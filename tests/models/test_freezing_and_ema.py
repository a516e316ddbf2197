"""Trainable names, modes of frozen parts, and the average of the trainable parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blipdiff_train.models.ema import ParameterAverage
from blipdiff_train.models.freezing import keep_frozen_in_eval, lower_precision, set_trainable


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "tower": nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
            "body": nn.Sequential(nn.Linear(2, 3), nn.Dropout(), nn.Linear(3, 1)),
        }
    )


def test_exactly_the_named_parameters_train() -> None:
    module = model()
    report = set_trainable(module, ["body.*", "!body.2.bias"])
    assert report.trainable == ("body.0.weight", "body.0.bias", "body.2.weight")
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(report.trainable)
    assert report.num_trainable == {"tower": 0, "body": 12}
    assert report.num_frozen == {"tower": 6, "body": 1}
    assert "12" in str(report)
    set_trainable(module, ["tower.*"])
    assert not module["body"][0].weight.requires_grad


@pytest.mark.parametrize("patterns", [["bdy.*"], ["body.*", "!tail.*"], []])
def test_a_pattern_that_matches_nothing_is_an_error(patterns) -> None:
    with pytest.raises(ValueError, match=r"begin with: body, tower|empty"):
        set_trainable(model(), patterns)


def test_tied_parameters_train_under_any_of_their_names() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    set_trainable(module, ["b.weight"])
    assert module["a"].weight.requires_grad


def test_what_runs_without_gradient_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"takes in tower.0.bias and 1 more, which cannot train"):
        set_trainable(model(), ["*"], without_gradient=("tower.",))
    set_trainable(model(), ["*", "!tower.*"], without_gradient=("tower.",))


def test_frozen_parts_get_their_own_numbers_back() -> None:
    tower = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    own = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    restore = lower_precision([tower], torch.bfloat16, keep=True)
    assert tower[0].weight.dtype == torch.bfloat16
    assert not torch.equal(tower[0].weight.float(), own["0.weight"])  # rounded
    restore()
    found = tower.state_dict()
    assert found.keys() == own.keys()
    assert all(found[name].dtype == own[name].dtype and torch.equal(found[name], own[name]) for name in own)


def test_frozen_parts_stay_in_eval() -> None:
    module = model()
    set_trainable(module, ["body.*"])
    module.train()
    keep_frozen_in_eval(module)
    assert not any(part.training for part in module["tower"].modules())
    assert module["body"][1].training


def test_average_swap_and_state() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = ParameterAverage(layer.named_parameters(), decay=0.5)
    layer.weight.data.fill_(1.0)
    average.update()  # decay min(.5, 2/11)
    assert average.average["weight"].item() == pytest.approx(1 - 2 / 11)
    layer.weight.data.fill_(3.0)
    with average.swapped():
        assert layer.weight.item() == pytest.approx(1 - 2 / 11)
        with pytest.raises(RuntimeError):
            average.swap_in()
    assert layer.weight.item() == 3.0

    other = ParameterAverage(layer.named_parameters(), decay=0.5)
    other.load_state_dict(average.state_dict())
    assert other.num_updates == 1
    assert torch.equal(other.average["weight"], average.average["weight"])
    with pytest.raises(ValueError, match="bias"):
        other.load_state_dict(average.state_dict() | {"bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="ema_decay=1"):
        ParameterAverage(layer.named_parameters(), decay=1.0)
