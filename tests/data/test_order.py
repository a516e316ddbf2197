"""The order is a pure function: every sample once an epoch, the same global batches however they are divided."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipdiff_train.data.datamodule import ValidationSampler
from blipdiff_train.data.order import MIXTURE_BLOCK, EpochOrder, MixedOrder, PositionSampler, accumulation, permutation

sizes_strategy = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=60, deadline=None)
@given(sizes_strategy, st.integers(-3, 2**40), st.integers(1, 14), st.integers(0, 5))
def test_every_sample_comes_exactly_once_an_epoch(sizes, seed, window, epoch):
    order = EpochOrder(sizes, seed=seed, window=window)
    assert sorted(order.epoch(epoch)) == list(range(sum(sizes)))


@settings(max_examples=40, deadline=None)
@given(sizes_strategy, st.integers(0, 2**40), st.integers(1, 14), st.lists(st.integers(0, 300), max_size=30))
def test_a_position_gives_the_same_whenever_and_by_whomever_it_is_asked(sizes, seed, window, positions):
    one = EpochOrder(sizes, seed=seed, window=window)
    forward = [one(position) for position in range(301)]
    for position in positions:
        assert EpochOrder(sizes, seed=seed, window=window)(position) == forward[position]
        assert one(position) == forward[position]


def test_epochs_seeds_and_data_sets_differ_and_zero_is_a_seed():
    sizes = [10] * 8
    orders = [EpochOrder(sizes, seed=seed, window=3).epoch(0) for seed in (0, 1, -1)]
    orders += [EpochOrder(sizes, seed=0, window=3).epoch(1), EpochOrder(sizes, seed=0, window=3, dataset=1).epoch(0)]
    orders += [np.arange(80)]
    for number, order in enumerate(orders):
        assert not any(np.array_equal(order, other) for other in orders[:number])


def test_samples_stay_in_their_window_of_shards():
    order = EpochOrder([10] * 12, seed=5, window=4)
    shards = order.epoch(0) // 10
    windows = [set(shards[start : start + 40]) for start in (0, 40, 80)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    assert len(set(shards[:10])) > 1  # and they are mixed inside it


def test_memory_is_a_window_not_the_data_set():
    order = EpochOrder([1000] * 5000, seed=0, window=2)
    seen = [order(position).index for position in (0, 2_500_000, 4_999_999, 5_000_000, 123_456_789)]
    assert all(0 <= index < 5_000_000 for index in seen)
    assert sum(window.nbytes for window in order._windows.values()) <= 4 * 2000 * 8


def test_the_order_of_this_seed_never_changes():
    # recorded once; a change here would make every interrupted run continue differently
    assert permutation(8, 0, "order.window", 0, 0, 0).tolist() == [2, 0, 6, 7, 1, 3, 5, 4]
    assert [EpochOrder([3, 0, 4, 2], seed=0, window=2)(p).index for p in range(9)] == [2, 0, 1, 3, 6, 4, 7, 5, 8]


def test_one_sample_and_fewer_samples_than_a_batch():
    assert [EpochOrder([0, 1, 0], seed=0)(position).index for position in range(3)] == [0, 0, 0]
    order = EpochOrder([3], seed=0)
    (batch,) = PositionSampler(global_batch_size=7, micro_batch_size=7, stop_position=7)
    counts = Counter(order(position).index for position in batch)
    assert sum(counts.values()) == 7
    assert set(counts) == {0, 1, 2}


def test_no_samples_is_a_clear_error():
    with pytest.raises(ValueError, match="2 shards hold no samples"):
        EpochOrder([0, 0], seed=0)
    with pytest.raises(ValueError, match="window=0"):
        EpochOrder([1], seed=0, window=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(0, 4))
def test_ranks_get_disjoint_stripes_of_the_same_global_batches(world_size, micro, accumulate, start, steps):
    size = world_size * micro * accumulate
    options = {"global_batch_size": size, "start_position": start * size, "stop_position": (start + steps) * size}
    ranks = [
        list(PositionSampler(micro_batch_size=micro, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    assert all(len(rank) == steps * accumulate for rank in ranks)
    for step in range(steps):
        batch = [p for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate] for p in part]
        first = (start + step) * size
        assert sorted(batch) == list(range(first, first + size))
    if steps and accumulate > 1:
        # the contract's formula: micro-batch j of rank r holds (j·W + r)·b + [0, b)
        assert ranks[-1][1][0] == start * size + (world_size + world_size - 1) * micro


def test_a_batch_that_cannot_be_divided_says_what_can():
    with pytest.raises(ValueError, match=r"global_batch_size=12 .* micro_batch_size=4 × 2 processes: .*1, 2, 3, 6"):
        accumulation(12, 4, 2)
    with pytest.raises(ValueError, match="multiple of 8"):
        accumulation(12, 1, 8)
    with pytest.raises(ValueError, match="at least 1"):
        accumulation(0, 1, 1)
    with pytest.raises(ValueError, match="whole global batches"):
        PositionSampler(global_batch_size=4, micro_batch_size=4, stop_position=6)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**40))
def test_a_mixture_is_pure_keeps_its_weights_and_each_data_sets_epochs(weights, seed):
    def mixture():
        parts = [EpochOrder([5, 3], seed=seed, dataset=number) for number in range(len(weights))]
        return MixedOrder(parts, weights, seed=seed)

    mixed = mixture()
    places = [mixed(position) for position in range(MIXTURE_BLOCK + 500)]
    for position in (0, 17, MIXTURE_BLOCK - 1, MIXTURE_BLOCK, MIXTURE_BLOCK + 499):
        assert mixture()(position) == places[position]
    for number, weight in enumerate(weights):
        own = [place for place in places if place.dataset == number]
        in_block = sum(place.dataset == number for place in places[:MIXTURE_BLOCK])
        assert abs(in_block - MIXTURE_BLOCK * weight / sum(weights)) <= 2
        for start in range(0, len(own) - 8, 8):
            assert sorted(place.index for place in own[start : start + 8]) == list(range(8))


def test_far_blocks_of_a_mixture_add_up():
    parts = [EpochOrder([7], seed=1, dataset=number) for number in range(3)]
    mixed = MixedOrder(parts, [0.7, 0.2999, 0.0003], seed=1)
    for block in (0, 1, 12_345, 10**8):
        datasets, _ = mixed._block(block)
        assert len(datasets) == MIXTURE_BLOCK
        before, after = (np.array([mixed._count(d, b) for d in range(3)]) for b in (block, block + 1))
        assert (after - before == np.bincount(datasets, minlength=3)).all()
        assert before.sum() == block * MIXTURE_BLOCK


def test_impossible_weights_are_refused():
    parts = [EpochOrder([7], seed=1, dataset=number) for number in range(2)]
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, 1e-6], [1.0, -2.0]):
        with pytest.raises(ValueError, match="weights"):
            MixedOrder(parts, weights, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8))
def test_validation_covers_all_samples_with_equal_batches_on_all_ranks(num_samples, batch_size, world_size):
    ranks = [list(ValidationSampler(num_samples, batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    assert {p for rank in ranks for batch in rank for p in batch} == set(range(num_samples))
    assert all([len(batch) for batch in rank] == [len(batch) for batch in ranks[0]] for rank in ranks)
    assert sum(len(batch) for rank in ranks for batch in rank) < num_samples + world_size
    assert len(ranks[0]) == len(ValidationSampler(num_samples, batch_size, world_size=world_size))
