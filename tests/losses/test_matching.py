from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blipdiff_train.losses.contrastive import positive_pairs
from blipdiff_train.losses.matching import (
    inadmissible_negatives,
    itm_loss,
    negative_weights,
    sample_hard_negatives,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 9), num_ids=st.integers(1, 9), num_texts=st.integers(1, 9))
def test_a_negative_is_never_the_own_pair_image_or_caption(seed, num_rows, num_ids, num_texts) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_ids, (num_rows,), generator=generator)
    texts = torch.randint(num_texts, (num_rows,), generator=generator)
    sim = 30 * torch.randn(num_rows, num_rows, generator=generator)
    positives = positive_pairs(num_rows, num_rows, 0, ids, ids)
    weights = negative_weights(sim, inadmissible_negatives(positives, texts[:, None] == texts[None, :]))
    index = sample_hard_negatives(weights, generator)
    exists = weights.sum(1) > 0
    assert torch.isfinite(weights).all()
    for row in range(num_rows):
        admissible = [c for c in range(num_rows) if c != row and ids[c] != ids[row] and texts[c] != texts[row]]
        assert bool(exists[row]) == bool(admissible)
        assert int(index[row]) in (admissible or [0])


def test_the_draw_follows_the_softmax_and_repeats_itself() -> None:
    sim = torch.tensor([[9.0, 0.0, math.log(2.0), math.log(5.0)]]).expand(20000, 4)
    own = torch.tensor([[True, False, False, False]]).expand(20000, 4)
    weights = negative_weights(sim, own)
    index = sample_hard_negatives(weights, torch.Generator().manual_seed(0))
    shares = torch.bincount(index, minlength=4) / 20000
    assert shares.tolist() == pytest.approx([0, 1 / 8, 2 / 8, 5 / 8], abs=0.015)
    assert torch.equal(index, sample_hard_negatives(weights, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("processes", [2, 4])
def test_a_rows_negative_does_not_depend_on_the_process_that_holds_it(processes) -> None:
    weights = negative_weights(torch.randn(2, 8, 8), torch.eye(8, dtype=torch.bool))
    generator = torch.Generator().manual_seed(3)
    whole = [sample_hard_negatives(one, generator) for one in weights]
    size = 8 // processes
    parts: list[list[torch.Tensor]] = []
    for first in range(0, 8, size):
        generator = torch.Generator().manual_seed(3)
        rows = slice(first, first + size)
        parts.append([sample_hard_negatives(w[rows], generator, first_row=first, num_rows=8) for w in weights])
    assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts, strict=True), whole, strict=True))


def test_rows_without_a_negative_count_nowhere() -> None:
    logits = torch.randn(6, 2, requires_grad=True)
    labels = torch.tensor([1, 1, 0, 0, 0, 0])
    exists = torch.tensor([True, True, False, True, False, True])
    result = itm_loss(logits, labels, exists)
    expected = torch.nn.functional.cross_entropy(logits[exists], labels[exists])
    assert torch.allclose(result.loss, expected)
    assert result.baseline.item() == 0.5
    result.loss.backward()
    assert logits.grad[~exists].abs().max() == 0

    alone = itm_loss(logits[:1], labels[:1], torch.tensor([True]))
    assert torch.isfinite(alone.loss)
    assert alone.baseline.item() == 1.0


def test_accuracy_and_the_majority_baseline() -> None:
    labels = torch.tensor([1, 0, 0])
    always_no = itm_loss(torch.tensor([[1.0, 0.0]] * 3), labels, torch.ones(3, dtype=torch.bool))
    assert always_no.accuracy.item() == pytest.approx(2 / 3)
    assert always_no.baseline.item() == pytest.approx(2 / 3)
    # the value that runs get stuck at: the constant answer with the classes' true shares
    shares = torch.log(torch.tensor([[2 / 3, 1 / 3]] * 3))
    assert itm_loss(shares, labels, torch.ones(3, dtype=torch.bool)).loss.item() == pytest.approx(0.6365, abs=1e-4)
