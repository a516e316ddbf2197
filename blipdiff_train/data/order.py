"""The global order: which sample stands at which position, as a pure function of the seed.

Position *p* of a run is its *p*-th sample, counted over all ranks from the first step. Nothing here knows ranks,
workers or history; :class:`PositionSampler` alone turns positions into the micro-batches of one rank.

Permutations sort raw 64-bit draws of PCG64, whose stream NumPy promises not to change, so an order survives upgrades.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from blipdiff_train.common.rng import derive_seed

MIXTURE_BLOCK = 4096
"""Positions in a block of a mixture; memory and the smallest share (1 in 4096) follow from it."""

_KEPT_WINDOWS = 4


@dataclass(frozen=True)
class Place:
    """What stands at a position: sample ``index`` of data set ``dataset``, in that data set's ``epoch``."""

    dataset: int
    epoch: int
    index: int


def permutation(length: int, seed: int, purpose: str, *indices: int) -> np.ndarray:
    """A permutation of 0..length-1 (int64), pure in all arguments."""
    draws = np.random.PCG64(derive_seed(seed, purpose, *indices)).random_raw(length)
    return np.argsort(draws, kind="stable")


class EpochOrder:
    """One data set, epoch after epoch: shards permuted, then samples permuted inside windows of shards.

    Memory is one window of samples, however large the data set.

    Args:
        sizes: number of samples of each shard; zeros are fine.
        seed: of the run.
        window: shards in a window; samples move inside it only, so about this many shards are open at a time.
        shuffle: False gives the order of the shards as they are.
        dataset: number of the data set in a mixture; keeps their orders apart.

    Raises:
        ValueError: no samples at all, or a window below 1.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, window: int = 64, shuffle: bool = True, dataset: int = 0):
        self.sizes = np.asarray(sizes, dtype=np.int64)
        if window < 1:
            raise ValueError(f"window={window}: expected at least one shard")
        if self.sizes.sum() == 0:
            raise ValueError(f"{len(self.sizes)} shards hold no samples: there is nothing to train on")
        self.seed, self.window, self.shuffle, self.dataset = seed, window, shuffle, dataset
        self.num_samples = int(self.sizes.sum())
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self.num_samples

    def __call__(self, position: int) -> Place:
        """What stands at ``position`` (≥ 0, without end)."""
        epoch, rank = divmod(int(position), self.num_samples)
        if not self.shuffle:
            return Place(self.dataset, epoch, rank)
        _, window_ends = self._epoch(epoch)
        number = int(np.searchsorted(window_ends, rank, side="right"))
        start = int(window_ends[number - 1]) if number else 0
        return Place(self.dataset, epoch, int(self._window(epoch, number)[rank - start]))

    def epoch(self, epoch: int) -> np.ndarray:
        """All sample indices of one epoch in order; for tests and inspection (memory: the whole data set)."""
        return np.array([self(epoch * self.num_samples + rank).index for rank in range(self.num_samples)])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order, and where each window of them ends in samples."""
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), self.seed, "order.shards", self.dataset, epoch)
            ends = np.cumsum(self.sizes[shards])
            last = np.minimum(np.arange(self.window, len(shards) + self.window, self.window), len(shards)) - 1
            _keep(self._epochs, epoch, (shards, ends[last]), limit=2)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) not in self._windows:
            shards, _ = self._epoch(epoch)
            chosen = shards[number * self.window : (number + 1) * self.window]
            indices = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
            mixed = indices[permutation(len(indices), self.seed, "order.window", self.dataset, epoch, number)]
            _keep(self._windows, (epoch, number), mixed, limit=_KEPT_WINDOWS)
        return self._windows[epoch, number]


