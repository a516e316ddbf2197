"""The denoising loss of stage 2 and of fine-tuning.

Source: LAVIS ``blip_diffusion.py`` ``forward`` (``F.mse_loss(noise_pred.float(), noise.float(),
reduction="mean")``); Ho et al. 2020, equation 14 (``L_simple``).

Deliberate differences from LAVIS:

* Shapes must be equal, where ``mse_loss`` broadcasts with a warning.
* The target may be the velocity (Salimans and Ho 2022) for a model of that kind; LAVIS knows the noise only.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def noise_prediction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all elements, fp32 scalar.

    Args:
        prediction: (B C h w) what the UNet says, any floating dtype.
        target: (B C h w) the noise (or the velocity, for a model of that kind), any floating dtype.

    Raises:
        ValueError: the shapes differ.
    """
    return functional.mse_loss(*_as_float(prediction, target))


def noise_prediction_loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 (B,); its mean is :func:`noise_prediction_loss`.

    Raises:
        ValueError: the shapes differ.
    """
    prediction, target = _as_float(prediction, target)
    return (prediction - target).square().flatten(1).mean(dim=1)


def _as_float(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    return prediction.float(), target.float()  # fp32: squares of half-precision errors underflow
