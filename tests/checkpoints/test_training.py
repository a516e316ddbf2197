"""A checkpoint is whole or not there; what is damaged or foreign is refused, and nothing in it is executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from blipdiff_train.checkpoints import training
from blipdiff_train.stages.optim import build_optimizer, build_schedule


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qformer = torch.nn.Linear(3, 4)
        self.vae = torch.nn.Linear(2, 2).requires_grad_(False)


def parts(seed: int = 0, lr: float = 0.1):
    torch.manual_seed(seed)
    module = Small()
    torch.manual_seed(0)
    with torch.no_grad():
        module.vae.weight.copy_(torch.randn(2, 2))
        module.vae.bias.zero_()
    optimizer = build_optimizer(module.named_parameters(), lr=lr, weight_decay=0.1)
    return module, optimizer, build_schedule(optimizer, schedule="cosine", warmup_steps=1, total_steps=10)


def step(module, optimizer, schedule) -> None:
    module.qformer(torch.ones(1, 3)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def state(number: int, *, module=None, optimizer=None, schedule=None, **more):
    if module is None:
        module, optimizer, schedule = parts()
        step(module, optimizer, schedule)
    keys = {"stage": 1, "step": number, "position": 4 * number, "config": {"seed": 0, "betas": [0.9, 0.99]}}
    return training.pack(module, optimizer, schedule, frozen=training.frozen_hashes(module), **(keys | more))


def test_there_and_back(tmp_path):
    path = training.write_checkpoint(tmp_path, state(3), keep=2)
    found = training.read_checkpoint(path)
    assert (found["step"], found["position"], found["config"]) == (3, 12, {"seed": 0, "betas": [0.9, 0.99]})
    assert set(found["weights"]) == {"qformer.weight", "qformer.bias"}
    assert set(found["frozen"]) == {"vae"}


def test_only_the_newest_are_kept(tmp_path):
    for number in (1, 2, 3, 4):
        training.write_checkpoint(tmp_path, state(number), keep=2)
    assert training.steps_in(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-0000000{number}.{suffix}" for number in (3, 4) for suffix in ("json", "pt")
    ]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "its content has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes, "),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "its content has changed"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes"),
        (lambda path: path.with_suffix(".json").unlink(), "it was not finished"),
        (lambda path: path.with_suffix(".json").write_text("{"), "its .json cannot be read"),
    ],
    ids=["flipped bit", "truncated", "zeros", "empty", "unfinished", "description"],
)
def test_a_damaged_one_is_passed_over(tmp_path, damage, words):
    training.write_checkpoint(tmp_path, state(1), keep=3)
    damage(training.write_checkpoint(tmp_path, state(2), keep=3))
    said = []
    path, found = training.latest_valid(tmp_path, said.append)
    assert found["step"] == 1
    assert path.name == "step-00000001.pt"
    assert len(said) == 1
    assert words in said[0]
    assert "falling back" in said[0]


def test_a_pickled_payload_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = training.write_checkpoint(tmp_path, state(1), keep=1)
    torch.save({"format": training.FORMAT, "step": Payload()}, path)
    description = {"bytes": path.stat().st_size, "sha256": training.sha256_file(path)}
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(training.CheckpointError, match="more than tensors and primitives"):
        training.read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_class_name_in_the_configuration_stays_a_text(tmp_path):
    config = {"_target_": "os.system", "command": "true"}
    path = training.write_checkpoint(tmp_path, state(1, config=config), keep=1)
    assert training.read_checkpoint(path)["config"] == config


def test_only_plain_data_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"state\['config'\]\['path'\] is a PosixPath"):
        training.write_checkpoint(tmp_path, state(1, config={"path": tmp_path}), keep=1)
    assert not training.steps_in(tmp_path)


def test_a_process_killed_while_writing_leaves_the_one_before(tmp_path):
    """The temporary file of a killed process is no checkpoint, and goes with the next one."""
    training.write_checkpoint(tmp_path, state(1), keep=2)
    code = (
        "import os, signal, sys, torch; from blipdiff_train.checkpoints import training; honest = torch.save\n"
        "def half(state, file):\n    file.write(b'x' * 1000); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "training.torch.save = half\n"
        "training.write_checkpoint(sys.argv[1], {'step': 2}, keep=2)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert len(list(tmp_path.glob(".step-*"))) == 1
    assert training.latest_valid(tmp_path, print)[1]["step"] == 1
    training.write_checkpoint(tmp_path, state(3), keep=2)
    assert not list(tmp_path.glob(".step-*"))


def test_restoring_gives_the_same_next_step(tmp_path):
    module, optimizer, schedule = parts(seed=1)
    for _ in range(3):
        step(module, optimizer, schedule)
    saved = training.read_checkpoint(
        training.write_checkpoint(
            tmp_path, state(3, module=module, optimizer=optimizer, schedule=schedule), keep=1
        )
    )
    again = parts(seed=2)
    training.restore_weights(again[0], saved, stage=1, frozen=training.frozen_hashes(again[0]))
    training.restore_optimizer(*again, saved)
    assert again[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for _ in range(3):
        step(module, optimizer, schedule)
        step(*again)
    assert torch.equal(module.qformer.weight, again[0].qformer.weight)
    assert again[2].get_last_lr() == schedule.get_last_lr()


def test_a_changed_learning_rate_is_taken_from_the_configuration():
    module, optimizer, schedule = parts()
    step(module, optimizer, schedule)
    saved = state(1, module=module, optimizer=optimizer, schedule=schedule)
    again = parts(lr=0.2)
    training.restore_optimizer(*again, saved)
    assert again[1].param_groups[0]["lr"] == pytest.approx(2 * optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda module: module.qformer.bias.requires_grad_(False), "unexpected: qformer.bias"),
        (lambda module: module.vae.bias.requires_grad_(True), "missing: vae.bias"),
        (lambda module: setattr(module, "qformer", torch.nn.Linear(3, 5)), "shapes differ: qformer.weight"),
        (lambda module: module.vae.weight.data.add_(1), "the frozen weights of vae are not those"),
    ],
)
def test_another_model_is_refused(change, words):
    saved = state(1)
    module = parts()[0]
    change(module)
    with pytest.raises(training.CheckpointError, match=words):
        training.restore_weights(module, saved, stage=1, frozen=training.frozen_hashes(module))


def test_another_stage_is_refused():
    module = parts()[0]
    with pytest.raises(training.CheckpointError, match="it is of stage 1, this run is stage 2"):
        training.restore_weights(module, state(1), stage=2, frozen=training.frozen_hashes(module))


def test_changed_keys():
    assert training.changed_keys({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == [
        "b.c: 2 → 3",
        "d: None → 4",
    ]
