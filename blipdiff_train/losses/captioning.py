"""Image-grounded text generation (ITG): the next token of the caption, given the image's queries.

Source: BLIP-2 (arXiv 2301.12597) §3.1; salesforce/LAVIS ``lavis/models/blip2_models/blip2_qformer.py``
(``Blip2Qformer.forward``, the LM part) and ``Qformer.py`` (``BertLMHeadModel.forward``).
Letters: B batch, L text tokens, V vocabulary, N tokens that are predicted.

Deliberate differences from LAVIS, none of which changes a number:

* Targets are told from pads by the mask, not by the pad's id.
* Only positions that predict a token are scored; LAVIS scores all and ignores pads in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blipdiff_train.common.shapes import check_shape


@dataclass(frozen=True)
class CaptioningResult:
    """Scalars: the loss with gradient, the share of tokens predicted right, the number of tokens counted."""

    loss: Tensor
    token_accuracy: Tensor
    num_tokens: Tensor


def predicting_positions(attention_mask: Tensor) -> Tensor:
    """(B, L), zero at pads → (B, L − 1) bool: position i predicts token i + 1, unless that is a pad.

    ``text_output[:, :-1][positions]`` are the states to score, ``input_ids[:, 1:][positions]`` their targets (N,):
    [SEP] is a target, the first token is none, so [CLS] and [DEC] are alike here.
    """
    return attention_mask[:, 1:].bool()


def itg_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float) -> CaptioningResult:
    """Cross-entropy of each token given those before it, the mean over all tokens of the batch that are no pads.

    Args:
        logits: (N, V), any floating dtype.
        targets: (N,) token ids of :func:`predicting_positions`.
        label_smoothing: over the whole vocabulary.
    """
    check_shape(logits, "N V", name="logits", N=len(targets))
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    right = logits.detach().argmax(-1) == targets
    return CaptioningResult(loss, right.float().mean(), torch.tensor(len(targets), device=targets.device))
