"""Where a run starts: the checkpoint it continues from, and Lightning's counters set to it.

Lightning's own way (``ckpt_path``) is not taken: it stores loop, loader and callback states as objects of its own and
loses the loader's when anything reads ``estimated_stepping_batches``. Here a run is two numbers, steps done and samples
consumed; everything else follows from them and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from blipdiff_train.checkpoints.training import (
    CheckpointError,
    checkpoint_path,
    latest_valid,
    pack,
    read_checkpoint,
    restore_optimizer,
    steps_in,
    write_checkpoint,
)
from blipdiff_train.common import distributed

if TYPE_CHECKING:
    from blipdiff_train.data.datamodule import ShardDataModule
    from blipdiff_train.stages.loggers import MetricsLogger

KEPT_ASIDE = (
    "checkpoints",
    "metrics.csv",
    "validation.csv",
    "samples",
    "quarantine.jsonl",
    "tensorboard",
    "wandb",
    "wandb_run_id",
    "model",
)
"""What a run that starts over moves out of its way."""


TAKEN_BACK = ("model", "wandb", "wandb_run_id")
"""What belongs to the steps that a run gives up when it is taken back; W&B cannot take them back: a new run there."""


def find_checkpoint(
    run_dir: str | Path, resume: str, say: Callable[[str], None], *, is_main: bool
) -> dict[str, Any] | None:
    """The checkpoint to continue from, None for a fresh start.

    Args:
        resume: ``auto``: the newest valid one of the run. ``never``: none; what the run had is moved to
            ``previous-<n>``. Otherwise a checkpoint file or a run folder: one of this run's own takes it back to there,
            one of another run is a start that later checkpoints of this run take over from.
        is_main: whether this process may move things.

    Raises:
        CheckpointError: the checkpoint asked for is not there or cannot be used.
    """
    run_dir = Path(run_dir)
    own = run_dir / "checkpoints"
    if resume == "never":
        if is_main:
            _set_aside([run_dir / name for name in KEPT_ASIDE], run_dir, say)
        return None
    if resume == "auto":
        found = latest_valid(own, say)
        if found is None and steps_in(own):
            raise CheckpointError(f"no checkpoint in {own} is whole; start over with resume=never")
        return None if found is None else found[1]

    path = Path(resume)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = latest_valid(folder, say)
        if found is None:
            raise CheckpointError(f"resume={resume}: there is no valid checkpoint in {folder}")
        path, state = found
    elif path.is_file():
        state = read_checkpoint(path)
    else:
        raise CheckpointError(
            f"resume={resume}: there is no such checkpoint; allowed are auto, never, a file or a folder"
        )
    if path.resolve().parent == own.resolve():
        later = [checkpoint_path(own, step) for step in steps_in(own) if step > state["step"]]
        if is_main and later:
            files = [file.with_suffix(suffix) for file in later for suffix in (".json", ".pt")]
            _set_aside([*files, *(run_dir / name for name in TAKEN_BACK)], run_dir, say)
        return {**state, "wandb_run_id": None} if later else state
    progress = latest_valid(own, say)
    if progress is not None:
        say(f"this run has gone on from {resume} before: continuing it")
        return progress[1]
    return {**state, "wandb_run_id": None}


def _set_aside(paths: list[Path], run_dir: Path, say: Callable[[str], None]) -> None:
    there = [path for path in paths if path.exists()]
    if not there:
        return
    number = 1
    while (run_dir / f"previous-{number}").exists():
        number += 1
    folder = run_dir / f"previous-{number}"
    folder.mkdir(parents=True)
    for path in there:
        path.rename(folder / path.name)
    say(f"what the run had before is kept in {folder}")


def continue_from(
    trainer: Trainer,
    module: LightningModule,
    datamodule: ShardDataModule,
    state: Mapping[str, Any] | None,
    *,
    total_steps: int,
) -> None:
    """Set counters, data position and averages to a checkpoint; optimizer and schedule follow when they exist.

    The weights have been restored before: what wraps the module copies them.
    """
    if state is None:
        return
    step, position = state["step"], state["position"]
    batches = step * trainer.accumulate_grad_batches
    epoch_loop = trainer.fit_loop.epoch_loop
    progress = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step
    epoch_loop._batches_that_stepped = step
    total = epoch_loop.batch_progress.total
    # validation is due by this count
    total.ready = total.started = total.processed = total.completed = batches
    size = datamodule.global_batch_size
    datamodule.set_position(position)
    # the loader ends where the steps end, also after a change of the global batch size
    datamodule.total_steps = -(-position // size) + total_steps - step
    if module.ema is not None and state["average"]:
        module.ema.load_state_dict(state["average"])
    trainer.callbacks.insert(0, RestoreOptimizer(state))


class RestoreOptimizer(Callback):
    """Gives optimizer, schedule and gradient scaler their state once they exist, and makes up a missed validation."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state: Mapping[str, Any] | None = state

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        state, self._state = self._state, None
        if state is None:
            return
        _check_agreement(state)
        if state.get("data") not in (None, trainer.datamodule.fingerprint()):
            rank_zero_warn(
                "the shards (names or sample counts) or mixing weights are not those of the checkpoint: the run goes "
                f"on at position {state['position']} of the new order, so some samples come again and some are left out"
            )
        restore_optimizer(module, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler, state)
        if state["precision"]:
            trainer.precision_plugin.load_state_dict(dict(state["precision"]))
        if state["validation_due"] and trainer.enable_validation:
            first = trainer._logger_connector._first_loop_iter
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first


