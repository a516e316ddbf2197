"""Image–text retrieval with a stage-1 model: ranks by contrast, optionally re-ranked by matching.

Source: BLIP-2 (arXiv 2301.12597) §4.4; salesforce/LAVIS ``blip2_models/blip2_image_text_matching.py`` and
``compute_sim_matrix`` of ``blip2_models/blip2_qformer.py``: the k best candidates by contrast get the sum of their
contrast score (without temperature) and their match logit. Letters: N images, M texts, k candidates.

Differences from LAVIS: an image's keys and values are computed once for all its candidates, and a positive must beat
what it ties with to count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blipdiff_train.losses.contrastive import recall_at_k
from blipdiff_train.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blipdiff_train.data.samples import Stage1Batch
    from blipdiff_train.models.alignment import AlignmentHeads
    from blipdiff_train.models.image_encoder import ImageEncoder
    from blipdiff_train.models.qformer import QFormer


@dataclass(frozen=True)
class RetrievalSet:
    """Features of N images and M texts; a text belongs to the image with its id."""

    image_feats: Tensor  # N Q E
    image_embeds: Tensor  # N P D_image, on the CPU
    image_id: Tensor  # N, each id once
    text_feats: Tensor  # M E
    input_ids: Tensor  # M L
    attention_mask: Tensor  # M L
    text_image_id: Tensor  # M

    @property
    def matches(self) -> Tensor:
        """(N, M) bool: which text belongs to which image."""
        return self.image_id[:, None] == self.text_image_id[None, :]


@torch.no_grad()
def embed_pairs(
    image_encoder: ImageEncoder,
    qformer: QFormer,
    heads: AlignmentHeads,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Stage1Batch],
    *,
    max_text_len: int = 32,
) -> RetrievalSet:
    """Run the image and the text pass over all pairs; an image that comes with several captions is kept once.

    Raises:
        ValueError: no batch.
    """
    device = qformer.query_tokens.device
    seen: set[int] = set()
    images: list[tuple[Tensor, ...]] = []
    texts: list[tuple[Tensor, ...]] = []
    with evaluating(qformer, heads):
        for batch in batches:
            new = [
                row for row, number in enumerate(batch.image_id.tolist()) if not (number in seen or seen.add(number))
            ]
            if new:
                image_embeds = image_encoder(batch.image[new].to(device))
                query_output, _ = qformer.image_pass(qformer.encode_images(image_embeds))
                images.append((heads.image_feats(query_output), image_embeds.cpu(), batch.image_id[new].to(device)))
            tokens = tokenizer(
                batch.caption,
                padding="max_length",
                padding_side="right",
                truncation=True,
                max_length=max_text_len,
                return_tensors="pt",
            ).to(device)
            text_cls = qformer.text_pass(tokens.input_ids, tokens.attention_mask, cls_only=True)[:, 0]
            texts.append(
                (heads.text_feats(text_cls), tokens.input_ids, tokens.attention_mask, batch.image_id.to(device))
            )
    if not texts:
        raise ValueError("retrieval needs at least one pair; the data has none")
    return RetrievalSet(
        *(torch.cat(rows) for rows in zip(*images, strict=True)),
        *(torch.cat(rows) for rows in zip(*texts, strict=True)),
    )


def contrast_scores(pairs: RetrievalSet) -> Tensor:
    """(N, M) best-query cosine of every image with every text; one image at a time, so that memory stays M × Q."""
    return torch.stack([(image @ pairs.text_feats.t()).amax(0) for image in pairs.image_feats])


@torch.no_grad()
def match_scores(
    qformer: QFormer,
    heads: AlignmentHeads,
    pairs: RetrievalSet,
    image_index: Tensor,
    text_index: Tensor,
    *,
    chunk: int = 64,
) -> Tensor:
    """Match logits (K,) of the pairs (image_index[i], text_index[i]); repeated images of a chunk are encoded once."""
    device = qformer.query_tokens.device
    scores = []
    with evaluating(qformer, heads):
        for images, texts in zip(image_index.split(chunk), text_index.split(chunk), strict=True):
            unique, place = images.unique(return_inverse=True)
            context = qformer.encode_images(pairs.image_embeds[unique.cpu()].to(device)).select(place)
            query_output, _ = qformer.multimodal_pass(pairs.input_ids[texts], pairs.attention_mask[texts], context)
            scores.append(heads.match_logits(query_output)[:, 1])
    return torch.cat(scores)


def rerank(
    qformer: QFormer,
    heads: AlignmentHeads,
    pairs: RetrievalSet,
    scores: Tensor,
    candidates: int,
    *,
    texts: bool = False,
) -> Tensor:
    """``scores`` with the match logit added to each row's ``candidates`` best, and −∞ elsewhere.

    Args:
        scores: (N, M), rows of images; with ``texts`` (M, N), rows of texts.
    """
    candidates = min(candidates, scores.shape[1])
    columns = scores.topk(candidates, dim=1).indices.flatten()
    rows = torch.arange(len(scores), device=scores.device).repeat_interleave(candidates)
    images, captions = (columns, rows) if texts else (rows, columns)
    result = torch.full_like(scores, -torch.inf)
    result[rows, columns] = scores[rows, columns] + match_scores(qformer, heads, pairs, images, captions)
    return result


def evaluate_retrieval(
    image_encoder: ImageEncoder,
    qformer: QFormer,
    heads: AlignmentHeads,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Stage1Batch],
    *,
    max_text_len: int = 32,
    rerank_candidates: int = 0,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """Recall both ways over the whole set: ``i2t_r1`` …, and ``i2t_r1_reranked`` … with ``rerank_candidates`` > 0."""
    pairs = embed_pairs(image_encoder, qformer, heads, tokenizer, batches, max_text_len=max_text_len)
    scores, matches = contrast_scores(pairs), pairs.matches
    metrics = {f"i2t_r{k}": value for k, value in recall_at_k(scores, matches, ks).items()}
    metrics |= {f"t2i_r{k}": value for k, value in recall_at_k(scores.t(), matches.t(), ks).items()}
    if rerank_candidates > 0:
        i2t = rerank(qformer, heads, pairs, scores, rerank_candidates)
        t2i = rerank(qformer, heads, pairs, scores.t(), rerank_candidates, texts=True)
        metrics |= {f"i2t_r{k}_reranked": value for k, value in recall_at_k(i2t, matches, ks).items()}
        metrics |= {f"t2i_r{k}_reranked": value for k, value in recall_at_k(t2i, matches.t(), ks).items()}
    return metrics
