"""Which parameters train: one list of name patterns, applied and reported in one place.

Frozen parts must also stay in eval when a trainer calls ``.train()`` on everything.

Deliberate difference: LAVIS replaces the ``train`` method of instances for that; here :func:`keep_frozen_in_eval` is
called from the owner's own ``train``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class TrainableReport:
    """What :func:`set_trainable` did: parameter names, and numbers of scalars for each top-level part."""

    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    num_trainable: dict[str, int]
    num_frozen: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{'part':<20} {'trainable':>14} {'frozen':>14}"]
        for part in self.num_trainable:
            lines.append(f"{part:<20} {self.num_trainable[part]:>14,} {self.num_frozen[part]:>14,}")
        lines.append(f"{'all':<20} {sum(self.num_trainable.values()):>14,} {sum(self.num_frozen.values()):>14,}")
        return "\n".join(lines)


def set_trainable(
    module: nn.Module, patterns: Sequence[str], *, without_gradient: Sequence[str] = ()
) -> TrainableReport:
    """Let the parameters whose name matches a pattern train and freeze all others.

    Args:
        patterns: shell patterns on parameter names, e.g. ``"qformer.*"``; a leading ``!`` excludes again what earlier
            patterns took in. A tied parameter trains if any of its names is taken in.
        without_gradient: how the names of parts begin that run without a graph, and so cannot train.

    Raises:
        ValueError: no pattern, one that matches no parameter, or one that takes in what cannot train: it would silently
            train nothing.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if not patterns:
        raise ValueError("the list of trainable names is empty; name at least one pattern, e.g. 'qformer.*'")
    chosen: set[str] = set()
    for pattern in patterns:
        excludes = pattern.startswith("!")
        matched = fnmatch.filter(names, pattern[1:] if excludes else pattern)
        if not matched:
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise ValueError(f"trainable pattern {pattern!r} matches no parameter; parameter names begin with: {parts}")
        chosen = chosen - set(matched) if excludes else chosen | set(matched)

    impossible = sorted(name for name in chosen if name.startswith(tuple(without_gradient)))
    if impossible:
        more = f" and {len(impossible) - 1} more" if len(impossible) > 1 else ""
        raise ValueError(
            f"trainable={list(patterns)} takes in {impossible[0]}{more}, which cannot train: it runs without gradient; "
            f"allowed are parts other than {', '.join(f'{part}*' for part in without_gradient)}"
        )

    chosen_ids = {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in chosen}
    trainable, frozen = [], []
    num_trainable: dict[str, int] = {}
    num_frozen: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        trains = id(parameter) in chosen_ids
        parameter.requires_grad_(trains)
        (trainable if trains else frozen).append(name)
        part = name.split(".")[0]
        num_trainable[part] = num_trainable.get(part, 0) + trains * parameter.numel()
        num_frozen[part] = num_frozen.get(part, 0) + (not trains) * parameter.numel()
    return TrainableReport(tuple(trainable), tuple(frozen), num_trainable, num_frozen)


def lower_precision(modules: Sequence[nn.Module], dtype: torch.dtype, *, keep: bool) -> Callable[[], None]:
    """Cast frozen modules to ``dtype``.

    Args:
        keep: whether their own numbers are kept besides; without, there is no way back.

    Returns:
        A function that puts the kept numbers back, bit for bit: those are what a model is saved with.
    """
    originals = [module.state_dict() if keep else {} for module in modules]
    for module in modules:
        nn.Module.to(module, dtype)  # diffusers' own `to` warns about an empty list of layers to keep

    def restore() -> None:
        for module, tensors in zip(modules, originals, strict=True):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if name in tensors:
                    tensor.data = tensors[name]

    return restore


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Put every child that has parameters, but no trainable one, in eval: no dropout in what is not trained.

    Call it from the owner's ``train(mode)`` after ``super().train(mode)``. Children are looked at from the top down, so
    a frozen part goes to eval as a whole, and a part that trains in places keeps its mode where it trains.
    """
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            child.eval()
        else:
            keep_frozen_in_eval(child)
