"""Training checkpoints: tensors and primitives only, written whole or not at all, checked before they are used.

``step-00000200.pt`` holds what the run needs to go on; ``step-00000200.json`` beside it is written after it and holds
its size and SHA-256. A file without its description was never finished. What is in it (DESIGN §5): trainable weights,
their average, optimizer, schedule, step, position in the data, bad samples so far, W&B run id, the resolved
configuration as plain data, and hashes of the frozen parts, which are not stored.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blipdiff_train.common.files import atomic_path, sha256_file, sha256_tensors, write_json

FORMAT = "blipdiff_train checkpoint 1"
_NAME = re.compile(r"step-(\d{8,})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


# ---- files ---------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}.pt"


def steps_in(folder: str | Path) -> list[int]:
    """Steps of the checkpoint files in ``folder``, oldest first, valid or not."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def write_checkpoint(folder: str | Path, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write ``state`` as the checkpoint of its step, then delete all but the newest ``keep``.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full. Earlier checkpoints are untouched.
        TypeError: something in ``state`` is neither a tensor nor a primitive; its place is named.
    """
    _check_plain(state, "state")
    folder, step = Path(folder), int(state["step"])
    path = checkpoint_path(folder, step)
    try:
        for half in folder.glob(".step-*.tmp*"):
            half.unlink()  # of a process that was killed while writing
        # a file of this step from before a fall-back to an older one loses its description first
        path.with_suffix(".json").unlink(missing_ok=True)
        with atomic_path(path) as temporary:
            with temporary.open("wb") as file:  # through Python, or a full disk is but "unexpected pos 128 vs 0"
                torch.save(dict(state), file)
            digest, size = sha256_file(temporary), temporary.stat().st_size
        write_json(
            path.with_suffix(".json"), {"format": FORMAT, "step": step, "sha256": digest, "bytes": size}
        )
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into a RuntimeError and keeps the cause in its context
        causes = [item for item in (error, error.__context__, error.__cause__) if isinstance(item, OSError)]
        full = any(item.errno in (errno.ENOSPC, errno.EDQUOT) for item in causes)
        reason = "the disk is full" if full else str(causes[0] if causes else error)
        kept = steps_in(folder)
        earlier = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: {reason}; {earlier}. "
            "Make room or give another run_dir, then run the same command again"
        ) from error
    for old in steps_in(folder)[:-keep]:
        for suffix in (".json", ".pt"):
            checkpoint_path(folder, old).with_suffix(suffix).unlink(missing_ok=True)
    return path


def _check_plain(value: Any, place: str) -> None:
    """Raise unless ``value`` is made of tensors, primitives and containers, so that weights_only can read it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_plain(name, f"a key of {place}")
            _check_plain(item, f"{place}[{name!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif not isinstance(value, (Tensor, str, int, float, bool, type(None))):
        raise TypeError(
            f"{place} is a {type(value).__name__}; a checkpoint holds tensors and primitives only"
        )


def verify(path: str | Path) -> str | None:
    """What is wrong with a checkpoint file, None if it is as it was written."""
    path = Path(path)
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size, digest = description["bytes"], description["sha256"]
    except FileNotFoundError:
        return "it was not finished (its .json is missing)"
    except (OSError, ValueError, KeyError, TypeError):
        return "its .json cannot be read"
    if not path.is_file():
        return "the file is missing"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes, {size} were written"
    if sha256_file(path) != digest:
        return "its content has changed since it was written (SHA-256)"
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The verified content of a checkpoint file, tensors on the CPU; nothing in it is executed or instantiated.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this program.
    """
    path = Path(path)
    problem = verify(path)
    if problem:
        raise CheckpointError(f"{path} cannot be used: {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what it likes
        raise CheckpointError(
            f"{path} cannot be used: it holds more than tensors and primitives, or is damaged"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} cannot be used: it is not a {FORMAT!r} but {found!r}")
    return state


def latest_valid(folder: str | Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is whole, with its content; None if there is none.

    Args:
        say: told about every newer one that had to be passed over.
    """
    for step in reversed(steps_in(folder)):
        path = checkpoint_path(folder, step)
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            say(f"{error}; falling back to the one before it")
    return None


# ---- content -------------------------------------------------------------------------------------------------------


def trainable_names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def frozen_hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of the frozen parameters and buffers of each top-level part that has any."""
    trainable = set(trainable_names(module))
    hashes = {}
    for part, child in module.named_children():
        tensors = {
            name: tensor for name, tensor in child.state_dict().items() if f"{part}.{name}" not in trainable
        }
        if tensors:
            hashes[part] = sha256_tensors(tensors)
    return hashes


def optimizer_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters of each of the optimizer's groups: its own state knows them by number only."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def pack(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    stage: int,
    step: int,
    position: int,
    frozen: Mapping[str, str],
    config: Mapping[str, Any],
    data: str | None = None,
    faults: Mapping[str, int] | None = None,
    average: Mapping[str, Tensor] | None = None,
    precision: Mapping[str, Any] | None = None,
    validation_due: bool = False,
    wandb_run_id: str | None = None,
) -> dict[str, Any]:
    """Everything a run needs to go on, as tensors and primitives.

    Args:
        step: optimizer steps done.
        position: samples consumed, over all ranks.
        frozen: see :func:`frozen_hashes`.
        config: the resolved configuration as plain data; kept for people, never instantiated.
        data: what the order of the samples depends on besides the configuration, to notice exchanged shards.
        faults: samples that had to be replaced so far, by cause.
        average: state of the averaged weights.
        precision: state of the gradient scaler in fp16.
        validation_due: the run was stopped after the step and before the validation that belongs to it.
    """
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    schedule_state = {
        name: value for name, value in schedule.state_dict().items() if name in ("last_epoch", "_last_lr")
    }
    return {
        "format": FORMAT,
        "stage": stage,
        "step": step,
        "position": position,
        "data": data,
        "faults": dict(faults or {}),
        "weights": weights,
        "average": dict(average or {}),
        "optimizer": {"state": optimizer.state_dict()["state"], "names": optimizer_names(module, optimizer)},
        "schedule": schedule_state,
        "precision": dict(precision or {}),
        "frozen": dict(frozen),
        "config": dict(config),
        "validation_due": validation_due,
        "wandb_run_id": wandb_run_id,
        "torch_version": torch.__version__.split("+")[0],
    }


@torch.no_grad()
def restore_weights(
    module: nn.Module, state: Mapping[str, Any], *, stage: int, frozen: Mapping[str, str]
) -> None:
    """Copy the trainable weights of a checkpoint into ``module``, after comparing everything that must agree.

    Raises:
        CheckpointError: another stage, other trainable names or shapes, or frozen parts with other weights.
    """
    if state["stage"] != stage:
        raise CheckpointError(
            f"it is of stage {state['stage']}, this run is stage {stage}; use another name or run_dir"
        )
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    saved = state["weights"]
    missing, unexpected = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or unexpected:
        raise CheckpointError(
            "its trainable parameters are not this run's: "
            f"{_names('missing', missing)}{_names('unexpected', unexpected)}"
            "use the same model.* and trainable, or resume=never"
        )
    shapes = [
        f"{name} {tuple(saved[name].shape)} ≠ {tuple(own[name].shape)}"
        for name in own
        if saved[name].shape != own[name].shape
    ]
    if shapes:
        raise CheckpointError(
            f"shapes differ: {'; '.join(shapes[:3])}; use the same model.*, or resume=never"
        )
    other = sorted(
        part for part in {*frozen, *state["frozen"]} if frozen.get(part) != state["frozen"].get(part)
    )
    if other:
        raise CheckpointError(
            f"the frozen weights of {', '.join(other)} are not those the run was started with; "
            "give the same model.* files, or start another run"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def restore_optimizer(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    state: Mapping[str, Any],
) -> None:
    """Give optimizer and schedule their state back. Learning rate, decay and betas stay the configuration's.

    Raises:
        CheckpointError: the optimizer's groups hold other parameters.
    """
    if state["optimizer"]["names"] != optimizer_names(module, optimizer):
        raise CheckpointError(
            "its optimizer groups hold other parameters than this run's; use the same version, or resume=never"
        )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
    # the schedule is a pure function of the step: set the step, and compute the rate from it
    schedule.last_epoch = state["schedule"]["last_epoch"]
    schedule._step_count = schedule.last_epoch + 1
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _names(word: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word}: {', '.join(names[:3])}{more}; " if names else ""


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: old → new`` for every difference between two plain configurations."""
    lines = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old} → {new}")
    return lines
