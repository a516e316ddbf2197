"""The denoising loss."""

from __future__ import annotations

import pytest
import torch

from blipdiff_train.losses.diffusion import noise_prediction_loss_per_sample, truncated_snr_weights


def test_by_hand() -> None:
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert noise_prediction_loss_per_sample(prediction, target).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7)])
def test_a_perfect_prediction_costs_nothing(shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape)
    assert not noise_prediction_loss_per_sample(noise, noise).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_computed_in_fp32(dtype: torch.dtype) -> None:
    noise = torch.full((1, 1, 1, 2), 1e-4)
    loss = noise_prediction_loss_per_sample(noise.to(dtype), torch.zeros_like(noise))  # 1e-8 is zero in fp16
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(1e-8, rel=0.02)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"prediction \(2, 4\) and target \(2, 1\)"):
        noise_prediction_loss_per_sample(torch.zeros(2, 4), torch.zeros(2, 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("alpha", [0.9, 0.5, 0.01])
def test_truncated_snr_weighs_the_error_of_the_picture_by_snr_or_one(prediction_type: str, alpha: float) -> None:
    alpha = torch.tensor([alpha], dtype=torch.float64)
    signal, spread, snr = alpha.sqrt(), (1 - alpha).sqrt(), alpha / (1 - alpha)
    picture, guess, noise = torch.randn(3, 1, 5, dtype=torch.float64)
    noisy = signal * picture + spread * noise
    guessed_noise = (noisy - signal * guess) / spread  # the noise that says `guess`
    if prediction_type == "epsilon":
        target, prediction = noise, guessed_noise
    else:
        target, prediction = signal * noise - spread * picture, signal * guessed_noise - spread * guess
    loss = noise_prediction_loss_per_sample(prediction, target)
    expected = snr.clamp(min=1) * (picture - guess).square().mean()
    assert truncated_snr_weights(snr, prediction_type) * loss == pytest.approx(expected.numpy(), rel=1e-4)


def test_truncated_snr_knows_its_predictions() -> None:
    with pytest.raises(ValueError, match="'sample' is not epsilon or v_prediction"):
        truncated_snr_weights(torch.ones(2), "sample")
