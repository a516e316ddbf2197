"""What happens around a training step: checks, numbers, pictures, signals and checkpoints.

The stages know nothing of these; a callback that needs something of the run (where its data stand, how to write a
checkpoint) is given a function by ``train``. Steps are counted in finished optimizer steps: row 200 of the log, the
validation, the pictures and the checkpoint "of step 200" all belong to the weights after 200 updates.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from blipdiff_train.checkpoints.training import CheckpointError
from blipdiff_train.common import distributed
from blipdiff_train.common.progress import clock
from blipdiff_train.data.faults import check_share
from blipdiff_train.stages.loggers import MetricsLogger

if TYPE_CHECKING:
    from tqdm import tqdm

    from blipdiff_train.stages.resume import Saver


class NonFiniteLoss(ValueError):
    """A loss or gradient became NaN or infinite; the weights are still those of the step before."""


class RunInterrupted(Exception):
    """A signal asked the run to stop; its checkpoint has been written."""


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Averaging(Callback):
    """Takes each step's weights into ``module.ema``, the averaged weights, and validates with these.

    They are put back before ``on_validation_end``, where checkpoints are written: those hold the weights themselves.
    """

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx):
            module.ema.update()

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.ema.swap_in()

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.ema.swap_out()


class FiniteCheck(Callback):
    """Stop on every rank, before the optimizer step, when a loss or gradient on any rank is not finite.

    A gradient can overflow under a finite loss. In fp16 it does so now and then; there the scaler skips the step.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._keys: list[list[str]] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._keys.append(list(batch.keys))

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        # one wait for the device a step, however many micro-batches
        values = torch.stack(self._losses).float()
        if trainer.precision != "16-mixed":
            gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            values = torch.cat([values, torch.nn.utils.get_total_norm(gradients).to(values)[None]])
        *finite, last = torch.isfinite(values).tolist()
        finite = [*finite, last][: len(self._losses)]
        keys, self._losses, self._keys = self._keys, [], []
        if not distributed.any_rank(not (all(finite) and last), device=module.device):
            return
        # gradients are those of all ranks: only where every loss is finite do they name the samples
        what = "loss" if distributed.any_rank(not all(finite), device=module.device) else "gradient"
        bad = [key for good, some in zip(finite, keys, strict=True) if what == "gradient" or not good for key in some]
        everywhere: list[list[str]] = [bad]
        if distributed.world_size() > 1:
            everywhere = [[] for _ in range(distributed.world_size())]
            dist.all_gather_object(everywhere, bad)
        names = [key for keys in everywhere for key in keys]
        more = f" and {len(names) - 16} more" if len(names) > 16 else ""
        raise NonFiniteLoss(
            f"the {what} of optimizer step {trainer.global_step + 1} is not finite; the step was not taken. "
            f"Samples of the bad micro-batches: {', '.join(names[:16])}{more}. Lower optim.lr or set "
            "optim.gradient_clip, use trainer.precision=32-true, or look at these samples"
        )


class FaultLimit(Callback):
    """Counts the samples that had to be replaced, over all ranks, and stops the run when they are too many.

    The counts go into the checkpoint and are compared with all samples of the run so far. The verdict is therefore one
    of the data: it depends neither on ranks and loaders nor on interruptions.

    Args:
        max_bad_fraction, quarantine: see ``data.faults.check_share``.
        samples_per_step: global batch size.
        start: step and position that the run continues from.
        causes: the counts until then.
    """

    def __init__(
        self,
        *,
        max_bad_fraction: float,
        quarantine: str | None,
        samples_per_step: int,
        start: tuple[int, int] = (0, 0),
        causes: Mapping[str, int] | None = None,
    ) -> None:
        self.causes = Counter(causes or {})
        """Replaced samples of all finished steps, by cause."""
        self.samples_per_step, (self.start_step, self.start_position) = samples_per_step, start
        self._limit = {"max_bad_fraction": max_bad_fraction, "quarantine": quarantine}
        self._new: Counter[str] = Counter()
        self._validation: Counter[str] = Counter()
        self._num_validated = 0

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._new.update(batch.faults)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        new, self._new = _over_ranks(self._new, module.device), Counter()
        if new:
            num_seen = self.start_position + (trainer.global_step + 1 - self.start_step) * self.samples_per_step
            check_share(self.causes + new, num_seen, **self._limit)
            self.causes += new

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation.update(batch.faults)
        self._num_validated += len(batch)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        causes, num_seen = _over_ranks(self._validation, module.device), self._num_validated * trainer.world_size
        self._validation, self._num_validated = Counter(), 0
        check_share(causes, num_seen, **self._limit)


