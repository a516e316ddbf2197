"""A training run from start to end: build, resume, fit, write the model folder."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipdiff_train.config import TrainConfig

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from blipdiff_train.models.parts import ModelParts
    from blipdiff_train.stages.callbacks import StopSignals

EXIT_FAILED = 1
EXIT_NOT_SAVED = 74
"""The disk is full or read-only: a checkpoint, the log or a store could not be written; what was there is intact."""
EXIT_INTERRUPTED = 85
"""A signal stopped the run after a step, which is saved: run the same command again."""

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def run(config: TrainConfig, plain: Mapping[str, Any]) -> int:
    """Train until ``total_steps``; returns the exit code.

    Args:
        config: checked.
        plain: the same as plain data, for the checkpoint and the loggers.
    """
    from blipdiff_train.checkpoints.training import CheckpointError
    from blipdiff_train.common.distributed import RankFailed
    from blipdiff_train.data.datamodule import error_number, message_of
    from blipdiff_train.data.faults import TooManyBadSamples
    from blipdiff_train.stages.callbacks import NonFiniteLoss, RunInterrupted, StopSignals

    quiet()
    signals = StopSignals()
    signals.install()
    try:
        return train(config, plain, signals)
    except (RunInterrupted, CheckpointError, NonFiniteLoss, TooManyBadSamples, RankFailed) as error:
        if os.environ.get("BLIPDIFF_DEBUG") and error.__cause__ is not None:
            traceback.print_exc()
        # raised on every rank; the others end quietly, or Lightning's observer would kill rank 0 in mid-sentence
        if not is_main():
            return 0
        if isinstance(error, RunInterrupted):
            say(f"{error}; run the same command again to continue")
            return EXIT_INTERRUPTED
        say(f"stopped: {error}")
        not_saved = isinstance(error, CheckpointError) or error_number(error) in _UNWRITABLE
        return EXIT_NOT_SAVED if not_saved else EXIT_FAILED
    except (ValueError, OSError) as error:
        if os.environ.get("BLIPDIFF_DEBUG"):
            traceback.print_exc()
        words = f"stopped: {message_of(error)}\n(BLIPDIFF_DEBUG=1 shows where)"
        if is_main():
            say(words)
        else:  # it may have happened here alone, and rank 0 then only notices that this rank is gone
            print(f"rank {os.environ.get('RANK') or os.environ.get('LOCAL_RANK')} {words}", file=sys.stderr, flush=True)
        return EXIT_NOT_SAVED if error_number(error) in _UNWRITABLE else EXIT_FAILED
    finally:
        signals.uninstall()


def train(config: TrainConfig, plain: Mapping[str, Any], signals: StopSignals) -> int:
    """:func:`run` without the handling of errors."""
    from blipdiff_train import build
    from blipdiff_train.checkpoints import training as checkpoints
    from blipdiff_train.stages.resume import continue_from, find_checkpoint

    state = find_checkpoint(config.run_dir, config.resume, say, is_main=is_main())
    model_folder = Path(config.run_dir) / "model"
    step = 0 if state is None else state["step"]
    if step >= config.total_steps and model_folder.is_dir():
        say(f"this run is finished: {step} of {config.total_steps} steps, the model is in {model_folder}")
        say("nothing to do; raise total_steps to go on, or start over with resume=never")
        return 0

    if is_main():
        check_writable(config.run_dir)
    # models first: one that is not there should not be noticed after minutes of drawing toy shards
    parts = build.parts(config, say)
    module = build.module(config, parts)
    frozen = checkpoints.frozen_hashes(module)
    restore_frozen = build.lower_frozen(config, parts, keep=is_main())
    data = build.data_sources(config, say)
    datamodule = build.datamodule(config, parts, data)
    say(f"{build.batch_plan(config)}; {config.total_steps} steps; run folder {config.run_dir}")
    if state is None:
        say(str(module.trainable_report))
    else:
        checkpoints.restore_weights(module, state, stage=config.stage, frozen=frozen)
        say(f"continuing after step {step} of {config.total_steps}")
        for line in checkpoints.changed_keys(state["config"], plain):
            say(f"  changed since the checkpoint: {line}")

    if step < config.total_steps:
        loggers = build.loggers(config, plain, state) if is_main() else []
        try:
            has_validation = data.val_shards is not None
            trainer = build.trainer(
                config,
                plain,
                module,
                datamodule,
                loggers,
                state,
                signals,
                frozen,
                has_validation=has_validation,
                say=say,
            )
            continue_from(trainer, module, datamodule, state, total_steps=config.total_steps)
            trainer.fit(module, datamodule=datamodule)
        finally:
            datamodule.close()
            for logger in loggers:
                logger.close()
    if is_main():
        restore_frozen()
        save_model(config, module, parts, model_folder)
    return 0


def save_model(config: TrainConfig, module: pl.LightningModule, parts: ModelParts, folder: Path) -> None:
    """Write the model folder that later stages and commands read; with the averaged weights where they are kept."""
    from blipdiff_train import __version__
    from blipdiff_train.checkpoints.model_folder import save_model_folder

    metadata = {
        "stage": config.stage,
        "steps": config.total_steps,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "averaged": module.ema is not None,
        "blipdiff_train": __version__,
    }
    if config.stage == 2:
        metadata["template"] = config.subject.template
    with module.ema.swapped() if module.ema is not None else nullcontext():
        save_model_folder(folder, parts, metadata)
    say(f"finished: the model is in {folder}")


def check_writable(folder: str | Path) -> None:
    """Make the run's folder and try it, before anything heavy starts.

    Raises:
        OSError: it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(
            error.errno, f"the run's folder {folder} cannot be written ({error.strerror}); give another run_dir"
        ) from error


def is_main() -> bool:
    """Whether this is the first process of the run, told by what launchers put into the environment."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def quiet() -> None:
    """Keep advertisements of Lightning's, and remarks on what is meant to be so, out of the output; warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*in eval mode at the start of training.*",
        ".*isinstance.treespec.*",
        ".*does not have many workers.*",
        # the stages join the processes' values themselves: recall is no mean of the processes' recalls
        r".*sync_dist=True.*when logging on epoch level.*",
        # of 1 × 1 convolutions, whose strides mean nothing
        ".*Grad strides do not match bucket view strides.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)


def say(line: str) -> None:
    """A line for the person who runs this, once."""
    if is_main():
        print(line, flush=True)
