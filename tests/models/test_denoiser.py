"""VAE, UNet and schedule behind one door."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import TARGET_SIZE, TEXT_LENGTH, WIDTH, tiny_denoiser

from blipdiff_train.models.denoiser import Denoiser, draw_normal, draw_timesteps


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return tiny_denoiser().eval()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sizes_come_from_the_vae(denoiser: Denoiser) -> None:
    assert denoiser.vae_factor == 4  # three levels, where the UNet has two
    assert denoiser.default_size == TARGET_SIZE
    assert denoiser.latent_shape(24, 40) == (4, 6, 10)
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    moments = denoiser.encode_moments(images)
    assert moments.shape == (2, 8, 6, 10)
    assert denoiser.decode(denoiser.sample_latents(moments)).shape == (2, 3, 24, 40)
    with pytest.raises(ValueError, match="pictures of 30×32 pixels: both must be multiples of 4"):
        denoiser.encode_moments(torch.zeros(1, 3, 30, 32))


def test_latents_are_the_scaled_posterior(denoiser: Denoiser) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = denoiser.vae.encode(images).latent_dist
    noise = torch.randn(2, 4, 4, 4)
    latents = denoiser.sample_latents(denoiser.encode_moments(images), noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * 0.3)
    torch.testing.assert_close(denoiser.sample_latents(denoiser.encode_moments(images)), posterior.mean * 0.3)
    assert not latents.requires_grad


def test_the_vae_stays_frozen_in_eval() -> None:
    denoiser = tiny_denoiser().train()
    assert denoiser.unet.training
    assert not denoiser.vae.training
    assert not any(parameter.requires_grad for parameter in denoiser.vae.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_diffusers(prediction_type: str) -> None:
    denoiser = tiny_denoiser(prediction_type=prediction_type)
    scheduler = DDPMScheduler.from_config(denoiser.scheduler_config)
    latents, noise = torch.randn(2, 3, 4, 5, 5)
    timesteps = torch.tensor([0, 411, 999])
    torch.testing.assert_close(
        denoiser.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(denoiser.training_target(latents, noise, timesteps), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_a_perfect_prediction_leads_to_the_picture(prediction_type: str, scheduler: str) -> None:
    # a UNet that knows the clean latents: whatever the noise, sampling must arrive at them
    denoiser = tiny_denoiser(prediction_type=prediction_type).eval()
    clean, noise = torch.randn(2, 1, 4, 8, 8)

    def oracle(noisy_latents, timesteps, prompt_embeds, **_):
        signal, spread = denoiser._levels(timesteps.reshape(1))
        epsilon = (noisy_latents - signal * clean) / spread
        return denoiser.training_target(clean, epsilon, timesteps.reshape(1))

    denoiser.predict_noise = oracle
    result = denoiser.sample(noise, torch.zeros(1, 5, WIDTH), guidance=1.0, steps=40, scheduler=scheduler)
    assert (result - clean).abs().max() < 0.15


def test_rounding_the_module_leaves_the_schedule_alone() -> None:
    denoiser = tiny_denoiser()
    before = denoiser.alphas_cumprod.clone()
    denoiser.to(torch.bfloat16)
    assert torch.equal(denoiser.alphas_cumprod, before)
    latents = denoiser.sample_latents(denoiser.encode_moments(torch.zeros(1, 3, 16, 16)))
    assert latents.dtype == torch.float32
    assert denoiser.predict_noise(latents, torch.tensor([5]), torch.zeros(1, 3, WIDTH)).dtype == torch.bfloat16


def test_timesteps_of_the_samplers(denoiser: Denoiser) -> None:
    pndm, ddim = denoiser.make_scheduler("pndm"), denoiser.make_scheduler("ddim")
    pndm.set_timesteps(50)
    ddim.set_timesteps(50)
    assert pndm.timesteps.tolist()[:5] == [980, 960, 960, 940, 920]
    assert pndm.timesteps.tolist()[-1] == 0
    assert len(pndm.timesteps) == 51
    assert ddim.timesteps.tolist() == list(range(981, 0, -20))
    assert not ddim.config.clip_sample
    with pytest.raises(ValueError, match="scheduler 'euler' is unknown; choose one of pndm, ddim"):
        denoiser.make_scheduler("euler")


def test_guidance_is_a_line_through_two_predictions(denoiser: Denoiser) -> None:
    latents, prompt, negative = (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, TEXT_LENGTH, WIDTH),
        torch.zeros(1, TEXT_LENGTH, WIDTH),
    )
    seen = []
    denoiser.sample(latents, prompt, negative, steps=1, guidance=3.0, on_step=lambda *step: seen.append(step))
    timestep = denoiser.make_scheduler("pndm")
    timestep.set_timesteps(1)
    with torch.no_grad():
        conditional = denoiser.predict_noise(latents, timestep.timesteps[0], prompt)
        unconditional = denoiser.predict_noise(latents, timestep.timesteps[0], negative)
    torch.testing.assert_close(seen[0][1], unconditional + 3 * (conditional - unconditional), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"guidance=2.0 needs the hidden states of a negative prompt"):
        denoiser.sample(latents, prompt, steps=1, guidance=2.0)


def test_draws_depend_on_their_generator_alone() -> None:
    together = draw_normal((4, 3, 5), generators(3, 7))
    assert torch.equal(together[1:], draw_normal((4, 3, 5), generators(7)))
    timesteps = draw_timesteps(1000, generators(*range(2000)))
    assert timesteps.min() < 10
    assert timesteps.max() > 989
    assert torch.equal(timesteps[5:6], draw_timesteps(1000, generators(5)))


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'sample'; expected epsilon or v_prediction"):
        tiny_denoiser(prediction_type="sample")
    denoiser = tiny_denoiser()
    denoiser.vae.register_to_config(shift_factor=0.1)
    with pytest.raises(ValueError, match="shift_factor"):
        Denoiser(denoiser.vae, denoiser.unet, denoiser.make_scheduler())
