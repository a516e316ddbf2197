"""N steps, a stop, N more steps: the same bits as 2 N steps; with real kills, in one process and in two.

Everything runs on a model of a few thousand weights, through the command line's own code. ``scripts/chaos.py`` is the
long version: it takes the real toy models and as many kills as one likes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from runs import Meanwhile, StopAfter, configure, fit

from blipdiff_train import train
from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint, steps_in
from blipdiff_train.stages import callbacks

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("stage", [1, 2])
def test_stops_and_starts_leave_no_trace(world, tmp_path, chaos, stage):
    """Twice interrupted, once just before a validation, with loader processes and accumulation changed on the way."""
    more = ("optim.ema_decay=0.9", "trainer.max_micro_batch=2", "every.checkpoint=4")
    quiet = fit(world, tmp_path / "quiet", stage, *more)
    parts = tmp_path / "parts"
    folder = fit(world, parts, stage, *more, stop_after=3)  # validation of step 3 is still due
    assert steps_in(folder / "checkpoints") == [3]
    assert read_checkpoint(checkpoint_path(folder / "checkpoints", 3))["validation_due"]
    fit(world, parts, stage, *more, "data.workers=2", stop_after=2)
    fit(world, parts, stage, *more)
    assert chaos.differences(quiet, folder) == []
    assert [int(row["step"]) for row in chaos.rows(folder / "metrics.csv")] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in chaos.rows(folder / "validation.csv")] == [3, 6]
    assert read_checkpoint(checkpoint_path(folder / "checkpoints", 6))["position"] == 24


def test_dropout_is_on_in_what_is_compared(world, tmp_path):
    """The exactness above would be cheap without any randomness in the step."""
    with_dropout = fit(
        world, tmp_path / "a", 1, "total_steps=1", "optim.warmup_steps=0", "every.validation=null"
    )
    without = fit(
        world,
        tmp_path / "b",
        1,
        "total_steps=1",
        "optim.warmup_steps=0",
        "every.validation=null",
        "model.qformer.dropout=0.0",
    )
    loss = [(run / "metrics.csv").read_text().splitlines()[1] for run in (with_dropout, without)]
    assert loss[0] != loss[1]


def test_accumulation_leaves_the_samples_and_the_schedule_alone(world, tmp_path, chaos):
    """Stage 2's loss is a mean over samples: it must not depend on how a global batch is cut."""
    more = ("every.validation=null", "model.qformer.dropout=0.0")
    whole = chaos.rows(fit(world, tmp_path / "a", 2, *more) / "metrics.csv")
    cut = chaos.rows(fit(world, tmp_path / "b", 2, *more, "trainer.max_micro_batch=1") / "metrics.csv")
    assert [row["lr"] for row in whole] == [row["lr"] for row in cut]
    # the first step's loss is of the initial weights; dropout in the projection is drawn per micro-batch
    assert float(whole[0]["train/loss"]) == pytest.approx(float(cut[0]["train/loss"]), rel=2e-2)


def test_a_finished_run_says_so(world, tmp_path, capsys):
    fit(world, tmp_path, 1, "total_steps=2", "optim.warmup_steps=0")
    capsys.readouterr()
    folder = fit(world, tmp_path, 1, "total_steps=2", "optim.warmup_steps=0")
    assert "this run is finished: 2 of 2 steps" in capsys.readouterr().out
    fit(world, tmp_path, 1, "total_steps=3", "optim.warmup_steps=0")
    assert "changed since the checkpoint: total_steps: 2 → 3" in capsys.readouterr().out
    fit(world, tmp_path, 1, "total_steps=2", "optim.warmup_steps=0", "resume=never")
    assert (folder / "previous-1" / "checkpoints").is_dir()
    assert steps_in(folder / "checkpoints") == [2]


def test_a_damaged_checkpoint_is_passed_over(world, tmp_path, chaos, capsys):
    quiet = fit(world, tmp_path / "quiet", 1, "total_steps=4")
    folder = fit(world, tmp_path / "hurt", 1, "total_steps=4", stop_after=3)
    newest = checkpoint_path(folder / "checkpoints", 3)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    fit(world, tmp_path / "hurt", 1, "total_steps=4")
    out = capsys.readouterr().out
    assert "its content has changed since it was written" in out
    assert "continuing after step 2 of 4" in out
    assert chaos.differences(quiet, folder) == []


def test_other_frozen_weights_are_refused(world, tmp_path):
    fit(world, tmp_path / "run", 1, "total_steps=2", "optim.warmup_steps=0")
    config, plain = configure(world, tmp_path / "run", 1, "model.skip_last_layers=0")
    with pytest.raises(ValueError, match="the frozen weights of image_encoder are not those"):
        train.train(config, plain, StopAfter(None))


def test_a_loss_that_is_not_finite_stops_before_the_step(world, tmp_path, monkeypatch, capsys):
    from blipdiff_train.stages.stage2 import Stage2Module

    honest = Stage2Module.noise_losses

    def spoiled(self, batch):
        losses, weights = honest(self, batch)
        return losses * (float("nan") if 9 in batch.positions else 1.0), weights

    monkeypatch.setattr(Stage2Module, "noise_losses", spoiled)
    config, plain = configure(world, tmp_path, 2, "trainer.max_micro_batch=2", "every.checkpoint=100")
    assert train.run(config, plain) == train.EXIT_FAILED
    out = capsys.readouterr().out
    assert "the loss of optimizer step 3 is not finite; the step was not taken" in out
    keys = out.split("bad micro-batches: ")[1].split(".")[0].split(", ")
    assert len(keys) == 2  # one micro-batch of two
    assert steps_in(Path(config.run_dir) / "checkpoints") == [2]  # what was finished is kept


def test_an_interrupt_from_the_keyboard_keeps_the_finished_steps(world, tmp_path, chaos, monkeypatch):
    more = ("every.checkpoint=100", "optim.ema_decay=0.9")
    quiet = fit(world, tmp_path / "quiet", 1, *more)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks, "StopSignals", lambda: Meanwhile(3, interrupt))
    config, plain = configure(world, tmp_path / "parts", 1, *more)
    with pytest.raises(SystemExit) as stop:
        train.run(config, plain)
    assert stop.value.code == 1
    assert steps_in(Path(config.run_dir) / "checkpoints") == [3]
    assert read_checkpoint(checkpoint_path(Path(config.run_dir) / "checkpoints", 3))["validation_due"]
    monkeypatch.undo()
    assert chaos.differences(quiet, fit(world, tmp_path / "parts", 1, *more)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [(1, 2), (2, 1)])
def test_killed_runs_end_in_the_same_bits(world, tmp_path, stage, processes):
    """SIGKILL at random moments and while a checkpoint is written, one process and two."""
    settings = tiny.overrides(world / "models", world / "data", tmp_path, stage)
    settings += ["optim.ema_decay=0.9", "total_steps=12"]
    words = [
        "--kills",
        "4",
        "--processes",
        str(processes),
        "--output",
        str(tmp_path / "chaos"),
        "--",
        *settings,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos.py"), *words],
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n4 kills, " in done.stdout
    assert "; 5 starts; 12 steps; " in done.stdout
    assert "differences: none" in done.stdout
