"""The denoising loss."""

from __future__ import annotations

import pytest
import torch

from blipdiff_train.losses.diffusion import noise_prediction_loss, noise_prediction_loss_per_sample


def test_by_hand() -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert noise_prediction_loss(prediction, target) == pytest.approx((0 + 4 + 9 + 1) / 4)
    assert noise_prediction_loss_per_sample(prediction, target).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7)])
def test_a_perfect_prediction_costs_nothing(shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape)
    assert noise_prediction_loss(noise, noise) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_computed_in_fp32(dtype: torch.dtype) -> None:
    noise = torch.full((1, 1, 1, 2), 1e-4)
    loss = noise_prediction_loss(noise.to(dtype), torch.zeros_like(noise))  # 1e-8 is zero in fp16
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(1e-8, rel=0.02)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"prediction \(2, 4\) and target \(2, 1\)"):
        noise_prediction_loss(torch.zeros(2, 4), torch.zeros(2, 1))
