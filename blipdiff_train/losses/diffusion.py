"""The denoising loss of stage 2 and of fine-tuning.

Source: LAVIS ``blip_diffusion.py`` ``forward`` (``F.mse_loss(noise_pred.float(), noise.float(),
reduction="mean")``); Ho et al. 2020, equation 14 (``L_simple``).

Deliberate differences from LAVIS:

* One loss a sample, whose mean is LAVIS's. Shapes must be equal, where ``mse_loss`` broadcasts with a warning.
* The losses of the timesteps may be weighted; without weights they are LAVIS's.
* The target may be the velocity (Salimans and Ho 2022) for a model of that kind; LAVIS knows the noise only.
"""

from __future__ import annotations

from torch import Tensor


def noise_prediction_loss_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 (B,).

    Args:
        prediction: (B C h w) what the UNet says, any floating dtype.
        target: (B C h w) the noise (or the velocity, for a model of that kind), any floating dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape")
    # fp32: squares of half-precision errors underflow
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def truncated_snr_weights(snr: Tensor, prediction_type: str) -> Tensor:
    """Weights (B) fp32 of the samples' losses: "truncated SNR" of Salimans and Ho 2022 (arXiv 2202.00512), section 4.

    The error of the noise counts at low noise, that of the picture at high noise, whichever is larger: max(SNR, 1) on
    the squared error of x_0. With constant weights the first steps of sampling, which settle whose colours are drawn,
    have by far the smallest losses, and a short training hardly looks at them.

    Args:
        snr: (B) ᾱ / (1 − ᾱ) of each sample's timestep, > 0.
        prediction_type: ``epsilon`` or ``v_prediction``, what the weighted losses are squared errors of.

    Raises:
        ValueError: another prediction type.
    """
    on_picture = snr.float().clamp(min=1.0)
    if prediction_type == "epsilon":  # |ε − ε̂|² = SNR |x − x̂|²
        return on_picture / snr
    if prediction_type == "v_prediction":  # |v − v̂|² = (SNR + 1) |x − x̂|²
        return on_picture / (snr + 1.0)
    raise ValueError(f"prediction_type={prediction_type!r} is not epsilon or v_prediction")
