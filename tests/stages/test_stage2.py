"""The stage-2 step: what trains, what is random and from what, what validation measures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pytorch_lightning import Trainer
from tiny_models import TARGET_SIZE, tiny_batch, tiny_parts
from torch.utils.data import DataLoader

from blipdiff_train.data.samples import Stage2Batch
from blipdiff_train.inference.pipeline import SubjectPipeline
from blipdiff_train.models.denoiser import draw_timesteps
from blipdiff_train.stages.callbacks import Averaging
from blipdiff_train.stages.stage2 import Stage2Module


def build(*, dropout: float = 0.0, schedule: dict | None = None, **changes) -> Stage2Module:
    settings = {"template": "release", "total_steps": 10, "lr": 1e-3, "seed": 0, **changes}
    return Stage2Module(tiny_parts(dropout=dropout, **(schedule or {})), **settings)


def rows(batch: Stage2Batch, index: list[int]) -> Stage2Batch:
    """Some samples of a batch."""
    values = {
        name: value[index] if isinstance(value, torch.Tensor) else [value[row] for row in index]
        for name, value in vars(batch).items()
        if isinstance(value, (torch.Tensor, list))
    }
    return replace(batch, **values)


def loaders(*batches: Stage2Batch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


def trainer(**changes) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**{**settings, **changes})


# ---- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["release", "paper"])
@pytest.mark.parametrize("dropped", [False, True])
def test_gradient_set_is_exactly_the_named_one(template: str, dropped: bool) -> None:
    module = build(template=template)
    batch = tiny_batch(2, subject_dropped=torch.tensor([dropped, dropped]))
    module.noise_loss(batch).backward()
    with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(module.trainable_report.trainable)
    parts = {name.split(".")[0] for name in with_gradient}
    assert parts == {"qformer", "projection", "text_encoder", "unet"}
    reaches = any(float(p.grad.abs().max()) > 0 for n, p in module.named_parameters() if n.startswith("projection."))
    assert reaches != dropped  # a batch without any subject trains no subject encoder, with zeros, so DDP is content


def test_other_trainable_sets() -> None:
    module = build(trainable=["projection.*", "unet.*attn2.to_k.weight"])
    module.noise_loss(tiny_batch()).backward()
    with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(module.trainable_report.trainable)
    assert {name.split(".")[0] for name in with_gradient} == {"projection", "unet"}
    assert not module.qformer.training  # nothing in it trains


def test_frozen_parts_stay_in_eval() -> None:
    module = build(dropout=0.5)
    for mode in (True, False, True):
        module.train(mode)
        assert not module.vae.training
        assert not module.image_encoder.training
        assert not any(submodule.training for submodule in module.vae.modules())
        assert module.unet.training == module.qformer.training == module.projection.dropout.training == mode


@pytest.mark.parametrize("pattern", ["*", "vae.*", "image_encoder.*"])
def test_parts_without_gradient_cannot_be_trained(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"cannot train: it runs without gradient; .* image_encoder.\*, vae.\*"):
        build(trainable=[pattern])


def test_missing_parts_are_named() -> None:
    parts = tiny_parts()
    parts.denoiser = None
    with pytest.raises(ValueError, match="stage 2 needs denoiser"):
        Stage2Module(parts, template="release", total_steps=1, lr=1e-3, seed=0)


# ---- randomness ----------------------------------------------------------------------------------------------------


def test_loss_of_a_sample_depends_on_its_position_only() -> None:
    module = build().eval().requires_grad_(False)
    batch = tiny_batch(3, subject_dropped=torch.tensor([False, True, False]))
    alone = [float(module.noise_loss(rows(batch, [row]))) for row in range(3)]
    assert float(module.noise_loss(batch)) == pytest.approx(sum(alone) / 3, rel=1e-4)
    assert float(module.noise_loss(rows(batch, [2, 0, 1]))) == pytest.approx(sum(alone) / 3, rel=1e-4)
    moved = replace(batch, positions=batch.positions + 1)
    assert abs(float(module.noise_loss(moved)) - sum(alone) / 3) > 1e-4
    reseeded = build(seed=1).eval().requires_grad_(False)
    assert abs(float(reseeded.noise_loss(batch)) - sum(alone) / 3) > 1e-4


def test_a_step_does_not_depend_on_what_went_before() -> None:
    module = build(dropout=0.3)
    module.log_dict = lambda *args, **kwargs: None
    first = module.training_step(tiny_batch(), 0)
    torch.rand(100)
    assert torch.equal(module.training_step(tiny_batch(), 7), first)
    assert not torch.equal(module.training_step(tiny_batch(first_position=3), 1), first)


def test_dropped_samples_do_not_depend_on_their_picture() -> None:
    module = build().eval()
    batch = tiny_batch(3, subject_dropped=torch.tensor([True, True, True]))
    other = replace(batch, subject_image=torch.randn_like(batch.subject_image))
    assert torch.equal(module.noise_loss(batch), module.noise_loss(other))
    batch, other = (replace(b, subject_dropped=torch.tensor([True, False, True])) for b in (batch, other))
    assert not torch.equal(module.noise_loss(batch), module.noise_loss(other))


def test_cached_moments_give_the_same_loss() -> None:
    module = build().eval()
    batch = tiny_batch()
    cached = replace(batch, latent_moments=module.denoiser.encode_moments(batch.target_image), target_image=None)
    assert torch.equal(module.noise_loss(batch), module.noise_loss(cached))


@pytest.mark.parametrize("schedule", [{}, {"prediction_type": "v_prediction"}])
def test_a_perfect_prediction_costs_nothing(schedule: dict) -> None:
    module = build(schedule=schedule).eval()
    batch = tiny_batch(2)
    seen = {}
    add_noise = module.denoiser.add_noise

    def spy(latents, noise, timesteps):
        seen["target"] = module.denoiser.training_target(latents, noise, timesteps)
        return add_noise(latents, noise, timesteps)

    module.denoiser.add_noise = spy
    module.denoiser.predict_noise = lambda *args: seen["target"]
    assert module.noise_loss(batch) == 0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_size_and_picture_size(size: int) -> None:
    module = build()
    batch = tiny_batch(size, target_image=torch.rand(size, 3, 20, 36) * 2 - 1)  # latents 5 × 9
    assert module.noise_loss(batch).isfinite()


def test_a_caption_as_prompt_is_a_sentence() -> None:
    prompts = ["A dog, in the snow.", "in the snow", "in the snow"]
    captions = ["A dog, in the snow.", "a cat in the snow", "in the snow"]  # the last one does not name its subject
    batch = tiny_batch(3, prompt=prompts, caption=captions)
    kept = torch.tensor([False, False, False])
    assert build().sentences(batch, kept) == ["a dog, in the snow", "a cat in the snow", "a teapot in the snow"]
    found = build(template="paper").sentences(batch, torch.tensor([False, True, False]))
    assert found == ["a dog, in the snow, the dog is", "a cat in the snow", "a teapot in the snow, the teapot is"]


def test_gradient_checkpointing_changes_no_number() -> None:
    plain, checkpointed = build(dropout=0.3), build(dropout=0.3, gradient_checkpointing=True)
    for module in (plain, checkpointed):
        module.log_dict = lambda *args, **kwargs: None
        module.training_step(tiny_batch(), 0).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in checkpointed.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_truncated_snr_weighs_the_samples_by_their_timesteps() -> None:
    plain, module, batch = build().eval(), build(loss_weighting="truncated_snr").eval(), tiny_batch()
    generators = module.generators("timestep", batch.positions.tolist())
    timesteps = draw_timesteps(module.denoiser.num_train_timesteps, generators)
    alphas = module.denoiser.alphas_cumprod[timesteps]
    weights = ((1 - alphas) / alphas).clamp(min=1)
    assert weights.max() > 1
    losses, ones = plain.noise_losses(batch)
    assert torch.equal(ones, torch.ones(len(batch)))
    torch.testing.assert_close(module.noise_loss(batch), (weights * losses).mean())
    assert torch.equal(module.noise_losses(batch)[0], losses)  # what is logged as the noise loss has no weights


def test_mixed_precision_keeps_the_loss_in_fp32() -> None:
    module = build().eval().requires_grad_(False)
    batch = tiny_batch()
    exact = module.noise_loss(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module.noise_loss(batch)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.05)


# ---- under Lightning -----------------------------------------------------------------------------------------------


def test_training_learns_and_logs_what_it_optimises() -> None:
    module = build(lr=3e-3, total_steps=25)
    fit = trainer(max_epochs=25)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit.fit(module, loaders(tiny_batch()))
    assert fit.logged_metrics["train/loss"] == fit.logged_metrics["train/loss_noise"]
    assert fit.global_step == 25
    start = build().eval().noise_loss(tiny_batch()).detach()
    assert module.eval().noise_loss(tiny_batch()).detach() < 0.7 * start
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[0] for name in changed} == {"qformer", "projection", "text_encoder", "unet"}


def test_validation_says_whether_the_subject_is_used() -> None:
    module = build()
    result = trainer().validate(module, loaders(tiny_batch(3), tiny_batch(2, first_position=3)), verbose=False)[0]
    ladder = {f"val/loss_noise_t{timestep:04d}" for timestep in (100, 350, 600, 850)}
    assert set(result) == {"val/loss_noise", "val/loss_noise_dropped", "val/loss_noise_swapped", *ladder}
    assert result["val/loss_noise"] == pytest.approx(sum(result[name] for name in ladder) / 4, rel=1e-5)
    again = trainer().validate(module, loaders(tiny_batch(3), tiny_batch(2, first_position=3)), verbose=False)[0]
    assert again == result


def test_validation_is_a_mean_over_samples_however_batched() -> None:
    module = build()
    three, two = tiny_batch(3), tiny_batch(2, first_position=3)
    result = trainer().validate(module, loaders(three, two), verbose=False)[0]
    module.eval()
    losses = [module.validation_losses(batch)["loss_noise"] for batch in (three, two)]
    assert result["val/loss_noise"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    twice = trainer().validate(module, loaders(three, two, three), verbose=False)[0]  # filled up to a full round
    assert twice == pytest.approx(result, rel=1e-6)
    ones = [tiny_batch(1, first_position=position) for position in range(5)]
    alone = trainer().validate(module, loaders(*ones), verbose=False)[0]
    assert "val/loss_noise_swapped" not in alone
    for name, value in alone.items():
        assert value == pytest.approx(result[name], rel=1e-4)


def test_swapping_equal_subjects_changes_nothing() -> None:
    module = build().eval()
    batch = tiny_batch(2)
    twins = rows(batch, [0, 0])
    losses = module.validation_losses(twins)
    torch.testing.assert_close(losses["loss_noise_swapped"], losses["loss_noise"])
    assert (losses["loss_noise_dropped"] - losses["loss_noise"]).abs().max() > 1e-6


def test_average_is_validated_and_put_back() -> None:
    module = build(ema_decay=0.9, lr=1e-2)
    fit = trainer(max_epochs=3, callbacks=[Averaging()])
    fit.fit(module, loaders(tiny_batch()))
    assert module.ema.num_updates == 3
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    with module.ema.swapped():
        module.eval()
        expected = float(module.validation_losses(tiny_batch())["loss_noise"].mean())
    result = trainer(callbacks=[Averaging()]).validate(module, loaders(tiny_batch()), verbose=False)[0]
    assert result["val/loss_noise"] == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in module.named_parameters())


def test_accumulation_counts_optimizer_steps() -> None:
    module = build(ema_decay=0.9, total_steps=2, schedule=None)
    fit = trainer(accumulate_grad_batches=2, max_epochs=1, callbacks=[Averaging()])
    fit.fit(module, loaders(*[tiny_batch(1, first_position=position) for position in range(4)]))
    assert fit.global_step == 2
    assert module.ema.num_updates == 2


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_sample_grid() -> None:
    module = build(ema_decay=0.9, sampling_steps=2)
    batch = tiny_batch(3, subject_dropped=torch.tensor([True, False, False]))
    grid = module.sample_grid(batch, num=2)
    assert grid.size[0] > 3 * 96
    assert list(grid.getdata()) == list(module.sample_grid(batch, num=2).getdata())
    assert list(grid.getdata()) != list(module.sample_grid(batch, num=2, seed=1).getdata())
    assert module.unet.training  # the mode is put back
    assert not module.vae.training
    cached = replace(batch, latent_moments=module.denoiser.encode_moments(batch.target_image), target_image=None)
    assert module.sample_grid(cached, num=8).size[1] > grid.size[1]
    assert TARGET_SIZE == 32


def test_what_it_is_sampled_with_travels_with_the_model() -> None:
    module = build(sampling_steps=2, guidance=1.0)
    plain, batch = module.sample_grid(tiny_batch(2)), tiny_batch(2)
    module.guidance = 6.0
    assert list(module.sample_grid(batch).getdata()) != list(plain.getdata())
    assert SubjectPipeline(module.parts).guidance == 1.0
    module.parts.metadata.pop("guidance")
    assert SubjectPipeline(module.parts).guidance == 7.5  # LAVIS
