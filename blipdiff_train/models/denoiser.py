"""VAE, UNet and noise schedule of a latent diffusion model, behind the few operations that training and
sampling need.

Sources: LAVIS ``blip_diffusion.py`` (``forward``, ``_generate``); diffusers 0.32.2
``pipeline_blip_diffusion.py``; Rombach et al. 2022; Ho and Salimans 2022 (guidance); Salimans and Ho 2022,
section 4 (velocity).

Deliberate differences:

* The scaling factor is ``vae.config.scaling_factor``, the size of a latent is that of the VAE's own levels.
  The references write 0.18215 and 8, or count the UNet's levels (diffusers), which is right for Stable
  Diffusion only.
* The VAE runs in the dtype of its weights with autocast off (LAVIS forces fp16 on the image whatever the
  VAE's dtype), without graph, and stays in eval mode.
* The schedules add no clipping of their own: ``clip_sample`` is false for DDIM and DDPM, whose defaults
  clip; Stable Diffusion's latents reach ±30.
* ``prediction_type`` may be ``v_prediction`` (Stable Diffusion 2); ``sample`` is refused.
* Noise is drawn per sample from generators that the caller makes, on the CPU, so that a sample's noise
  depends neither on its batch nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blipdiff_train.common.shapes import check_shape

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

SCHEDULERS = ("pndm", "ddim")


def draw_normal(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal fp32 noise (B, \\*shape) on the CPU, row b from ``generators[b]``."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def draw_timesteps(num_train_timesteps: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform timesteps 0 … T−1 (B) int64 on the CPU, row b from ``generators[b]``."""
    return torch.stack([torch.randint(num_train_timesteps, (), generator=generator) for generator in generators])


