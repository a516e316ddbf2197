"""Pictures and category words to subject embeddings."""

from __future__ import annotations

import pytest
import torch
from tiny_models import IMAGE_SIZE, NUM_QUERIES, WIDTH, tiny_parts
from torch.nn import functional

from blipdiff_train.models.subject_encoder import SubjectEncoder, SubjectProjection


@pytest.fixture(scope="module")
def encoder() -> SubjectEncoder:
    return tiny_parts().subject_encoder().eval()


def images(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def test_projection_by_hand() -> None:
    torch.manual_seed(0)
    projection = SubjectProjection(6, 10).eval()
    torch.nn.init.normal_(projection.LayerNorm.weight)
    states = torch.randn(2, 3, 6)
    inner = projection.dense1(functional.layer_norm(states, (6,), projection.LayerNorm.weight, None, 1e-12))
    expected = states + projection.dense2(inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(projection(states), expected)


def test_projection_drops_out_in_training_only() -> None:
    projection = SubjectProjection(6)
    assert projection.dense1.out_features == 24
    states = torch.randn(2, 3, 6)
    assert not torch.equal(projection.train()(states), projection(states))
    assert torch.equal(projection.eval()(states), projection(states))


def test_the_same_numbers_alone_and_in_a_batch(encoder: SubjectEncoder) -> None:
    pictures, words = images(3), ["dog", "teddy bear", "old wooden toy train near the house"]
    together = encoder(pictures, words)
    assert together.shape == (3, NUM_QUERIES, WIDTH)
    for row, word in enumerate(words):  # other lengths, so other padding
        torch.testing.assert_close(encoder(pictures[row : row + 1], [word])[0], together[row], atol=1e-5, rtol=1e-5)


def test_picture_and_word_both_matter(encoder: SubjectEncoder) -> None:
    pictures = images(2)
    base = encoder(pictures[:1], ["dog"])
    assert (encoder(pictures[1:], ["dog"]) - base).abs().max() > 1e-3
    assert (encoder(pictures[:1], ["cat"]) - base).abs().max() > 1e-3


def test_long_words_are_cut(encoder: SubjectEncoder) -> None:
    assert encoder(images(1), ["dog " * 40]).isfinite().all()


def test_idle_parameters_are_exactly_those_without_gradient() -> None:
    encoder = tiny_parts().subject_encoder()
    encoder.requires_grad_(True)
    encoder.image_encoder.requires_grad_(False)
    encoder(images(2), ["dog", "cat"]).square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    assert without == encoder.idle_parameters()


def test_widths_must_agree() -> None:
    parts = tiny_parts()
    with pytest.raises(ValueError, match="the Q-Former is 32 wide, the projection 16"):
        SubjectEncoder(parts.image_encoder, parts.qformer, SubjectProjection(16), parts.qformer_tokenizer)
    with pytest.raises(ValueError, match="subject_image has shape"):
        parts.subject_encoder()(images(2), ["dog"])
