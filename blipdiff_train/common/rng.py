"""Randomness as a pure function: every generator is made of a seed, a purpose and indices, never of history.

A run that was interrupted, resized or given other worker counts therefore draws the same numbers. The purposes keep
streams apart: ``("noise", position)`` and ``("crop", position)`` never share a stream, whatever the seed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on every argument.

    Args:
        seed: the run's seed; any integer, 0 is a seed like any other.
        purpose: what the numbers are for, e.g. ``"noise"``.
        indices: further coordinates, e.g. the sample's position in the global order.
    """
    if not purpose:
        raise ValueError("purpose must not be empty: two streams of one seed would coincide")
    text = "\x1f".join([str(int(seed)), purpose, *(str(int(index)) for index in indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator (PCG64) for one purpose and place; see :func:`derive_seed`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *indices)))


def torch_generator(seed: int, purpose: str, *indices: int, device: str = "cpu") -> torch.Generator:
    """A torch generator for one purpose and place; see :func:`derive_seed`.

    Draw on the CPU and move the result where numbers must not depend on the device: CPU and CUDA generators of one
    seed give different numbers.
    """
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *indices))
