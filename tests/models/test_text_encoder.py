"""The subject in the prompt: what stands where, what depends on what, what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import NUM_QUERIES, TEXT_LENGTH, WIDTH, tiny_text_encoder

from blipdiff_train.models.text_encoder import AT_END, TextEncoder

PROMPTS = ["a dog swimming underwater", "a cat", "a teapot on a marble table, a teapot on a marble table"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return tiny_text_encoder().eval()


def embeds(rows: int, queries: int = NUM_QUERIES, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, queries, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_every_row_has_max_length_positions(encoder: TextEncoder) -> None:
    assert encoder(PROMPTS).shape == (3, TEXT_LENGTH, WIDTH)
    assert encoder(PROMPTS, embeds(3)).shape == (3, TEXT_LENGTH, WIDTH)
    assert encoder(["a dog"], embeds(1)).shape == (1, TEXT_LENGTH, WIDTH)


def test_without_a_subject_it_is_the_clip_text_model(encoder: TextEncoder) -> None:
    ids, _ = encoder.tokenize(PROMPTS, [TEXT_LENGTH] * 3)
    expected = encoder.model(input_ids=torch.tensor(ids)).last_hidden_state
    torch.testing.assert_close(encoder(PROMPTS), expected)


def test_word_embeddings_as_subject_are_words(encoder: TextEncoder) -> None:
    # splicing the embeddings of the words themselves gives the sentence that has these words at that place
    words = encoder.tokenizer("swimming underwater", add_special_tokens=False)["input_ids"]
    ids = encoder.tokenizer("a dog")["input_ids"]  # BOS a dog EOS
    subject = encoder.model.embeddings.token_embedding(torch.tensor([words]))
    spliced = encoder.encode([ids], subject, 2)
    expected = encoder.encode([[*ids[:2], *words, *ids[2:]]])
    torch.testing.assert_close(spliced, expected)


def test_zero_embeddings_change_nothing(encoder: TextEncoder) -> None:
    ids = [encoder.tokenizer("a dog")["input_ids"]]
    torch.testing.assert_close(encoder.encode(ids, embeds(1, queries=0), 2), encoder.encode(ids))


def test_positions_before_the_subject_do_not_see_it(encoder: TextEncoder) -> None:
    first, second = encoder(PROMPTS, embeds(3)), encoder(PROMPTS, embeds(3, seed=1))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert (first[:, 2:] - second[:, 2:]).abs().amax(dim=-1).min() > 1e-4  # everything later does


@pytest.mark.parametrize("dropped", [[True, False, False], [False, True, True], [True, True, True]])
def test_a_batch_may_mix_rows_with_and_without(encoder: TextEncoder, dropped: list[bool]) -> None:
    subject_embeds = embeds(3)
    mixed = encoder(PROMPTS, subject_embeds, torch.tensor(dropped))
    for row, without in enumerate(dropped):
        alone = encoder([PROMPTS[row]]) if without else encoder([PROMPTS[row]], subject_embeds[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone)


def test_dropped_rows_do_not_depend_on_the_subject(encoder: TextEncoder) -> None:
    subject_embeds = embeds(3)
    subject_embeds[1] = float("nan")
    subject_embeds.requires_grad_()
    hidden_states = encoder(PROMPTS, subject_embeds, torch.tensor([False, True, False]))
    assert hidden_states.isfinite().all()
    hidden_states[:, -1].sum().backward()
    assert subject_embeds.grad[1].abs().max() == 0
    assert subject_embeds.grad[0].abs().max() > 0


def test_at_end_is_before_eos(encoder: TextEncoder) -> None:
    prompts = ["a dog", PROMPTS[2] + ", on a sofa in the snow"]  # the second one is cut
    ids, lengths = encoder.tokenize(prompts, [TEXT_LENGTH - NUM_QUERIES] * 2)
    assert lengths == [4, TEXT_LENGTH - NUM_QUERIES]
    subject_embeds = embeds(2)
    expected = encoder.encode(ids, subject_embeds, [3, TEXT_LENGTH - NUM_QUERIES - 1])
    torch.testing.assert_close(encoder(prompts, subject_embeds, subject_position=AT_END), expected)


def test_rows_may_differ_in_position(encoder: TextEncoder) -> None:
    subject_embeds = embeds(3)
    together = encoder(PROMPTS, subject_embeds, subject_position=[1, AT_END, 4])
    for row, position in enumerate([1, AT_END, 4]):
        alone = encoder([PROMPTS[row]], subject_embeds[row : row + 1], subject_position=position)
        torch.testing.assert_close(together[row : row + 1], alone)


def test_unpadded_rows_must_be_equally_long(encoder: TextEncoder) -> None:
    assert encoder(["a dog", "a cat"], embeds(2), pad=False).shape == (2, 4 + NUM_QUERIES, WIDTH)
    with pytest.raises(ValueError, match=r"unequal length \[8, 10\]"):
        encoder(["a dog", "a dog swimming underwater"], embeds(2), pad=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_subject_and_every_parameter(checkpointing: bool) -> None:
    torch.manual_seed(0)
    encoder = tiny_text_encoder().train()
    encoder.set_gradient_checkpointing(checkpointing)
    subject_embeds = embeds(2).requires_grad_()
    encoder(PROMPTS[:2], subject_embeds).square().sum().backward()
    assert (subject_embeds.grad.abs().amax(dim=(1, 2)) > 0).all()
    assert not [name for name, parameter in encoder.named_parameters() if parameter.grad is None]


def test_too_many_positions_are_refused(encoder: TextEncoder) -> None:
    ids = torch.zeros(1, TEXT_LENGTH - 1, dtype=torch.long)
    with pytest.raises(
        ValueError, match=rf"{TEXT_LENGTH + 1} positions.*{TEXT_LENGTH}; cut the ids to {TEXT_LENGTH - 2}"
    ):
        encoder.encode(ids, embeds(1, queries=2), 2)
    with pytest.raises(ValueError, match="leave no room for text"):
        encoder(["a dog"], embeds(1, queries=TEXT_LENGTH - 2))


def test_wrong_sizes_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"subject_embeds has shape \(2, 4, 32\).*B=3"):
        encoder(PROMPTS, embeds(2))
    with pytest.raises(ValueError, match="subject_dropped has shape"):
        encoder(PROMPTS, embeds(3), torch.tensor([True]))
    with pytest.raises(ValueError, match="2 subject positions for 3 prompts"):
        encoder(PROMPTS, embeds(3), subject_position=[2, 2])
    with pytest.raises(ValueError, match="subject position 9 lies outside its 4 token ids"):
        encoder.encode([[0, 1, 2, 3]], embeds(1), 9)
