"""What a training run can be told, through the command line and in processes of its own: nothing is asked in vain."""

from __future__ import annotations

import csv
import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from pathlib import Path

import pytest
import tiny
from PIL import Image
from runs import configure, fit
from safetensors.numpy import load_file

from blipdiff_train import train
from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint

LOG = "metrics.csv"


def words(world: Path, output: Path, stage: int, *more: str) -> list[str]:
    return [*tiny.overrides(world / "models", world / "data", output, stage), *more]


def rows(file: Path) -> list[dict[str, float]]:
    with file.open() as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_everything_at_once(world, tmp_path) -> None:
    """bf16 with bf16 frozen parts, recomputed activations, averages, accumulation, pictures and all three loggers."""
    options = [
        "trainer.precision=bf16-mixed",
        "trainer.frozen_precision=bf16",
        "trainer.gradient_checkpointing=true",
        "trainer.max_micro_batch=2",
        "optim.ema_decay=0.9",
        "every.samples=3",
        "logger.tensorboard=true",
        "logger.wandb=true",
        "logger.wandb_mode=offline",
    ]
    done = tiny.run(*words(world, tmp_path, 2, *options), WANDB_SILENT="true")
    assert "global batch 4 = 1 process × micro-batch 2 × accumulation 2; 6 steps" in done.stdout
    assert not done.stderr, done.stderr  # no warnings
    run = tmp_path / "stage2" / "default"
    training, validation = rows(run / LOG), rows(run / "validation.csv")
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in validation] == [3, 6]
    parts = ("qformer", "projection", "text_encoder", "unet")
    names = {"train/loss", "train/loss_noise", "lr", *(f"grad_norm/{part}" for part in parts)}
    for row in training:
        assert names | {"time/samples_per_second", "time/data_wait_share"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert row["time/samples_per_second"] > 0.0
        assert 0.0 <= row["time/data_wait_share"] <= 1.0
    assert [row["lr"] for row in training[:3]] == pytest.approx([0.0, 0.0005, 0.001])
    for step in (3, 6):
        with Image.open(run / "samples" / f"grid-{step:08d}.png") as grid:
            assert min(grid.size) > 100

    # TensorBoard has the same numbers and pictures
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/loss", "grad_norm/unet"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in training]
    assert [event.step for event in events.Scalars("val/loss_noise")] == [3, 6]
    assert [event.step for event in events.Images("grid")] == [3, 6]
    # and so has W&B, under the id that a later start continues
    identity = (run / "wandb_run_id").read_text().strip()
    [offline] = (run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    assert offline.stat().st_size > 1000

    # frozen parts ran rounded and are saved as they were; trained parts are the averages, in full precision
    original = load_file(world / "models" / "stable_diffusion" / "vae" / "diffusion_pytorch_model.safetensors")
    saved = load_file(run / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == original.keys()
    assert all((saved[name] == original[name]).all() for name in original)
    unet = load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    average = read_checkpoint(checkpoint_path(run / "checkpoints", 6))["average"]
    assert {str(tensor.dtype) for tensor in unet.values()} == {"float32"}
    assert all((average[f"unet.{name}"].numpy() == tensor).all() for name, tensor in unet.items())


@pytest.mark.slow
def test_two_processes_in_a_terminal(world, tmp_path) -> None:
    """Two gloo processes; the bar is on one line that says what a person wants to know, and no warning breaks it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    job = subprocess.Popen(
        tiny.command(*words(world, tmp_path, 1, "trainer.devices=2", "trainer.frozen_precision=bf16")),
        stdout=subprocess.PIPE,
        stderr=slave,
        cwd=tiny.REPOSITORY,
        text=True,
    )
    os.close(slave)
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(master, shown))
    reader.start()
    output, _ = job.communicate(timeout=500)
    reader.join(timeout=10)
    assert job.returncode == 0, output
    assert output.count("global batch 4 = 2 processes × micro-batch 2 × accumulation 1") == 1
    lines = [line.strip() for line in re.split(r"[\r\n]+", b"".join(shown).decode()) if line.strip()]
    bar = r"stage 1 +\d+%\|[█▏▎▍▌▋▊▉ ]{24}\| \d+/6 steps .*left"
    assert [line for line in lines if not re.fullmatch(bar, line)] == []
    last = r"100%\|█{24}\| 6/6 steps +loss [\d.]+  [\d.]+ samples/s  data wait \d+%  00:00 left"
    assert re.search(last, lines[-1]), lines[-1]
    validations = re.findall(r"stage 1: validation at step (\d): loss_itc [\d.]+  .*t2i_r10 [\d.]+", output)
    assert validations == ["3", "6"]  # one process speaks
    # the tower that ran in bf16 is in the model folder as it was
    original = load_file(world / "models" / "clip" / "model.safetensors")
    saved = load_file(tmp_path / "stage1" / "default" / "model" / "qformer" / "model.safetensors")
    name = "embeddings.class_embedding"
    theirs = next(tensor for key, tensor in original.items() if key.endswith(name))
    ours = next(tensor for key, tensor in saved.items() if key.endswith(name))
    assert (theirs.ravel() == ours.ravel()).all()


def _read_all(master: int, into: list[bytes]) -> None:
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            return
        into.append(data)


@pytest.mark.parametrize("stage", [1, 2])
def test_recomputed_activations_change_no_number(world, tmp_path, stage) -> None:
    """With dropout: the second forward must draw what the first drew."""
    kept, recomputed = (
        rows(fit(world, tmp_path / on, stage, "every.validation=null", f"trainer.gradient_checkpointing={on}") / LOG)
        for on in ("false", "true")
    )
    for first, second in zip(kept, recomputed, strict=True):
        assert second["train/loss"] == pytest.approx(first["train/loss"], rel=1e-6)
        assert second["grad_norm/qformer"] == pytest.approx(first["grad_norm/qformer"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_diverges_stops_with_its_samples_named(world, tmp_path) -> None:
    """The first step takes the weights far away; the second is not taken, by neither of two processes."""
    options = ["optim.lr=1e30", "optim.gradient_clip=null", "optim.warmup_steps=0", "optim.min_lr=0"]
    done = tiny.run(*words(world, tmp_path, 1, *options, "trainer.devices=2"), check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("stopped:")]
    assert "of optimizer step 2 is not finite; the step was not taken" in line
    keys = line.split("micro-batches: ")[1].split(".")[0].split(", ")
    assert len(set(keys)) == 4, line
    assert all(re.fullmatch(r"\d{5}", key) for key in keys)
    assert "Traceback" not in done.stdout + done.stderr


def test_a_gradient_that_overflows_under_a_finite_loss_stops_too(world, tmp_path, monkeypatch, capsys) -> None:
    from blipdiff_train.stages.stage2 import Stage2Module

    honest = Stage2Module.noise_losses

    def steep(self, batch):
        losses, weights = honest(self, batch)
        if 9 in batch.positions:
            losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses, weights

    monkeypatch.setattr(Stage2Module, "noise_losses", steep)
    config, plain = configure(world, tmp_path, 2, "trainer.max_micro_batch=2")
    assert train.run(config, plain) == train.EXIT_FAILED
    assert "the gradient of optimizer step 3 is not finite; the step was not taken" in capsys.readouterr().out
    assert [row["step"] for row in rows(Path(config.run_dir) / LOG)] == [1, 2]
