"""AdamW with two parameter groups, and learning-rate schedules counted in optimizer steps.

Counting in optimizer steps (not batches, not samples) makes a schedule the same under any accumulation and any number
of GPUs as long as the global batch is the same (diffusers issues 8312 and 14542 are about schedules that are not).

Deliberate difference from LAVIS (``Blip2Base.get_optimizer_params``): the temperature, which has no axis, does not
decay. There what has exactly one axis is exempt, and a temperature that decays towards zero sharpens by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim.lr_scheduler import LambdaLR


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    Norm weights, biases and the temperature do not: what has fewer than two axes, or is called ``bias``.
    ``query_tokens`` (1 Q D) decay, as they do in LAVIS: they are the only source of the queries' content and have no
    norm of their own that would undo a growing scale.
    """
    return parameter.ndim >= 2 and not name.endswith("bias")


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], *, weight_decay: float
) -> list[dict]:
    """Split trainable parameters into a group that decays and one that does not; each parameter stands in one group.

    Frozen parameters are left out, and a parameter that occurs under two names (tied weights) counts once.

    Returns:
        Groups for an optimizer, each with ``name`` ("decay" or "no_decay"), ``params`` and ``weight_decay``; an empty
        group is left out.

    Raises:
        ValueError: nothing is trainable.
    """
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        (decay if decays(name, parameter) else no_decay).append(parameter)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("no parameter is trainable: check the list of names `trainable` in the stage's config")
    return groups


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable ones of ``named_parameters``; see :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(named_parameters, weight_decay=weight_decay), lr=lr, betas=tuple(betas), eps=eps
    )


def learning_rate(
    step: int,
    *,
    schedule: str,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first).

    Linear from ``warmup_lr`` to ``lr`` over ``warmup_steps``, then either ``lr`` ("constant") or half a cosine that
    reaches ``min_lr`` at ``total_steps`` ("cosine") and stays there.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> LambdaLR:
    """:func:`learning_rate` as a scheduler to be stepped once an optimizer step (Lightning: ``"interval": "step"``).

    Raises:
        ValueError: an unknown schedule, or a warm-up longer than the run.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"optim.schedule={schedule!r}: allowed are cosine, constant")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"optim.warmup_steps={warmup_steps}: must lie between 0 and total_steps={total_steps}")
    lrs = [group["lr"] for group in optimizer.param_groups]

    def factor(lr: float):
        return lambda step: (
            learning_rate(
                step,
                schedule=schedule,
                lr=lr,
                warmup_steps=warmup_steps,
                total_steps=total_steps,
                warmup_lr=warmup_lr,
                min_lr=min_lr,
            )
            / lr
        )

    return LambdaLR(optimizer, [factor(lr) for lr in lrs])
