"""Image-grounded text generation (ITG): the next token of the caption, given the image's queries.

Source: BLIP-2 (arXiv 2301.12597) §3.1; salesforce/LAVIS ``lavis/models/blip2_models/blip2_qformer.py``
(``Blip2Qformer.forward``, the LM part) and ``Qformer.py`` (``BertLMHeadModel.forward``).
Letters: B batch, L text tokens, V vocabulary.

Differences from LAVIS: none in the numbers. Targets are told from pads by the mask, not by the pad's id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from blipdiff_train.common.shapes import check_shape

IGNORED = -100


@dataclass(frozen=True)
class CaptioningResult:
    """Scalars: the loss with gradient, the share of tokens predicted right, the number of tokens counted."""

    loss: Tensor
    token_accuracy: Tensor
    num_tokens: Tensor


def itg_loss(logits: Tensor, input_ids: Tensor, attention_mask: Tensor, *, label_smoothing: float) -> CaptioningResult:
    """Cross-entropy of each token given those before it, the mean over all tokens of the batch that are no pads.

    Args:
        logits: (B, L or L − 1, V); position i predicts token i + 1. [SEP] is a target, the first token is none.
        input_ids: (B, L); the first column is not read, so [CLS] and [DEC] are alike here.
        attention_mask: (B, L), zero at pads.
        label_smoothing: over the whole vocabulary.
    """
    sizes = check_shape(input_ids, "B L", name="input_ids")
    logits = logits[:, : sizes["L"] - 1].float()
    check_shape(logits, "B T V", name="logits", B=sizes["B"], T=sizes["L"] - 1)
    targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    counted = targets != IGNORED
    right = (logits.detach().argmax(-1) == targets) & counted
    num_tokens = counted.sum()
    return CaptioningResult(loss, right.sum() / num_tokens.clamp(min=1), num_tokens)
