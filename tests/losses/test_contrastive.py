from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blipdiff_train.losses.contrastive import itc_loss, positive_pairs, recall_at_k, similarities

TEMPERATURE = torch.tensor(0.07)


def features(num_rows: int, num_queries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: F.normalize(torch.randn(*shape, 6, generator=generator), dim=-1)  # noqa: E731
    return draw(num_rows, num_queries), draw(num_rows)


def loss(image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    sims = similarities(image, text, image.detach(), text.detach(), TEMPERATURE)
    return itc_loss(*sims, positive_pairs(len(text), len(text), 0, ids, ids), label_smoothing=0.1)


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_swapping_images_and_texts_swaps_the_directions(num_rows) -> None:
    """With one query an image is a text: the two directions change places and the loss stays."""
    image, text = features(num_rows, 1)
    i2t, t2i = similarities(image, text, image, text, TEMPERATURE)
    swapped_i2t, swapped_t2i = similarities(text[:, None], image[:, 0], text[:, None], image[:, 0], TEMPERATURE)
    assert torch.allclose(i2t, swapped_t2i)
    assert torch.allclose(t2i, swapped_i2t)
    assert torch.allclose(loss(image, text), loss(text[:, None], image[:, 0]))


@pytest.mark.parametrize("seed", range(3))
def test_permuting_the_batch_leaves_the_loss(seed) -> None:
    image, text = features(6, 4, seed)
    ids = torch.tensor([1, 2, 2, 3, 4, 1])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(loss(image, text, ids), loss(image[order], text[order], ids[order]))


def test_without_shared_images_it_is_smoothed_cross_entropy() -> None:
    image, text = features(5, 3)
    sims = similarities(image, text, image, text, TEMPERATURE)
    expected = sum(F.cross_entropy(sim, torch.arange(5), label_smoothing=0.1) for sim in sims) / 2
    assert torch.allclose(loss(image, text), expected)
    assert torch.allclose(loss(image, text, torch.arange(5)), expected)


def test_batch_of_one_costs_nothing() -> None:
    assert loss(*features(1, 4)).item() == 0.0


def test_each_direction_trains_its_own_side() -> None:
    image, text = (f.requires_grad_() for f in features(4, 3))
    sim_i2t, sim_t2i = similarities(image, text, image.detach(), text.detach(), TEMPERATURE)
    assert torch.autograd.grad(sim_i2t.sum(), [image, text], allow_unused=True, retain_graph=True)[1] is None
    assert torch.autograd.grad(sim_t2i.sum(), [image, text], allow_unused=True)[0] is None


def test_own_pairs_of_a_rank() -> None:
    own = positive_pairs(2, 6, 1)
    assert own.nonzero().tolist() == [[0, 2], [1, 3]]


def test_half_precision_features_under_autocast_are_computed_in_fp32() -> None:
    image, text = features(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sims = similarities(image, text, image, text, TEMPERATURE)
    assert all(
        torch.equal(a, b) for a, b in zip(sims, similarities(image, text, image, text, TEMPERATURE), strict=True)
    )


def test_recall_by_hand_and_ties_against_us() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert recall_at_k(scores, torch.eye(3, dtype=torch.bool), (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    constant = recall_at_k(torch.zeros(4, 4), torch.eye(4, dtype=torch.bool), (1, 3, 4))
    assert constant == {1: 0.0, 3: 0.0, 4: 1.0}
    several = recall_at_k(scores, torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]], dtype=torch.bool), (1, 2))
    assert several == pytest.approx({1: 1 / 3, 2: 2 / 3})
