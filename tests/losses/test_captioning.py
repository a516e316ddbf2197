from __future__ import annotations

import pytest
import torch

from blipdiff_train.losses.captioning import itg_loss, predicting_positions

IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = (IDS > 0).long()
PREDICTING = predicting_positions(MASK)
TARGETS = IDS[:, 1:][PREDICTING]


def test_each_token_but_the_first_is_predicted_by_the_one_before() -> None:
    assert PREDICTING.tolist() == [[True, True, True], [True, True, False]]
    assert TARGETS.tolist() == [5, 6, 3, 7, 3]


def test_the_mean_is_over_tokens_of_the_batch_by_hand() -> None:
    logits = torch.randn(2, 4, 9)
    log_probs = logits.log_softmax(-1)
    targets = [(0, 0, 5), (0, 1, 6), (0, 2, 3), (1, 0, 7), (1, 1, 3)]
    smooth = [-(0.9 * log_probs[b, p, t] + 0.1 * log_probs[b, p].mean()) for b, p, t in targets]
    result = itg_loss(logits[:, :-1][PREDICTING], TARGETS, label_smoothing=0.1)
    assert torch.allclose(result.loss, torch.stack(smooth).mean())
    assert result.num_tokens.item() == 5


def test_accuracy_counts_the_tokens_that_are_predicted_right() -> None:
    logits = torch.nn.functional.one_hot(TARGETS, 9).float() * 5
    assert itg_loss(logits, TARGETS, label_smoothing=0.0).token_accuracy.item() == 1.0
    assert itg_loss(logits, TARGETS.clone().fill_(3), label_smoothing=0.0).token_accuracy.item() == pytest.approx(0.4)


def test_half_precision_logits_give_a_fp32_loss_and_shapes_are_checked() -> None:
    assert itg_loss(torch.randn(5, 9).bfloat16(), TARGETS, label_smoothing=0.1).loss.dtype == torch.float32
    with pytest.raises(ValueError, match="logits has shape"):
        itg_loss(torch.randn(4, 9), TARGETS, label_smoothing=0.1)