class Denoiser(nn.Module):
    """A latent diffusion model.

    Args:
        vae: ``AutoencoderKL``; frozen and in eval mode from here on.
        unet: ``UNet2DConditionModel``.
        noise_scheduler: any diffusers schedule of the model; only its config is read (betas, prediction
            type).

    Attributes:
        scaling_factor: latents are VAE outputs times this.
        num_train_timesteps: T.
        vae_factor: pixels a latent cell spans along each axis.
        latent_channels: C.
        default_size: side in pixels that the UNet was made for.

    Raises:
        ValueError: a prediction type other than epsilon and v_prediction, or a VAE with shifted latents.
    """

    def __init__(self, vae: AutoencoderKL, unet: UNet2DConditionModel, noise_scheduler: SchedulerMixin) -> None:
        super().__init__()
        from diffusers import DDPMScheduler

        self.vae = vae.requires_grad_(False).eval()
        self.unet = unet
        self.scheduler_config: dict[str, Any] = {
            key: value for key, value in noise_scheduler.config.items() if not key.startswith("_")
        }
        self.prediction_type: str = self.scheduler_config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the schedule's prediction_type is {self.prediction_type!r}; expected epsilon or v_prediction"
            )
        if getattr(vae.config, "shift_factor", None) is not None:
            raise ValueError("this VAE shifts its latents (shift_factor); expected one of Stable Diffusion 1 or 2")
        self.scaling_factor: float = vae.config.scaling_factor
        self.vae_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels: int = vae.config.latent_channels
        sample_size = unet.config.sample_size
        self.default_size: int = (sample_size if isinstance(sample_size, int) else sample_size[0]) * self.vae_factor
        schedule = DDPMScheduler.from_config(self.scheduler_config)
        self.num_train_timesteps: int = schedule.config.num_train_timesteps
        # not a buffer: Module.to(bfloat16) would round it, and with it the noise level of every sample
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod

    def train(self, mode: bool = True) -> Denoiser:
        """Training mode for the UNet; the VAE stays in eval mode."""
        super().train(mode)
        self.vae.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture.

        Raises:
            ValueError: a side is not a positive multiple of the VAE's factor.
        """
        if height < 1 or width < 1 or height % self.vae_factor or width % self.vae_factor:
            raise ValueError(f"pictures of {height}×{width} pixels: both must be multiples of {self.vae_factor}")
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        """The VAE's posterior (B 2C h w) fp32, means then log variances, unscaled: what a shard may cache.

        Args:
            images: (B 3 H W) in [−1, 1].
        """
        sizes = check_shape(images, "B 3 H W", name="target_image")
        self.latent_shape(sizes["H"], sizes["W"])
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.parameters.float()

    @torch.no_grad()
    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B C h w) fp32 drawn from the posterior, or its mean where ``noise`` is None.

        Args:
            moments: (B 2C h w) from :meth:`encode_moments`.
            noise: (B C h w) standard normal.
        """
        check_shape(moments, "B M h w", name="latent_moments", M=2 * self.latent_channels)
        mean, log_variance = moments.float().chunk(2, dim=1)  # B C h w each
        if noise is None:
            return mean * self.scaling_factor
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the clamp is diffusers'
        return (mean + deviation * noise.to(mean)) * self.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, (B C h w) fp32 (Ho et al. 2020, equation 4)."""
        signal, spread = self._levels(timesteps)
        return signal * latents.float() + spread * noise.float()

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What :meth:`predict_noise` should say (B C h w) fp32: ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0."""
        if self.prediction_type == "epsilon":
            return noise.float()
        signal, spread = self._levels(timesteps)
        return signal * noise.float() - spread * latents.float()

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)  # B 1 1 1
        return alphas.sqrt(), (1.0 - alphas).sqrt()

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """ᾱ_t / (1 − ᾱ_t) of the timesteps (B), fp32."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return alphas / (1.0 - alphas)

    def predict_noise(
        self, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, **unet_arguments: Any
    ) -> Tensor:
        """The UNet's answer (B C h w), in the UNet's dtype (or autocast's).

        Args:
            noisy_latents: (B C h w).
            timesteps: (B) int64, or a scalar.
            prompt_embeds: (B L D).
            unet_arguments: further arguments of the UNet, e.g. a ControlNet's residuals.
        """
        dtype = self.unet.dtype
        return self.unet(
            noisy_latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype), **unet_arguments
        ).sample

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B 3 H W) in [0, 1] fp32 from scaled latents (B C h w)."""
        return (self.decode_raw(latents) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def decode_raw(self, latents: Tensor) -> Tensor:
        """The VAE's output (B 3 H W) fp32, about [−1, 1], not clamped."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode((latents.float() / self.scaling_factor).to(self.vae.dtype)).sample.float()

    def make_scheduler(self, name: str = "pndm", **overrides: Any) -> SchedulerMixin:
        """A fresh sampler with this model's betas and prediction type.

        ``pndm`` is what BLIP-Diffusion generates with (PLMS: n + 1 calls of the UNet for n steps). ``ddim``
        has ``steps_offset`` 1, as in Stable Diffusion 1.5's own config, from which the reference's inversion
        takes it.

        Args:
            name: one of :data:`SCHEDULERS`.
            overrides: values of the diffusers class.

        Raises:
            ValueError: an unknown name.
        """
        from diffusers import DDIMScheduler, PNDMScheduler

        config = {"set_alpha_to_one": False, **self.scheduler_config, "clip_sample": False}
        if name == "pndm":
            return PNDMScheduler.from_config({**config, "skip_prk_steps": True, **overrides})
        if name == "ddim":
            return DDIMScheduler.from_config({**config, "steps_offset": 1, **overrides})
        raise ValueError(f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}")

    @torch.no_grad()
    def sample(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        negative_embeds: Tensor | None = None,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        scheduler: str = "pndm",
        unet_arguments: Callable[[Tensor, Tensor, Tensor], dict[str, Any]] | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Scaled latents (B C h w) fp32 of pictures, from noise.

        Args:
            latents: (B C h w) standard normal.
            prompt_embeds: (B L D).
            negative_embeds: (B L D), used if ``guidance`` > 1; the batch of the UNet is then [negative,
                prompt].
            steps: denoising steps.
            guidance: weight of the prompt against the negative prompt; ≤ 1 turns guidance off.
            scheduler: one of :data:`SCHEDULERS`.
            unet_arguments: called before each UNet call with (UNet batch, timestep, text states); its result
                goes to the UNet (a ControlNet's residuals).
            on_step: called after each step with (step, guided prediction, latents).

        Raises:
            ValueError: guidance without ``negative_embeds``, or sizes that do not belong together.
        """
        batch_size = check_shape(latents, "B C h w", name="latents", C=self.latent_channels)["B"]
        check_shape(prompt_embeds, "B L D", name="prompt_embeds", B=batch_size)
        if steps < 1:
            raise ValueError(f"steps={steps}; at least 1 is needed")
        guided = guidance > 1.0
        states = prompt_embeds
        if guided:
            if negative_embeds is None:
                raise ValueError(
                    f"guidance={guidance} needs the hidden states of a negative prompt (an empty one will do)"
                )
            states = torch.cat([negative_embeds, prompt_embeds])  # 2B L D

        sampler = self.make_scheduler(scheduler)
        sampler.set_timesteps(steps, device=latents.device)
        latents = latents.float() * sampler.init_noise_sigma
        for step, timestep in enumerate(sampler.timesteps):
            unet_input = sampler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            arguments = unet_arguments(unet_input, timestep, states) if unet_arguments is not None else {}
            # fp32: guidance multiplies the difference of two close numbers, and PLMS extrapolates
            prediction = self.predict_noise(unet_input, timestep, states, **arguments).float()
            if guided:
                negative, positive = prediction.chunk(2)
                prediction = negative + guidance * (positive - negative)
            latents = sampler.step(prediction, timestep, latents).prev_sample
            if on_step is not None:
                on_step(step, prediction, latents)
        return latents
