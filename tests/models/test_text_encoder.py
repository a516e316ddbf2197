"""The subject in the prompt: what stands where, what depends on what, what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import NUM_QUERIES, TEXT_LENGTH, WIDTH, tiny_text_encoder

from blipdiff_train.models.presets import build_text_model
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


def plainly(encoder: TextEncoder, ids: list[int], subject: torch.Tensor | None, position: int) -> torch.Tensor:
    """The reference's rules for one row, one head at a time, in float64."""
    weights = {name: tensor.double() for name, tensor in encoder.model.state_dict().items()}
    config = encoder.model.config

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, states: torch.Tensor, eps: float) -> torch.Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(states: torch.Tensor) -> torch.Tensor:
        if config.hidden_act == "quick_gelu":
            return states * torch.sigmoid(1.702 * states)
        return states * 0.5 * (1 + torch.erf(states / 2**0.5))

    states = weights["embeddings.token_embedding.weight"][ids]
    if subject is not None:
        states = torch.cat([states[:position], subject.double(), states[position:]])
    states = states + weights["embeddings.position_embedding.weight"][: len(states)]
    size = config.hidden_size // config.num_attention_heads
    future = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
    for index in range(config.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        normed = norm(f"{layer}.layer_norm1", states, config.layer_norm_eps)
        query, key, value = (linear(f"{layer}.self_attn.{name}_proj", normed) for name in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            scores = (query[:, part] @ key[:, part].T / size**0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(1) @ value[:, part])
        states = states + linear(f"{layer}.self_attn.out_proj", torch.cat(heads, 1))
        inner = activation(linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", states, config.layer_norm_eps)))
        states = states + linear(f"{layer}.mlp.fc2", inner)
    return norm("final_layer_norm", states, 1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_any_sizes_agree_with_a_plain_writing(encoder: TextEncoder, seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    num_heads, length, num_queries = draw.randint(1, 4), draw.randint(12, 40), draw.randint(1, 7)
    model = build_text_model(
        {
            "vocab_size": len(encoder.tokenizer),
            "hidden_size": num_heads * draw.choice([3, 5, 8]),
            "intermediate_size": draw.randint(5, 40),
            "num_hidden_layers": draw.randint(1, 3),
            "num_attention_heads": num_heads,
            "max_position_embeddings": length,
            "hidden_act": draw.choice(["quick_gelu", "gelu"]),
            "layer_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        }
    )
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    other = TextEncoder(model, encoder.tokenizer).eval()
    prompts = draw.sample(PROMPTS, k=draw.randint(1, 3))
    subjects = torch.randn(len(prompts), num_queries, other.width)
    dropped = torch.tensor([draw.random() < 0.3 for _ in prompts])
    positions = [draw.randint(1, 3) for _ in prompts]
    with torch.no_grad():
        found = other(prompts, subjects, dropped, positions)
    for row, prompt in enumerate(prompts):
        room = length if dropped[row] else length - num_queries
        ids, _ = other.tokenize([prompt], [room])
        expected = plainly(other, ids[0], None if dropped[row] else subjects[row], positions[row])
        torch.testing.assert_close(found[row].double(), expected, rtol=2e-5, atol=2e-5)
