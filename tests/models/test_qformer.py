"""The Q-Former by itself: who sees whom, what is shared, what the modes change."""

from __future__ import annotations

import pytest
import torch

from blipdiff_train.models.qformer import ImageNorm, Layout, QFormer, QFormerConfig


def tiny(**changes) -> QFormer:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
        "num_query_tokens": 3,
        "image_width": 10,
        "dropout": 0.0,
    }
    qformer = QFormer(QFormerConfig(**sizes | changes))
    for parameter in qformer.parameters():  # far from the initialisation: every branch shows
        parameter.data += 0.3 * torch.randn_like(parameter)
    return qformer


@pytest.fixture
def qformer() -> QFormer:
    return tiny()


IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
MASK = (IDS > 0).long()
IMAGES = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1))


def test_the_queries_feed_forward_starts_as_the_texts() -> None:
    qformer = QFormer(tiny().config)
    for layer in qformer.encoder.layer:
        assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
        assert torch.equal(layer.output_query.LayerNorm.bias, layer.output.LayerNorm.bias)


def test_text_is_masked_as_the_pass_says(qformer) -> None:
    """Changing a token changes exactly the positions that may see it."""
    changed = IDS.clone()
    changed[0, 3] = 9
    context = qformer.encode_images(IMAGES)
    query_output, cache = qformer.image_pass(context)

    text, other = qformer.text_pass(IDS, MASK), qformer.text_pass(changed, MASK)
    assert not torch.allclose(text[0, 0], other[0, 0]), "text sees text both ways"
    assert torch.equal(text[1], other[1])

    caption, other = qformer.caption_pass(IDS, MASK, cache), qformer.caption_pass(changed, MASK, cache)
    assert torch.allclose(caption[0, :3], other[0, :3], atol=1e-6), "captions see no future"
    assert not torch.allclose(caption[0, 4], other[0, 4])

    queries, _ = qformer.multimodal_pass(IDS, MASK, context)
    other, _ = qformer.multimodal_pass(changed, MASK, context)
    assert not torch.allclose(queries[0], other[0]), "queries see text in the multimodal pass"
    assert not torch.allclose(queries, query_output)


def test_pads_are_seen_by_nobody(qformer) -> None:
    pads = IDS.masked_fill(MASK == 0, 30)
    context = qformer.encode_images(IMAGES)
    _, cache = qformer.image_pass(context)
    real = MASK.bool()
    for run in (
        lambda ids: qformer.text_pass(ids, MASK)[real],
        lambda ids: qformer.multimodal_pass(ids, MASK, context)[0],
        lambda ids: qformer.caption_pass(ids, MASK, cache)[real],
    ):
        assert torch.allclose(run(IDS), run(pads), atol=1e-6)


def test_captions_begin_with_dec_whatever_the_first_token_is(qformer) -> None:
    _, cache = qformer.image_pass(qformer.encode_images(IMAGES))
    other = IDS.clone()
    other[:, 0] = 11
    assert torch.equal(qformer.caption_pass(IDS, MASK, cache), qformer.caption_pass(other, MASK, cache))
    assert qformer.config.dec_token_id == qformer.config.vocab_size - 1