class MixedOrder:
    """Several data sets, each with its own endless order, mixed by weight; pure like its parts.

    Up to any position *n*, data set *d* has had ``weight_d · n`` samples to within 2 plus its share of one block.

    Args:
        orders: one for each data set.
        weights: positive, in any unit; they are divided by their sum.
        seed: of the run.

    Raises:
        ValueError: weights that do not match, are not positive, or give a data set less than 1 sample in 4096.
    """

    def __init__(self, orders: Sequence[EpochOrder], weights: Sequence[float], *, seed: int):
        if len(orders) != len(weights) or not orders:
            raise ValueError(f"{len(orders)} data sets but {len(weights)} weights")
        if not all(np.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights {list(weights)}: each must be a number above 0")
        shares = [Fraction(weight).limit_denominator(10**9) for weight in weights]
        total = sum(shares)
        if total == 0 or any(share / total < Fraction(1, MIXTURE_BLOCK) for share in shares):
            raise ValueError(f"weights {list(weights)}: the smallest share allowed is 1 in {MIXTURE_BLOCK}")
        self.orders, self.seed = list(orders), seed
        self._bounds = [sum(shares[:d], Fraction(0)) / total for d in range(len(shares) + 1)]
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __call__(self, position: int) -> Place:
        """What stands at ``position`` (≥ 0, without end)."""
        block, slot = divmod(int(position), MIXTURE_BLOCK)
        datasets, ranks = self._block(block)
        dataset = int(datasets[slot])
        return self.orders[dataset](self._count(dataset, block) + int(ranks[slot]))

    def _count(self, dataset: int, block: int) -> int:
        """Samples of ``dataset`` before ``block``. Floors of shared bounds: the counts of a block always add up."""
        positions = block * MIXTURE_BLOCK
        return int(self._bounds[dataset + 1] * positions) - int(self._bounds[dataset] * positions)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each slot of a block: its data set, and which of that data set's samples in the block it is."""
        if block not in self._blocks:
            counts = [self._count(d, block + 1) - self._count(d, block) for d in range(len(self.orders))]
            datasets = np.repeat(np.arange(len(counts)), counts)
            datasets = datasets[permutation(len(datasets), self.seed, "order.mixture", block)]
            ranks = np.empty_like(datasets)
            for dataset, count in enumerate(counts):
                ranks[datasets == dataset] = np.arange(count)
            _keep(self._blocks, block, (datasets, ranks), limit=_KEPT_WINDOWS)
        return self._blocks[block]


class PositionSampler:
    """The micro-batches of one rank: lists of positions, from ``start_position`` up to ``stop_position``.

    Step *k* takes the positions ``start + k·G …``; micro-batch *j* of rank *r* takes ``(j·W + r)·b + [0, b)`` of them.
    Global batches are therefore the same for every number of ranks W and micro-batch b. It has no length on purpose:
    to Lightning the training is one endless epoch, and a length counted from a resumed position would end it early.

    Args:
        global_batch_size: G, samples of one optimizer step over all ranks.
        micro_batch_size: b, samples of one forward of one rank.
        rank, world_size: r, W.
        start_position: samples consumed so far.
        stop_position: where the run ends.

    Raises:
        ValueError: G is not a multiple of W·b, or the range is not whole global batches.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        stop_position: int,
    ):
        self.num_micro_batches = accumulation(global_batch_size, micro_batch_size, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}")
        if start_position < 0 or (stop_position - start_position) % global_batch_size:
            raise ValueError(
                f"positions {start_position} to {stop_position} are not whole global batches of {global_batch_size}"
            )
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.start_position, self.stop_position = start_position, stop_position

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_position, self.stop_position, self.global_batch_size):
            for micro in range(self.num_micro_batches):
                first = step + (micro * self.world_size + self.rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


def accumulation(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of one rank in one step.

    Raises:
        ValueError: the global batch cannot be split that way; says which sizes can.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise ValueError(
            f"global_batch_size={global_batch_size}, micro_batch_size={micro_batch_size}, world_size={world_size}: "
            "each must be at least 1"
        )
    micro_batches, rest = divmod(global_batch_size, micro_batch_size * world_size)
    if rest or micro_batches == 0:
        per_rank = global_batch_size // world_size if global_batch_size % world_size == 0 else 0
        fits = [b for b in range(1, per_rank + 1) if per_rank % b == 0]
        hint = (
            f"micro batches of {', '.join(map(str, fits[-8:]))} would do"
            if fits
            else f"choose a global_batch_size that is a multiple of {world_size}"
        )
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} × "
            f"{world_size} processes: {hint}"
        )
    return micro_batches


def _keep(cache: OrderedDict, key, value, *, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
