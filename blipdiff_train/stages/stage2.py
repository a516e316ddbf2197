"""Stage 2: learn to draw a subject that is shown by a picture, in the scene that a sentence asks for.

Sources: paper sections 3.2 and 4.1; LAVIS ``blip_diffusion.py`` ``forward``. The subject's picture (on a random
background) becomes ``subject_embeds``, these go into the prompt, the prompt conditions the UNet, and the UNet learns to
predict the noise in the latents of the target picture.

Deliberate differences from LAVIS:

* Q-Former and projection train with the text encoder and the UNet, as in the paper; in LAVIS both flags are off, and
  the Q-Former would get no gradient if they were on.
* Captions of any length in one batch: prompts are padded as at inference (LAVIS pads nothing, and needs equal lengths).
* A share of the samples has its subject dropped (paper: 15 %); the data decides which, the released code never does.
* Noise, timestep and posterior sample of a sample are functions of (seed, its position in the global order), dropout
  of (seed, the step's first position, rank): a resumed run continues with the same numbers.
* The timesteps may be weighted (``loss_weighting``); ``constant`` is LAVIS.
* The loss is logged without its weights beside what is minimised, and validated with fixed noise, with the own
  subject, none, and another's: the differences say whether the subject is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from pytorch_lightning import LightningModule
from torch import Tensor

from blipdiff_train.common import distributed
from blipdiff_train.common.rng import derive_seed, torch_generator
from blipdiff_train.data.prompts import clean_caption, get_template, names_subject
from blipdiff_train.losses.diffusion import noise_prediction_loss_per_sample, truncated_snr_weights
from blipdiff_train.models.denoiser import draw_normal, draw_timesteps
from blipdiff_train.models.ema import ParameterAverage
from blipdiff_train.models.freezing import keep_frozen_in_eval, set_trainable
from blipdiff_train.models.modes import evaluating
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.stages.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    from blipdiff_train.data.samples import Stage2Batch

PAPER_TRAINABLE = ("qformer.*", "projection.*", "text_encoder.*", "unet.*")
"""Paper, section 4.1: everything but the image tower and the VAE."""

VALIDATION_FRACTIONS = (0.1, 0.35, 0.6, 0.85)
"""Where on the noise schedule validation looks, as fractions of T: from almost clean to almost noise."""


class Stage2Module(LightningModule):
    """The training step of stage 2 over built parts.

    Args:
        parts: with projection, text encoder and denoiser; its modules train in place.
        template: ``release`` or ``paper``.
        total_steps: optimizer steps of the whole run.
        lr, weight_decay, betas, eps, schedule, warmup_steps, warmup_lr, min_lr: see ``stages.optim``.
        seed: of all randomness in the step; 0 is a seed.
        sampling_steps, guidance: of the pictures of :meth:`sample_grid`.
        loss_weighting: of the timesteps: ``constant`` (paper), or ``truncated_snr``, see ``losses.diffusion``.
        trainable: name patterns under ``qformer.``, ``projection.``, ``text_encoder.`` and ``unet.``, see
            ``models.freezing``. What no subject embedding depends on is left out by itself.
        ema_decay: of the averaged weights, see ``stages.callbacks.Averaging``; None keeps none.
        gradient_checkpointing: recompute activations of Q-Former, text encoder and UNet in the backward pass.

    ``parts.metadata`` is told the template, the guidance and that sentences are not repeated, so that generation does
    as training.

    Attributes:
        trainable_report: what trains and what does not.
        ema: the averaged weights, or None.

    Raises:
        ValueError: a part is missing, an unknown template, or patterns that match nothing or a part without gradient.
    """

    def __init__(
        self,
        parts: ModelParts,
        *,
        template: str,
        total_steps: int,
        lr: float,
        seed: int,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        schedule: str = "constant",
        warmup_steps: int = 0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        loss_weighting: str = "constant",
        sampling_steps: int = 50,
        guidance: float = 7.5,
        trainable: Sequence[str] = PAPER_TRAINABLE,
        ema_decay: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        parts.require("projection", "text_encoder", "denoiser", purpose="stage 2")
        self.parts = parts
        self.template = get_template(template)
        # what generation has to repeat of the training: it travels with the model folder
        parts.metadata.update(template=template, prompt_reps=1, guidance=guidance)
        parts.metadata.pop("subject_position", None)  # of the folder the parts came from; the template says it now
        self.seed = seed
        self.loss_weighting = loss_weighting
        self.sampling_steps, self.guidance = sampling_steps, guidance
        self.optimizer_settings = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        self.schedule_settings = {
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "warmup_lr": warmup_lr,
            "min_lr": min_lr,
        }
        # registered one by one, under the names that configurations, checkpoints and gradient norms use
        self.image_encoder = parts.image_encoder
        self.qformer = parts.qformer
        self.projection = parts.projection
        self.text_encoder = parts.text_encoder
        self.vae = parts.denoiser.vae
        self.unet = parts.denoiser.unet
        # the same modules in use; not registered, or each parameter would have two names
        object.__setattr__(self, "subject_encoder", parts.subject_encoder())
        object.__setattr__(self, "denoiser", parts.denoiser)

        idle = [f"!{name}" for name in sorted(self.subject_encoder.idle_parameters())]
        self.trainable_report = set_trainable(
            self, [*trainable, *idle], without_gradient=("image_encoder.", "vae.")
        )
        if gradient_checkpointing:
            self.qformer.set_gradient_checkpointing(True)
            self.text_encoder.set_gradient_checkpointing(True)
            self.unet.enable_gradient_checkpointing()
        self.ema = ParameterAverage(self.named_parameters(), ema_decay) if ema_decay is not None else None
        self._validation: list[tuple[Tensor, Tensor]] = []
        self._validation_names: tuple[str, ...] = ()
        self.train()

    def train(self, mode: bool = True) -> Stage2Module:
        """Training mode for what trains; parts without a trainable parameter stay in eval mode."""
        super().train(mode)
        keep_frozen_in_eval(self)
        return self

    # ---- the step --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Stage2Batch, batch_idx: int) -> Tensor:
        # dropout is the one thing drawn from the global generator: seeded here, it survives an interruption
        torch.manual_seed(derive_seed(self.seed, "dropout", int(batch.positions[0]), distributed.rank()))
        losses, weights = self.noise_losses(batch)
        total = (weights * losses).mean()
        values = {"train/loss_noise": losses.mean().detach(), "train/loss": total.detach()}
        self.log_dict(values, batch_size=len(batch))
        return total

    def noise_loss(self, batch: Stage2Batch) -> Tensor:
        """What a step on the batch minimises, scalar fp32."""
        losses, weights = self.noise_losses(batch)
        return (weights * losses).mean()

    def noise_losses(self, batch: Stage2Batch) -> tuple[Tensor, Tensor]:
        """The noise-prediction losses and their weights, (B) fp32 each, with the samples' own random numbers."""
        positions = batch.positions.tolist()
        subject_embeds = self.subject_encoder(batch.subject_image, batch.subject_text)  # B Q D
        prompt_embeds = self.encode_prompts(batch, subject_embeds, batch.subject_dropped)  # B L D
        latents = self.latents(batch, self.generators("posterior", positions))  # B C h w
        noise = draw_normal(latents.shape[1:], self.generators("noise", positions)).to(latents)
        timesteps = draw_timesteps(self.denoiser.num_train_timesteps, self.generators("timestep", positions)).to(
            latents.device
        )
        noisy_latents = self.denoiser.add_noise(latents, noise, timesteps)
        prediction = self.denoiser.predict_noise(noisy_latents, timesteps, prompt_embeds)
        losses = noise_prediction_loss_per_sample(
            prediction, self.denoiser.training_target(latents, noise, timesteps)
        )
        if self.loss_weighting == "constant":
            return losses, torch.ones_like(losses)
        snr = self.denoiser.signal_to_noise(timesteps)
        return losses, truncated_snr_weights(snr, self.denoiser.prediction_type)

    def encode_prompts(self, batch: Stage2Batch, subject_embeds: Tensor, subject_dropped: Tensor) -> Tensor:
        """Hidden states (B L D) of the batch's sentences, with the subject spliced in where it is not dropped."""
        texts = self.sentences(batch, subject_dropped)
        return self.text_encoder(texts, subject_embeds, subject_dropped, self.template.subject_position)

    def sentences(self, batch: Stage2Batch, subject_dropped: Tensor) -> list[str]:
        """B sentences by the template, of cleaned text (LAVIS ``blip_caption``).

        A prompt that is the sample's caption and names the subject is a sentence already and stays one, as in LAVIS.
        """
        rows = zip(batch.subject_text, batch.prompt, batch.caption, subject_dropped.tolist(), strict=True)
        return [
            (self.template.text_without_subject if dropped else self.template.text)(
                clean_caption(subject),
                clean_caption(prompt),
                is_sentence=prompt == caption and names_subject(prompt, subject),
            )
            for subject, prompt, caption, dropped in rows
        ]

    def latents(self, batch: Stage2Batch, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Scaled latents (B C h w) of the target, from the cached moments where the batch has them.

        Args:
            generators: one a sample, for the draw from the posterior; None takes its mean.
        """
        moments = batch.latent_moments
        if moments is None:
            moments = self.denoiser.encode_moments(batch.target_image)  # B 2C h w
        if generators is None:
            return self.denoiser.sample_latents(moments)
        _, channels, height, width = moments.shape
        return self.denoiser.sample_latents(moments, draw_normal((channels // 2, height, width), generators))

    def generators(self, purpose: str, positions: Sequence[int], *indices: int) -> list[torch.Generator]:
        """One CPU generator for each sample; its numbers do not depend on batch, rank or history."""
        return [torch_generator(self.seed, purpose, position, *indices) for position in positions]

    # ---- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._validation = []

    def validation_step(self, batch: Stage2Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self.validation_losses(batch)
        self._validation.append((batch.positions.to(self.device), torch.stack([*losses.values()], dim=1)))  # B, B K
        self._validation_names = tuple(losses)

    def on_validation_epoch_end(self) -> None:
        if self._validation:
            # processes have equally many rows; some samples come twice to make them so, and count once
            positions, rows = (
                distributed.gather_no_grad(torch.cat(part)) for part in zip(*self._validation, strict=True)
            )
            row_of = {position: row for row, position in enumerate(positions.tolist())}
            means = rows[list(row_of.values())].double().nanmean(dim=0).tolist()
            named = zip(self._validation_names, means, strict=True)
            self.log_dict({f"val/{name}": mean for name, mean in named if not math.isnan(mean)}, batch_size=1)
            self._validation = []

    @torch.no_grad()
    def validation_losses(self, batch: Stage2Batch) -> dict[str, Tensor]:
        """Noise losses (B) fp32 of the samples, at fixed noise on a fixed ladder of timesteps.

        ``loss_noise`` with each sample's own subject (also by timestep, ``loss_noise_t0100`` …), ``loss_noise_dropped``
        without any, ``loss_noise_swapped`` with that of the sample before it in the batch (NaN in a batch of one). A
        model that uses the subject has the first below the other two. Latents are the posterior's mean.
        """
        positions, num_samples = batch.positions.tolist(), len(batch)
        own = self.subject_encoder(batch.subject_image, batch.subject_text)  # B Q D
        none_dropped = torch.zeros(num_samples, dtype=torch.bool)
        prompts = {
            "loss_noise": self.encode_prompts(batch, own, none_dropped),
            "loss_noise_dropped": self.encode_prompts(batch, own, ~none_dropped),
        }
        if num_samples > 1:
            prompts["loss_noise_swapped"] = self.encode_prompts(batch, own.roll(1, dims=0), none_dropped)

        latents = self.latents(batch, generators=None)
        losses: dict[str, list[Tensor]] = {name: [] for name in prompts}
        for timestep in self.validation_timesteps():
            generators = self.generators("validation_noise", positions, timestep)
            noise = draw_normal(latents.shape[1:], generators).to(latents)
            timesteps = torch.full((num_samples,), timestep, device=latents.device)
            noisy_latents = self.denoiser.add_noise(latents, noise, timesteps)
            target = self.denoiser.training_target(latents, noise, timesteps)
            for name, prompt_embeds in prompts.items():
                prediction = self.denoiser.predict_noise(noisy_latents, timesteps, prompt_embeds)
                losses[name].append(noise_prediction_loss_per_sample(prediction, target))
        result = {name: torch.stack(values).mean(dim=0) for name, values in losses.items()}
        result.setdefault("loss_noise_swapped", torch.full_like(result["loss_noise"], math.nan))
        ladder = zip(self.validation_timesteps(), losses["loss_noise"], strict=True)
        return {**result, **{f"loss_noise_t{timestep:04d}": values for timestep, values in ladder}}

    def validation_timesteps(self) -> list[int]:
        """The fixed ladder of timesteps, from the schedule's length."""
        return [int(fraction * self.denoiser.num_train_timesteps) for fraction in VALIDATION_FRACTIONS]

    # ---- pictures --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_grid(
        self, batch: Stage2Batch, *, num: int = 4, seed: int = 0
    ) -> Image.Image:
        """A picture with a row a sample: what conditions, the target, what is generated for the same sentence.

        Args:
            batch: its first ``num`` samples are drawn; a dropped subject is put back.
            seed: of the initial noise, which differs from row to row.
        """
        num = min(num, len(batch))
        with evaluating(self):
            subject_embeds = self.subject_encoder(batch.subject_image[:num], batch.subject_text[:num])
            texts = self.sentences(batch, torch.zeros(len(batch), dtype=torch.bool))[:num]
            prompt_embeds = self.text_encoder(texts, subject_embeds, subject_position=self.template.subject_position)
            moments = None if batch.latent_moments is None else batch.latent_moments[:num]
            if batch.target_image is None:
                targets = self.denoiser.decode(self.denoiser.sample_latents(moments))
            else:
                targets = batch.target_image[:num].float() / 2 + 0.5  # [−1, 1] → [0, 1]
            shape = self.denoiser.latent_shape(*targets.shape[-2:])
            latents = draw_normal(shape, [torch_generator(seed, "latents", number) for number in range(num)])
            generated = self.denoiser.decode(
                self.denoiser.sample(
                    latents.to(targets.device),
                    prompt_embeds,
                    self.text_encoder([""] * num),
                    steps=self.sampling_steps,
                    guidance=self.guidance,
                )
            )
        mean, std = (
            torch.tensor(values, device=targets.device).view(1, 3, 1, 1)
            for values in (self.parts.image_mean, self.parts.image_std)
        )
        inputs = batch.subject_image[:num].float() * std + mean
        return _draw_grid([inputs, targets, generated], texts)

    # ---- optimization ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.named_parameters(), **self.optimizer_settings)
        schedule = build_schedule(optimizer, **self.schedule_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


GRID_COLUMNS = ("input", "target", "generated")
GRID_MARGIN_PX = 4
GRID_LINE_PX = 14


def _draw_grid(columns: Sequence[Tensor], captions: Sequence[str]) -> Image.Image:
    """Columns of pictures (N 3 H W) in [0, 1], scaled to one tile size, a caption under each row."""
    tile = min(256, max(96, columns[1].shape[-1]))
    step = tile + GRID_MARGIN_PX
    width, height = step * len(columns) + GRID_MARGIN_PX, GRID_LINE_PX + (step + GRID_LINE_PX) * len(captions)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for column, (name, pictures) in enumerate(zip(GRID_COLUMNS, columns, strict=True)):
        left = GRID_MARGIN_PX + column * step
        draw.text((left, 1), name, fill="black")
        arrays = (pictures.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # N H W 3
        for row, array in enumerate(arrays):
            top = GRID_LINE_PX + row * (step + GRID_LINE_PX)
            grid.paste(Image.fromarray(array).resize((tile, tile), Image.Resampling.BICUBIC), (left, top))
    for row, caption in enumerate(captions):
        top = GRID_LINE_PX + row * (step + GRID_LINE_PX) + tile
        draw.text((GRID_MARGIN_PX, top), caption[: width // 6], fill="black")
    return grid
