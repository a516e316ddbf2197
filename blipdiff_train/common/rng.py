"""Randomness as a pure function: every generator is made of a seed, a purpose and indices, never of history.

A run that was interrupted, resized or given other worker counts therefore draws the same numbers. The purposes keep
streams apart: ``("noise", position)`` and ``("crop", position)`` never share a stream, whatever the seed.
"""

from __future__ import annotations

import hashlib
import struct
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
    digest = hashlib.blake2b(_place(seed, purpose, indices), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _place(seed: int, purpose: str, indices: tuple[int, ...]) -> bytes:
    if not purpose:
        raise ValueError("purpose must not be empty: two streams of one seed would coincide")
    return "\x1f".join([str(int(seed)), purpose, *(str(int(index)) for index in indices)]).encode()


class HashedUniform:
    """Numbers in [0, 1) for one purpose and place, in the order they are asked for, read off a hash.

    Where a sample needs a few numbers, these cost a fraction of what making a NumPy generator does. Each has 53 bits.
    """

    def __init__(self, seed: int, purpose: str, *indices: int):
        self._hash = hashlib.blake2b(_place(seed, purpose, indices), digest_size=64, person=b"uniform")
        self._left: list[int] = []

    def random(self, size: int) -> list[float]:
        """The next ``size`` numbers."""
        while len(self._left) < size:
            self._left += struct.unpack("<8Q", self._hash.digest())
            self._hash.update(b"\x1f")
        taken, self._left = self._left[:size], self._left[size:]
        return [(number >> 11) * 2.0**-53 for number in taken]


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
