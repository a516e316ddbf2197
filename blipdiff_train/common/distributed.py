"""Process-group helpers that are defined for one process too, where they do the obvious thing.

Deliberate difference: LAVIS calls ``torch.distributed.get_rank()`` without a process group and fails on one GPU (its
issue 153).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the group, 0 without a group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group, 1 without a group."""
    return dist.get_world_size() if is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks; nothing without a group."""
    if is_initialized():
        dist.barrier()


@torch.no_grad()
def gather_no_grad(tensor: Tensor) -> Tensor:
    """Concatenate every rank's ``tensor`` (B …) along the first axis in rank order, without gradient: (W·B …).

    Detached for one process as well, so that the gradient of a loss does not depend on the number of processes
    (LAVIS ``concat_all_gather`` does the same). All ranks must pass the same shape.
    """
    tensor = tensor.detach()
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate every rank's ``tensor`` (B …) along the first axis in rank order: (W·B …).

    The backward sums the gradients that all ranks send to this rank's rows (LAVIS ``all_gather_with_grad``).
    """
    if world_size() == 1:
        return tensor
    return _GatherWithGrad.apply(tensor)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.num_rows = tensor.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.num_rows
        return grad[start : start + ctx.num_rows]


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every rank as soon as ``flag`` is true on one; all ranks must call it."""
    if world_size() == 1:
        return bool(flag)
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def broadcast_object(value: Any, source: int = 0) -> Any:
    """``value`` of rank ``source`` on every rank; must be picklable and comes from our own processes only."""
    if world_size() == 1:
        return value
    box = [value if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    return box[0]


class RankFailed(RuntimeError):
    """What stopped one rank, raised on all of them.

    Attributes:
        errno: of the system, where it was its error; else None.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


@contextmanager
def together(describe: Callable[[Exception], tuple[str, int | None]]) -> Iterator[None]:
    """All ranks leave the block at the same time: an error on one is raised on each, so that none waits for one that
    is gone. All ranks must enter it; inside they must not wait for each other. One process alone keeps its own error.

    Args:
        describe: message and number of an error, see :class:`RankFailed`.

    Raises:
        RankFailed: the error of the first rank that has one; there it is also the cause.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        problem = error
    if world_size() == 1:
        return
    found: list[tuple[str, int | None] | None] = [None] * world_size()
    dist.all_gather_object(found, problem and describe(problem))
    for number, said in enumerate(found):
        if said is not None:
            raise RankFailed(f"rank {number}: {said[0]}", said[1]) from problem
