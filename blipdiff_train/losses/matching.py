"""Image–text matching (ITM): hard negatives drawn from the similarities, then a two-way classification.

Source: BLIP-2 (arXiv 2301.12597) §3.1; salesforce/LAVIS ``lavis/models/blip2_models/blip2_qformer.py``
(``Blip2Qformer.forward``, the ITM part). Letters: B local batch, G batch over all processes.

Deliberate differences from LAVIS:

* A pair whose text reads the same as the row's own may be left out of the draw as well (``same_text``): LAVIS leaves
  out the own pair and pairs of the same image only, and so trains on matching pairs that are labelled as no match.
  Without ``same_text`` the draw's weights are LAVIS's.
* A row that has no admissible negative gets none and counts nowhere; LAVIS draws any pair for it, its own included,
  and so does ``draw_anyway``.
* All rows are drawn at once, with an explicit generator, from uniform numbers made on the CPU: no ``.item()`` per row,
  and the same draw on any device.
* The accuracy is reported beside what a constant answer would reach (LAVIS issues 149, 266, 282, 463 are about
  a loss that sits at that constant answer's value, 0.637).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MatchingResult:
    """Scalars: the loss with gradient, the share answered right, the share that a constant answer gets right."""

    loss: Tensor
    accuracy: Tensor
    baseline: Tensor


def inadmissible_negatives(positives: Tensor, same_text: Tensor | None = None) -> Tensor:
    """(B, G) bool: pairs that must not serve as negatives.

    Args:
        positives: (B, G) bool, the own pair and pairs of the same image.
        same_text: (B, G) bool, True where two texts read the same; None for the reference's behaviour.
    """
    return positives if same_text is None else positives | same_text


def negative_weights(sim: Tensor, inadmissible: Tensor, *, draw_anyway: bool = False) -> Tensor:
    """Probability of each pair as a row's negative, (B, G) fp32: softmax of the admissible similarities.

    A row without an admissible pair is all zeros, or uniform with ``draw_anyway``, as in the reference. No gradient:
    the draw is not differentiated.
    """
    sim = sim.detach().float().masked_fill(inadmissible.to(sim.device), -torch.inf)
    # softmax of a row of -inf is NaN; such a row has no negative at all
    return torch.softmax(sim, dim=1).nan_to_num(1.0 / sim.shape[1] if draw_anyway else 0.0)


def sample_hard_negatives(
    weights: Tensor, generator: torch.Generator, *, first_row: int = 0, num_rows: int | None = None
) -> Tensor:
    """One draw a row from ``weights`` (B, G) of :func:`negative_weights`.

    Args:
        generator: a CPU generator, whatever the device of ``weights``.
        first_row, num_rows: these B rows among those of all processes; they are all there are by default. Every process
            passes over the numbers of the others' rows, so that a row's negative does not depend on who holds it.

    Returns:
        (B,) int64 into the G pairs; never a pair of weight zero, except that a row of zeros (no admissible pair) gets
        0 and must not be counted.
    """
    uniform = torch.rand(num_rows or weights.shape[0], 1, generator=generator, dtype=torch.float64)
    uniform = uniform[first_row : first_row + weights.shape[0]].to(weights.device)
    cumulative = weights.double().cumsum(1)
    total = cumulative[:, -1:]
    # right=True passes over pairs of weight zero: their cumulative value equals the one before
    index = torch.searchsorted(cumulative, uniform * total, right=True).squeeze(1)
    # past the end where uniform·total rounds up to total: take the likeliest pair then, which is admissible;
    # and for a row of zeros, where the likeliest is the first
    return torch.where(index < weights.shape[1], index, weights.argmax(1))


def itm_loss(logits: Tensor, labels: Tensor, exists: Tensor) -> MatchingResult:
    """Cross-entropy, accuracy and majority baseline over the rows that exist.

    Args:
        logits: (R, 2), no match and match.
        labels: (R,) int64, 1 = match.
        exists: (R,) bool; False rows (no admissible negative) are left out of every mean. With all negatives there,
            R = 3B and the baseline is 2/3.
    """
    weight = exists.to(logits.device, torch.float32)
    count = weight.sum().clamp(min=1)
    per_row = F.cross_entropy(logits.float(), labels, reduction="none")
    right = (logits.detach().argmax(1) == labels).float()
    matches = (weight * (labels == 1)).sum() / count
    return MatchingResult(
        loss=(weight * per_row).sum() / count,
        accuracy=(weight * right).sum() / count,
        baseline=torch.maximum(matches, 1 - matches),
    )
