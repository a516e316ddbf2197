"""Image–text contrast (ITC): similarities over all processes, soft targets, and retrieval ranks of the same numbers.

Source: BLIP-2 (arXiv 2301.12597) §3.1; salesforce/LAVIS ``lavis/models/blip2_models/blip2_qformer.py``
(``Blip2Qformer.forward``, the ITC part). Letters: B local batch, G batch over all processes, Q queries, E embed dim.

Deliberate differences from LAVIS:

* Batch 1 works: no axis is squeezed by size (LAVIS's ``.squeeze()`` drops the batch axis there).
* One formula for batches with and without shared images: without, it equals cross-entropy with label smoothing.
* Everything is computed in fp32, under autocast too.

Kept from LAVIS: the gathered features carry no gradient, so each direction trains the local side only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blipdiff_train.common.shapes import check_shape


def similarities(
    image_feats: Tensor, text_feats: Tensor, image_feats_all: Tensor, text_feats_all: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Best-query similarities of the local pairs against all, divided by the temperature.

    Args:
        image_feats: (B, Q, E), unit length, local, with gradient.
        text_feats: (B, E), unit length, local, with gradient.
        image_feats_all, text_feats_all: the same of all processes, (G, Q, E) and (G, E), without gradient.
        temperature: scalar, learned.

    Returns:
        sim_i2t (B, G) of local images to all texts and sim_t2i (B, G) of local texts to all images, fp32.
    """
    sizes = check_shape(image_feats, "B Q E", name="image_feats")
    check_shape(text_feats, "B E", name="text_feats", B=sizes["B"], E=sizes["E"])
    sizes = check_shape(image_feats_all, "G Q E", name="image_feats_all", Q=sizes["Q"], E=sizes["E"])
    check_shape(text_feats_all, "G E", name="text_feats_all", G=sizes["G"], E=sizes["E"])
    with torch.autocast(image_feats.device.type, enabled=False):
        sim_i2t = torch.einsum("bqe,ge->bgq", image_feats.float(), text_feats_all.float())
        sim_t2i = torch.einsum("be,gqe->bgq", text_feats.float(), image_feats_all.float())
        # max, not amax: on a tie one query takes the gradient, as in the reference
        return sim_i2t.max(-1).values / temperature.float(), sim_t2i.max(-1).values / temperature.float()


def positive_pairs(
    num_rows: int, num_all: int, rank: int, image_id: Tensor | None = None, image_id_all: Tensor | None = None
) -> Tensor:
    """Which of all G pairs count as a match of each local one: the own pair and every pair with the same image.

    Args:
        num_rows: B. num_all: G = B × processes. rank: this process's number; its rows are rank·B + arange(B).
        image_id, image_id_all: (B,) and (G,), equal id = same image; None where every image is its own.

    Returns:
        (B, G), True at matches; symmetric in meaning, so it serves both directions.
    """
    device = None if image_id is None else image_id.device
    own = torch.arange(num_rows, device=device) + rank * num_rows
    matches = own[:, None] == torch.arange(num_all, device=device)[None, :]
    if image_id is not None:
        matches = matches | (image_id[:, None] == image_id_all[None, :])
    return matches


def itc_loss(sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy of both directions against (1 − s)·(positives, normalised) + s / G, averaged; fp32 scalar.

    Args:
        sim_i2t, sim_t2i: (B, G) of :func:`similarities`.
        positives: (B, G) bool of :func:`positive_pairs`.
        label_smoothing: s in [0, 1).
    """
    targets = positives.to(sim_i2t.device, torch.float32)
    targets = (1 - label_smoothing) * targets / targets.sum(1, keepdim=True) + label_smoothing / targets.shape[1]
    loss_i2t = -(targets * F.log_softmax(sim_i2t.float(), dim=1)).sum(1).mean()
    loss_t2i = -(targets * F.log_softmax(sim_t2i.float(), dim=1)).sum(1).mean()
    return (loss_i2t + loss_t2i) / 2


def recall_at_k(scores: Tensor, positives: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Share of rows with a positive among the k highest scores, for each k.

    Args:
        scores: (N, M), higher is better. Ties are broken against us: a positive must beat what it ties with, so
            constant scores give no recall.
        positives: (N, M) bool, at least one a row.
    """
    best_positive = scores.masked_fill(~positives, -torch.inf).max(1).values
    num_ahead = ((scores >= best_positive[:, None]) & ~positives).sum(1)
    return {k: (num_ahead < k).float().mean().item() for k in ks}
