from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
from blipdiff_train.data.samples import Stage1Batch
from blipdiff_train.evaluation.retrieval import contrast_scores, embed_pairs, evaluate_retrieval, match_scores, rerank
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.qformer import QFormer, QFormerConfig

VOCABULARY = Path(__file__).parents[1] / "goldens" / "stage1_single" / "freq1"


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tower = ImageEncoder.from_config(
        hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = QFormerConfig(99, 16, 2, 2, 32, 16, 4, 1, 12)
    return tower, QFormer(config), AlignmentHeads(16, 8), load_bert_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def batches() -> list[Stage1Batch]:
    """Five images; the image with id 1 comes with two captions, in different batches."""
    ids = [[0, 1, 2], [1, 3, 4]]
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    captions = [["dog", "red cat", "blue cup"], ["cat on grass", "two birds", "old train"]]
    return [
        Stage1Batch(images[row], caption, torch.tensor(row), [str(i) for i in row], torch.arange(3) + 3 * number)
        for number, (row, caption) in enumerate(zip(ids, captions, strict=True))
    ]


def test_an_image_with_two_captions_is_ranked_once(parts, batches) -> None:
    pairs = embed_pairs(*parts, batches, max_text_len=12)
    assert pairs.image_id.tolist() == [0, 1, 2, 3, 4]
    assert pairs.text_image_id.tolist() == [0, 1, 2, 1, 3, 4]
    assert pairs.matches.sum(1).tolist() == [1, 2, 1, 1, 1]
    scores = contrast_scores(pairs)
    assert scores.shape == (5, 6)
    expected = torch.einsum("nqe,me->nmq", pairs.image_feats, pairs.text_feats).amax(-1)
    assert torch.allclose(scores, expected, atol=1e-6)


def test_reranking_adds_the_match_logit_to_the_best_only(parts, batches) -> None:
    tower, qformer, heads, _ = parts
    pairs = embed_pairs(*parts, batches, max_text_len=12)
    scores = contrast_scores(pairs)
    result = rerank(qformer, heads, pairs, scores, 2)
    assert torch.isfinite(result).sum(1).tolist() == [2] * 5
    row, column = 3, int(scores[3].argmax())
    context = qformer.eval().encode_images(tower(batches[1].image[1:2]))
    queries, _ = qformer.multimodal_pass(
        pairs.input_ids[column : column + 1], pairs.attention_mask[column : column + 1], context
    )
    expected = scores[row, column] + heads.match_logits(queries)[0, 1]
    assert torch.allclose(result[row, column], expected, atol=1e-5)

    # rows of texts, all candidates: the same sums, transposed
    everything = rerank(qformer, heads, pairs, scores, 99)
    assert torch.allclose(rerank(qformer, heads, pairs, scores.t(), 99, texts=True), everything.t(), atol=1e-5)
    one = match_scores(qformer, heads, pairs, torch.tensor([3]), torch.tensor([column]), chunk=1)
    assert torch.allclose(one, heads.match_logits(queries)[:, 1], atol=1e-5)


def test_recalls_and_modes(parts, batches) -> None:
    qformer = parts[1].train()
    metrics = evaluate_retrieval(*parts, batches, max_text_len=12, rerank_candidates=3)
    assert qformer.training
    assert {"i2t_r1", "t2i_r10", "i2t_r5_reranked"} <= set(metrics)
    assert metrics["i2t_r10"] == metrics["t2i_r5"] == 1.0
    assert metrics["t2i_r1"] <= metrics["t2i_r5"]
    with pytest.raises(ValueError, match="at least one pair"):
        evaluate_retrieval(*parts, [])
