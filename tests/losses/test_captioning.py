from __future__ import annotations

import pytest
import torch

from blipdiff_train.losses.captioning import itg_loss

IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = (IDS > 0).long()


def test_the_mean_is_over_tokens_of_the_batch_by_hand() -> None:
    logits = torch.randn(2, 4, 9)
    log_probs = logits.log_softmax(-1)
    targets = [(0, 0, 5), (0, 1, 6), (0, 2, 3), (1, 0, 7), (1, 1, 3)]
    smooth = [-(0.9 * log_probs[b, p, t] + 0.1 * log_probs[b, p].mean()) for b, p, t in targets]
    result = itg_loss(logits, IDS, MASK, label_smoothing=0.1)
    assert torch.allclose(result.loss, torch.stack(smooth).mean())
    assert result.num_tokens.item() == 5


def test_accuracy_and_no_influence_of_pads_and_first_token() -> None:
    logits = torch.nn.functional.one_hot(torch.roll(IDS, -1, 1), 9).float() * 5
    logits[1, 2:] = torch.nan  # predicts a pad, and the position behind the text
    logits[0, 3] = torch.nan
    result = itg_loss(logits.nan_to_num(123.0), IDS, MASK, label_smoothing=0.0)
    assert result.token_accuracy.item() == 1.0
    other = IDS.clone()
    other[:, 0] = 8
    assert torch.equal(result.loss, itg_loss(logits.nan_to_num(-9.0), other, MASK, label_smoothing=0.0).loss)


def test_half_precision_logits_give_a_fp32_loss_and_shapes_are_checked() -> None:
    assert itg_loss(torch.randn(2, 4, 9).bfloat16(), IDS, MASK, label_smoothing=0.1).loss.dtype == torch.float32
    with pytest.raises(ValueError, match="logits has shape"):
        itg_loss(torch.randn(2, 2, 9), IDS, MASK, label_smoothing=0.1)
