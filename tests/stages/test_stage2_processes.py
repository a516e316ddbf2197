"""Two gloo processes against one with the joined batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import tiny_batch, tiny_parts
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from blipdiff_train.stages.stage2 import Stage2Module


class Step(nn.Module):
    """The loss as a forward, which is what DDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Stage2Module(tiny_parts(), template="release", total_steps=2, lr=1e-3, seed=0)

    def forward(self, batch):
        return self.module.noise_loss(batch)


def batch_of(first_position: int, size: int):
    # the first process's samples are all dropped: its subject encoder gets zeros, and DDP must not wait for it
    dropped = torch.arange(first_position, first_position + size) < 2
    return tiny_batch(size, first_position=first_position, subject_dropped=dropped)


def _process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        step = Step()
        ddp = DistributedDataParallel(step)  # without find_unused_parameters
        for _ in range(2):  # a parameter without gradient is noticed in the second iteration
            step.zero_grad(set_to_none=True)
            loss = ddp(batch_of(2 * rank, 2))
            loss.backward()
        if rank == 1:
            gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
            torch.save({"loss": loss.detach(), "gradients": gradients}, Path(folder) / "rank1.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_those_of_the_joined_batch(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_process, args=(port, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "rank1.pt", weights_only=True)

    step = Step()
    step(batch_of(0, 4)).backward()
    expected = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