class Saver:
    """Writes the checkpoint of the current step.

    Args:
        folder: of the run; checkpoints go into ``checkpoints/`` below it.
        keep: newest checkpoints kept.
        stage, samples_per_step, config, frozen: see ``checkpoints.training.pack``.
        start: step and position that the run continues from.
        data: gives the datamodule's fingerprint.
        faults: gives the samples replaced so far, by cause.
        loggers: of rank 0; their files are brought to the disk first, so that the log is never behind.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        folder: str | Path,
        keep: int,
        stage: int,
        samples_per_step: int,
        config: Mapping[str, Any],
        frozen: Mapping[str, str],
        start: tuple[int, int],
        data: Callable[[], str],
        faults: Callable[[], Mapping[str, int]],
        loggers: Sequence[MetricsLogger],
    ) -> None:
        self.trainer, self.module = trainer, module
        self.folder, self.keep = Path(folder) / "checkpoints", keep
        self.stage, self.samples_per_step = stage, samples_per_step
        self.config, self.frozen, self.loggers = config, frozen, list(loggers)
        self.start_step, self.start_position = start
        self.data, self.faults = data, faults

    def __call__(self, validation_due: bool) -> None:
        """On rank 0; every rank calls it and learns whether it worked.

        Raises:
            CheckpointError: on every rank, when it could not be written.
        """
        problem = distributed.broadcast_object(self.alone(validation_due) if self.trainer.is_global_zero else None)
        if problem is not None:
            raise CheckpointError(problem)

    def alone(self, validation_due: bool) -> str | None:
        """On this rank, without a word to the others; returns what went wrong."""
        try:
            for logger in self.loggers:
                logger.flush()
            write_checkpoint(self.folder, self._state(validation_due), keep=self.keep)
        except (CheckpointError, OSError) as error:
            return str(error)
        return None

    def _state(self, validation_due: bool) -> dict[str, Any]:
        step = self.trainer.global_step
        run_ids = [logger.run_id for logger in self.loggers if hasattr(logger, "run_id")]
        return pack(
            self.module,
            self.trainer.optimizers[0],
            self.trainer.lr_scheduler_configs[0].scheduler,
            stage=self.stage,
            step=step,
            position=self.start_position + (step - self.start_step) * self.samples_per_step,
            frozen=self.frozen,
            config=self.config,
            data=self.data(),
            faults=self.faults(),
            average=None if self.module.ema is None else self.module.ema.state_dict(),
            precision=self.trainer.precision_plugin.state_dict(),
            validation_due=validation_due,
            wandb_run_id=run_ids[0] if run_ids else None,
        )


def _check_agreement(state: Mapping[str, Any]) -> None:
    """All ranks must have read the same checkpoint: with a folder that is not shared they would not."""
    if distributed.world_size() == 1:
        return
    steps: list[int] = [0] * distributed.world_size()
    dist.all_gather_object(steps, state["step"])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the ranks found checkpoints of steps {steps}; run_dir must be on a file system that all machines share"
        )