def test_blocks_of_contexts_equal_recomputed_rows(qformer) -> None:
    """(own, chosen by index, own) as blocks gives what encoding each row's image anew gives, with its gradients."""
    index = torch.tensor([1, 0])
    rows = torch.cat([IDS, IDS.flip(0), IDS])
    mask = (rows > 0).long()
    results = []
    for shared in (True, False):
        qformer.zero_grad()
        if shared:
            context = qformer.encode_images(IMAGES)
            queries, text = qformer.multimodal_pass(
                rows, mask, context, context.select(index), context, text_output=True
            )
        else:
            everything = qformer.encode_images(torch.cat([IMAGES, IMAGES[index], IMAGES]))
            queries, text = qformer.multimodal_pass(rows, mask, everything, text_output=True)
        (queries.square().sum() + text[mask.bool()].square().sum()).backward()
        results.append((queries, {n: p.grad for n, p in qformer.named_parameters() if p.grad is not None}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    for name, grad in results[0][1].items():
        assert torch.allclose(grad, results[1][1][name], atol=1e-4, rtol=1e-4), name


def test_keys_are_computed_once_per_image_and_layer(qformer, monkeypatch) -> None:
    calls = []
    keys = {id(layer.crossattention.attention.key) for layer in qformer.encoder.layer}
    then = ImageNorm.then

    def counted(norm, linear, standardized):
        calls.extend([len(standardized)] if id(linear) in keys else [])
        return then(norm, linear, standardized)

    monkeypatch.setattr(ImageNorm, "then", counted)
    for layer in qformer.encoder.layer:
        for linear in (layer.crossattention.attention.key, layer.crossattention.attention.value):
            linear.register_forward_hook(lambda *_: pytest.fail("keys and values come from encode_images alone"))
    context = qformer.encode_images(IMAGES)
    qformer.image_pass(context)
    qformer.multimodal_pass(
        torch.cat([IDS, IDS]), torch.cat([MASK, MASK]), context, context.select(torch.tensor([1, 0]))
    )
    assert calls == [2, 2]


def test_computing_fewer_outputs_changes_none_of_them(qformer) -> None:
    for pads in (False, True):
        everything = qformer.text_pass(IDS, MASK, pad_outputs=pads)
        assert torch.allclose(everything[:, :1], qformer.text_pass(IDS, MASK, cls_only=True), atol=1e-6)
    context = qformer.encode_images(IMAGES)
    queries, none = qformer.multimodal_pass(IDS, MASK, context)
    assert none is None
    assert torch.allclose(queries, qformer.multimodal_pass(IDS, MASK, context, text_output=True)[0], atol=1e-6)


def test_real_tokens_do_not_need_the_pads(qformer) -> None:
    """Leaving pads out changes neither an output that is read nor a gradient; where they stand there are zeros."""
    results = []
    for pads in (True, False):
        qformer.zero_grad()
        context = qformer.encode_images(IMAGES)
        _, cache = qformer.image_pass(context)
        caption = qformer.caption_pass(IDS, MASK, cache, pad_outputs=pads)
        queries, beside = qformer.multimodal_pass(IDS, MASK, context, text_output=True, pad_outputs=pads)
        text = qformer.text_pass(IDS, MASK, pad_outputs=pads)
        outputs = (caption, beside, text)
        assert all(bool(output[MASK == 0].any()) == pads for output in outputs)
        outputs = (queries, *(output[MASK.bool()] for output in outputs))
        sum(output.square().sum() for output in outputs).backward()
        results.append((outputs, {n: p.grad for n, p in qformer.named_parameters()}))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    for name, grad in results[0][1].items():
        assert (grad is None) == (results[1][1][name] is None)
        assert grad is None or torch.allclose(grad, results[1][1][name], rtol=1e-4, atol=1e-4), name


def test_the_image_norm_is_folded_into_what_follows(qformer) -> None:
    """Same keys and values, same gradients, and none of the image features unless they are asked for."""
    norm, attention = qformer.ln_vision, qformer.encoder.layer[0].crossattention
    assert not norm.standardize(IMAGES).requires_grad
    assert norm.standardize(IMAGES.clone().requires_grad_()).requires_grad
    results = []
    for folded in (True, False):
        qformer.zero_grad()
        if folded:
            keys_values = attention.image_keys_values(norm.standardize(IMAGES), norm)
        else:
            keys_values = attention.keys_values(norm(IMAGES).flatten(0, 1), Layout(*IMAGES.shape[:2]))
        (keys_values[0].square().sum() + keys_values[1].pow(3).sum()).backward()
        results.append((keys_values, {n: p.grad for n, p in qformer.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert {"ln_vision.weight", "ln_vision.bias"} < results[0][1].keys()


def test_cross_attention_stands_in_every_nth_layer() -> None:
    qformer = tiny(num_hidden_layers=3, cross_attention_freq=2)
    assert [layer.crossattention is not None for layer in qformer.encoder.layer] == [True, False, True]
    assert qformer.encode_images(IMAGES).keys_values[1] is None
    assert len(qformer.encode_images(IMAGES).joined(qformer.encode_images(IMAGES[:1]))) == 3


def test_gradient_checkpointing_changes_no_gradient() -> None:
    """Also with dropout: the recomputation repeats its draws."""
    gradients = []
    for enabled in (False, True):
        qformer = tiny(dropout=0.2).train()
        qformer.set_gradient_checkpointing(enabled)
        torch.manual_seed(3)
        context = qformer.encode_images(IMAGES)
        query_output, cache = qformer.image_pass(context)
        queries, _ = qformer.multimodal_pass(IDS, MASK, context)
        logits = qformer.lm_logits(qformer.caption_pass(IDS, MASK, cache))
        (query_output.sum() + queries.square().sum() + logits.square().sum()).backward()
        gradients.append({n: p.grad for n, p in qformer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4), name


def test_bfloat16_autocast_and_bfloat16_images() -> None:
    qformer = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = qformer.encode_images(IMAGES.bfloat16())
        query_output, cache = qformer.image_pass(context)
        logits = qformer.lm_logits(qformer.caption_pass(IDS, MASK, cache))
        queries, _ = qformer.multimodal_pass(IDS, MASK, context)
    exact, _ = qformer.image_pass(qformer.encode_images(IMAGES))
    assert all(torch.isfinite(t).all() for t in (query_output, logits, queries))
    assert torch.allclose(query_output.float(), exact, atol=0.2, rtol=0.1)
    # a tower in half precision and no autocast: the image norm brings the features to the weights' dtype
    assert qformer.encode_images(IMAGES.bfloat16()).keys_values[0][0].dtype == torch.float32


def test_errors_name_what_is_wrong(qformer) -> None:
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        QFormerConfig(hidden_size=16, num_attention_heads=5)
    with pytest.raises(ValueError, match="cross_attention_freq=0"):
        QFormerConfig(cross_attention_freq=0)
    with pytest.raises(ValueError, match=r"image_embeds has shape \(2, 7, 9\)"):
        qformer.encode_images(IMAGES[..., :9])
    with pytest.raises(ValueError, match="13 tokens"):
        qformer.text_pass(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13))
    with pytest.raises(ValueError, match="input_ids"):
        qformer.multimodal_pass(IDS[:1], MASK[:1], qformer.encode_images(IMAGES))
