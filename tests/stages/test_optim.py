"""Every trainable parameter in exactly one group, and schedules that only know optimizer steps."""

from __future__ import annotations

import math

import pytest
import torch

from blipdiff_train.stages.optim import build_optimizer, build_schedule, learning_rate


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, 2, 4))
        self.temperature = torch.nn.Parameter(torch.tensor(0.07))
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.linear


def test_each_trainable_parameter_is_in_exactly_one_group():
    model = Tiny()
    optimizer = build_optimizer(model.named_parameters(remove_duplicate=False), lr=1e-3, weight_decay=0.05)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert by_name["no_decay"]["weight_decay"] == 0.0
    assert by_name["decay"]["weight_decay"] == 0.05
    decayed = {id(p) for p in by_name["decay"]["params"]}
    assert decayed == {id(model.linear.weight), id(model.query_tokens)}


def test_nothing_trainable_is_an_error():
    with pytest.raises(ValueError, match="trainable"):
        build_optimizer(
            torch.nn.Linear(2, 2).requires_grad_(False).named_parameters(), lr=1.0, weight_decay=0.0
        )


def test_cosine_reaches_its_landmarks():
    keys = {
        "schedule": "cosine",
        "lr": 1e-4,
        "warmup_steps": 10,
        "total_steps": 110,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
    }
    assert learning_rate(0, **keys) == pytest.approx(1e-6)
    assert learning_rate(5, **keys) == pytest.approx((1e-6 + 1e-4) / 2)
    assert learning_rate(10, **keys) == pytest.approx(1e-4)
    assert learning_rate(60, **keys) == pytest.approx((1e-4 + 1e-5) / 2)
    assert learning_rate(110, **keys) == pytest.approx(1e-5)
    assert learning_rate(500, **keys) == pytest.approx(1e-5)


def test_constant_without_warmup_is_constant():
    assert {
        learning_rate(step, schedule="constant", lr=2e-6, warmup_steps=0, total_steps=5) for step in range(9)
    } == {2e-6}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_schedule_counts_optimizer_steps(accumulation):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model.named_parameters(), lr=1.0, weight_decay=0.0)
    schedule = build_schedule(
        optimizer, schedule="cosine", warmup_steps=2, total_steps=6, warmup_lr=0.0, min_lr=0.1
    )
    seen = []
    for micro_batch in range(6 * accumulation):
        model(torch.ones(1, 2)).sum().backward()
        if (micro_batch + 1) % accumulation == 0:
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    expected = [0.0, 0.5, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]
    assert seen == pytest.approx(expected)


def test_schedule_state_restores_without_history():
    def fresh():
        optimizer = build_optimizer(torch.nn.Linear(2, 2).named_parameters(), lr=1.0, weight_decay=0.1)
        return optimizer, build_schedule(optimizer, schedule="cosine", warmup_steps=2, total_steps=9)

    optimizer, schedule = fresh()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again_optimizer, again = fresh()
    again_optimizer.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert again_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for pair in ((optimizer, schedule), (again_optimizer, again)):
        pair[0].step()
        pair[1].step()
    assert again_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"schedule": "linear", "warmup_steps": 0, "total_steps": 1},
            "optim.schedule='linear': allowed are cosine, constant",
        ),
        ({"schedule": "cosine", "warmup_steps": 7, "total_steps": 3}, "optim.warmup_steps=7.*total_steps=3"),
    ],
)
def test_errors_name_the_key(keys, message):
    optimizer = build_optimizer(torch.nn.Linear(2, 2).named_parameters(), lr=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=message):
        build_schedule(optimizer, **keys)