def _over_ranks(counts: Counter[str], device: torch.device) -> Counter[str]:
    """The sum of all ranks' counts; all ranks must call it."""
    if not distributed.any_rank(bool(counts), device=device):
        return Counter()
    parts: list[Counter[str]] = [counts]
    if distributed.world_size() > 1:
        parts = [Counter() for _ in range(distributed.world_size())]
        dist.all_gather_object(parts, counts)
    return sum(parts, Counter())


class StepLog(Callback):
    """Numbers of a step, averaged over its micro-batches and all ranks, to every logger; and those of validations.

    Args:
        loggers: of rank 0; other ranks pass none.
        every: optimizer steps between rows; the last step is always logged.
        samples_per_step: global batch size.
        faults: gives the samples replaced so far, by cause.
    """

    def __init__(
        self,
        loggers: Sequence[MetricsLogger],
        *,
        every: int,
        samples_per_step: int,
        faults: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.loggers, self.every, self.samples_per_step = list(loggers), every, samples_per_step
        self._faults = faults
        self._micro: list[dict[str, Tensor]] = []
        self._extra: dict[str, Tensor | float] = {}
        self._ready = self._window_start = time.monotonic()
        self._waited, self._steps = 0.0, 0
        self.speed = 0.0
        """Samples a second over the last window."""
        self.wait_share = 0.0
        """Share of that time spent waiting for data."""

    def is_due(self, trainer: Trainer, step: int) -> bool:
        return step % self.every == 0 or step == trainer.max_steps

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._ready = self._window_start = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._ready

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        if not self.is_due(trainer, trainer.global_step + 1):
            return
        # the rate of this very step: after it the schedule has moved on
        self._extra = {"lr": optimizer.param_groups[0]["lr"]}
        self._extra |= {f"grad_norm/{part}": norm for part, norm in gradient_norms(module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        ends = ends_step(trainer, batch_idx)
        if self.is_due(trainer, step if ends else step + 1):
            metrics = trainer.callback_metrics.items()
            self._micro.append(
                {name: value.detach().float() for name, value in metrics if name.startswith("train/")}
            )
        if ends:
            self._steps += 1
            if self.is_due(trainer, step):
                self._write(module, step)
        self._ready = time.monotonic()

    def _write(self, module: LightningModule, step: int) -> None:
        names = sorted(self._micro[0])
        values = torch.stack(
            [torch.stack([micro[name].to(module.device) for name in names]) for micro in self._micro]
        )
        means = distributed.gather_no_grad(values.mean(0)[None]).mean(0).tolist()
        elapsed = max(1e-9, time.monotonic() - self._window_start)
        self.speed = self._steps * self.samples_per_step / elapsed
        self.wait_share = self._waited / elapsed
        row = dict(zip(names, means, strict=True)) | {
            name: float(value) for name, value in self._extra.items()
        }
        row |= {f"data/bad/{cause}": float(count) for cause, count in sorted(self._faults().items())}
        row |= {"time/samples_per_second": self.speed, "time/data_wait_share": self.wait_share}
        self._micro, self._waited, self._steps, self._window_start = [], 0.0, 0, time.monotonic()
        for logger in self.loggers:
            logger.log(row, step)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        metrics = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        for logger in self.loggers:
            if metrics:
                logger.log(metrics, trainer.global_step)
        self._ready = time.monotonic()


@torch.no_grad()
def gradient_norms(module: torch.nn.Module) -> dict[str, Tensor]:
    """L2 norm of the gradients of each top-level part that trains, before clipping."""
    norms: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            norms.setdefault(name.split(".")[0], []).append(torch.linalg.vector_norm(parameter.grad))
    return {part: torch.linalg.vector_norm(torch.stack(values)) for part, values in norms.items()}


class SampleGrids(Callback):
    """A picture of what the model makes, every so many optimizer steps, of the same held-out samples each time.

    Args:
        loggers: of rank 0; other ranks pass none.
        every: optimizer steps between pictures.
        first_batch: returns the batch whose samples are drawn.
    """

    def __init__(
        self, loggers: Sequence[MetricsLogger], *, every: int, first_batch: Callable[[], Any]
    ) -> None:
        self.loggers, self.every, self._first_batch = list(loggers), every, first_batch
        self._batch: Any = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = ends_step(trainer, batch_idx) and (step % self.every == 0 or step == trainer.max_steps)
        if not due or not trainer.is_global_zero:
            return
        if self._batch is None:
            self._batch = self._first_batch()
        # whatever the sampler draws from the global generator must not show in the steps that follow
        untouched = torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else [])
        with untouched, module.ema.swapped() if module.ema is not None else nullcontext():
            image = module.sample_grid(self._batch.to(module.device))
        for logger in self.loggers:
            logger.log_image("grid", image, step)


class StopSignals:
    """Turns SIGTERM and SIGUSR1 into a flag, so that a step can end and be saved before the run stops."""

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; called again, take them back from whoever has them now."""
        for number in self.NUMBERS:
            handler = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, handler)

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = number


class Checkpointing(Callback):
    """Save every so many optimizer steps, at the end, when a signal asks to stop, and when an error stops the run.

    A periodic checkpoint is written after the validation of its step, so that none is lost or repeated on resume.

    Args:
        save: writes the checkpoint of the current step.
        every: optimizer steps between checkpoints.
        validation_every: optimizer steps between validations, None without.
        signals: asked after each step.
        saved_step: step of the checkpoint that the run starts from.
    """

    def __init__(
        self,
        save: Saver,
        *,
        every: int,
        validation_every: int | None,
        signals: StopSignals,
        saved_step: int = 0,
    ) -> None:
        self._save, self.every, self.validation_every, self.signals = save, every, validation_every, signals
        self._saved_step = self._validated_step = saved_step
        self._updating = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.signals.install()  # Lightning has put its own handlers in place meanwhile

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (
            step != self._saved_step
            and step % self.every == 0
            and batch_idx % trainer.accumulate_grad_batches == 0
        ):
            self._write(step, validation_due=False)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._updating = False
        # after the last step the run ends anyway, and saves
        if not ends_step(trainer, batch_idx) or trainer.global_step == trainer.max_steps:
            return
        if distributed.any_rank(self.signals.received is not None, device=module.device):
            step = trainer.global_step
            self._write(step, validation_due=self._validation_due(step))
            raise RunInterrupted(f"stopped by a signal after step {step}, which is saved")

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self._updating = True  # until the end of the batch: weights, averages and optimizer may be of different steps

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """A shard that is gone, a loss that is not finite, Ctrl-C: the finished steps are kept.

        The other ranks may be anywhere; the first one has everything and writes without them.
        """
        step = trainer.global_step
        if self._updating or step == self._saved_step or isinstance(exception, CheckpointError):
            return
        if trainer.is_global_zero:
            if module.ema is not None:
                module.ema.swap_out()  # it may have happened in a validation, which runs with the averages
            problem = self._save.alone(self._validation_due(step))
            print(f"step {step} is saved" if problem is None else f"step {step} is not saved: {problem}", flush=True)

    def _validation_due(self, step: int) -> bool:
        due = self.validation_every is not None and step % self.validation_every == 0
        return due and step != self._validated_step

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._write(trainer.global_step, validation_due=False)

    def _write(self, step: int, *, validation_due: bool) -> None:
        self._save(validation_due)
        self._saved_step = step


class ProgressLine(Callback):
    """One line a person can read: stage, step, loss, speed, time left. A log file gets a line now and then instead.

    Args:
        title: what runs, e.g. "stage 1".
        step_log: where speed and the share of waiting come from.
        seconds: between lines when the output is no terminal.
    """

    def __init__(self, title: str, step_log: StepLog, *, seconds: float = 15.0) -> None:
        self.title, self.step_log, self.seconds = title, step_log, seconds
        self._bar: tqdm | None = None
        self._last_line = self._start = 0.0
        self._first_step = 0
        self._words = "…"  # until the first logged step

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = self._last_line = time.monotonic()
        self._first_step = trainer.global_step
        if trainer.is_global_zero and sys.stderr.isatty():
            from tqdm import tqdm

            # a terminal that does not know its width (a container's, a recorder's) would show nothing
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            form = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} steps  {postfix[0]}  {remaining} left"
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                desc=self.title,
                bar_format=form,
                postfix=[""],
                dynamic_ncols=width > 0,
                ncols=None if width > 0 else 100,
                nrows=None if width > 0 else 24,
                leave=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        if self.step_log.is_due(trainer, step) and "train/loss" in trainer.callback_metrics:
            loss, log = float(trainer.callback_metrics["train/loss"]), self.step_log
            self._words = f"loss {loss:.4g}  {log.speed:.1f} samples/s  data wait {log.wait_share:.0%}"
        if self._bar is not None:
            self._bar.postfix[0] = self._words
            self._bar.update(1)
        elif time.monotonic() - self._last_line >= self.seconds or step == trainer.max_steps:
            self._last_line = time.monotonic()
            per_step = (self._last_line - self._start) / max(1, step - self._first_step)
            left = per_step * (trainer.max_steps - step)
            self._print(f"{self.title}: step {step}/{trainer.max_steps}  {self._words}  {clock(left)} left")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {
            name[4:]: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._print(f"{self.title}: validation at step {trainer.global_step}: {shown}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)
