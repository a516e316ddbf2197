"""Zero-shot generation: pictures of a subject and a prompt in, pictures of that subject in that scene out.

Sources: LAVIS ``blip_diffusion.py`` ``generate``; diffusers 0.32.2 ``pipeline_blip_diffusion.py``
``__call__``; paper section 3.2. With the same initial latents the numbers are the reference's
(``tests/parity``).

Deliberate differences:

* Initial noise is drawn on the CPU from (seed, number of the picture), so that a picture depends neither on
  the device nor on what else is generated with it. The references draw one block for the whole batch; hand
  that block over as ``latents`` to get their pictures.
* Batches of prompts, and several pictures of one subject, whose embeddings are averaged after the projection
  (LAVIS does so for fine-tuning, its ``generate`` handles one prompt).
* Pictures are resized with the shorter side and cropped in the middle, as LAVIS does and as in training;
  diffusers stretches them. ``fit="stretch"`` is diffusers' way.
* Negative prompts are cut to the text encoder's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blipdiff_train.common.rng import torch_generator
from blipdiff_train.common.shapes import check_shape
from blipdiff_train.data.prompts import get_template, repetitions
from blipdiff_train.models.denoiser import draw_normal
from blipdiff_train.models.modes import evaluating
from blipdiff_train.models.parts import ModelParts

UNetArguments = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]

FITS = ("crop", "stretch")


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told: hidden states (N L D) of the prompts, and of the negative prompts or None."""

    prompt_embeds: Tensor
    negative_embeds: Tensor | None


class SubjectPipeline:
    """Generation with a complete model.

    Args:
        parts: with projection, text encoder and denoiser. Its modules are used where they are and as they
            are; they are in eval mode while a picture is made.

    Raises:
        ValueError: a part is missing.
    """

    def __init__(self, parts: ModelParts) -> None:
        parts.require("projection", "text_encoder", "denoiser", purpose="generation")
        self.parts = parts
        self.subject_encoder = parts.subject_encoder()
        self.text_encoder = parts.text_encoder
        self.denoiser = parts.denoiser

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def to(self, device: torch.device | str) -> SubjectPipeline:
        """Move all modules; returns the pipeline."""
        for module in (self.subject_encoder, self.text_encoder, self.denoiser):
            module.to(device)
        return self

    def preprocess(self, image: Image.Image | Tensor, *, fit: str = "crop") -> Tensor:
        """A picture as the image tower reads it: (3 S S) fp32, CLIP-normalised.

        Args:
            image: a PIL image, or a tensor that is preprocessed already and only checked.
            fit: ``crop``: shorter side to S, middle cut out; ``stretch``: both sides to S.

        Raises:
            ValueError: a tensor of another shape, or an unknown ``fit``.
        """
        size = self.parts.image_size
        if isinstance(image, Tensor):
            check_shape(image, "3 S S", name="subject image", S=size)
            return image.float()
        if fit not in FITS:
            raise ValueError(f"fit={fit!r} is unknown; choose one of {', '.join(FITS)}")
        image = image.convert("RGB")
        if fit == "stretch":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            scale = size / min(image.size)
            width, height = (max(size, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # 3 S S
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.parts.image_mean, self.parts.image_std))
        return (pixels - mean) / std

    @torch.no_grad()
    def embed_subject(
        self,
        images: Image.Image | Tensor | Sequence[Image.Image | Tensor],
        subject_text: str,
        *,
        weights: Sequence[float] | None = None,
        fit: str = "crop",
    ) -> Tensor:
        """``subject_embeds`` (Q D) of one subject: the (weighted) mean over its pictures, after the
        projection.

        Args:
            images: one picture or several of the same subject.
            subject_text: its category ("dog").
            weights: one a picture, not all zero; they are normalised.

        Raises:
            ValueError: no picture, or weights that do not fit.
        """
        if isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
            images = [images]
        pictures = [self.preprocess(image, fit=fit) for image in images]
        if not pictures:
            raise ValueError(f"no picture of the subject {subject_text!r}; give at least one, or drop_subject=True")
        shares = torch.ones(len(pictures)) if weights is None else torch.tensor(list(weights)).float()
        if len(shares) != len(pictures) or shares.sum() <= 0:
            raise ValueError(f"{len(shares)} weights for {len(pictures)} pictures; give one each, with a positive sum")
        with evaluating(self.subject_encoder):
            embeds = self.subject_encoder(torch.stack(pictures).to(self.device), [subject_text] * len(pictures))
        return ((shares / shares.sum()).to(embeds).view(-1, 1, 1) * embeds).sum(0)

    @torch.no_grad()
    def encode_prompts(
        self,
        texts: Sequence[str],
        subject_embeds: Tensor | None,
        subject_position: int,
        *,
        negative_prompts: Sequence[str] | None,
    ) -> Conditions:
        """Hidden states of sentences with a subject in each (or in none), and of negative prompts, without
        any."""
        with evaluating(self.text_encoder):
            return Conditions(
                self.text_encoder(texts, subject_embeds, subject_position=subject_position),
                None if negative_prompts is None else self.text_encoder(negative_prompts),
            )

    def initial_latents(self, seeds: Sequence[int], num_images: int, height: int, width: int) -> Tensor:
        """Standard normal noise (len(seeds)·num_images C h w) on the CPU; picture j of seed s is a function
        of (s, j)."""
        shape = self.denoiser.latent_shape(height, width)
        return draw_normal(
            shape, [torch_generator(seed, "latents", number) for seed in seeds for number in range(num_images)]
        )

    @property
    def guidance(self) -> float:
        """What the model was trained to be sampled with, by its metadata, else the references' 7.5."""
        return self.parts.metadata.get("guidance", 7.5)

    @torch.no_grad()
    def generate(
        self,
        subject_images: Any,
        subject_text: str | Sequence[str],
        prompt: str | Sequence[str],
        *,
        target_subject: str | Sequence[str] | None = None,
        num_images: int = 1,
        steps: int = 50,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
        template: str | None = None,
        prompt_strength: float = 1.0,
        prompt_reps: int | None = None,
        negative_prompt: str = "",
        drop_subject: bool = False,
        subject_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        scheduler: str = "pndm",
        height: int | None = None,
        width: int | None = None,
        fit: str = "crop",
        batch_size: int = 8,
        unet_arguments: Callable[[slice], UNetArguments] | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
        output: str = "pil",
    ) -> list[Image.Image] | Tensor:
        """Pictures, ``num_images`` for each prompt, those of the first prompt first.

        Args:
            subject_images: for one subject (``subject_text`` a string): a picture or several, PIL or (3 S S)
                CLIP-normalised tensors. For several subjects: one entry each, itself a picture or several. None: the
                subject that the model was fine-tuned to.
            subject_text: category of the pictured subject, read by the Q-Former.
            prompt: the rest of the sentence ("on the beach"). One subject may have many prompts, and many
                subjects one prompt; otherwise there are as many of one as of the other.
            target_subject: category written into the prompt, where it differs from ``subject_text``.
            steps, scheduler: see :meth:`~blipdiff_train.models.denoiser.Denoiser.sample`.
            guidance: classifier-free guidance, ≥ 1; None: :attr:`guidance`.
            seed: of all prompts, or one a prompt; picture j of a prompt is a function of (seed, j).
            template: ``release`` or ``paper``; None: what the model's metadata say, else ``release``.
            prompt_strength: times ``prompt_reps`` gives how often the sentence is repeated.
            prompt_reps: None: what the model's metadata say, else the references' 20.
            negative_prompt: without subject embeddings; used if ``guidance`` > 1.
            drop_subject: the text alone guides; ``subject_images`` may be None.
            subject_embeds: (Q D) or (subjects Q D) instead of ``subject_images``, e.g. fine-tuned ones.
            latents: (N C h w) standard normal instead of the seed's.
            height, width: in pixels; the UNet's own size if None.
            fit: see :meth:`preprocess`.
            batch_size: pictures sampled together; changes memory and speed only.
            unet_arguments: from the rows of a batch to the further arguments of its UNet calls (ControlNet).
            on_step: called after each step of each batch.
            output: ``pil``, ``tensor`` (N 3 H W) in [0, 1] or ``latent`` (N C h w), on the pipeline's device.

        Raises:
            ValueError: arguments that do not belong together.
        """
        if output not in ("pil", "tensor", "latent"):
            raise ValueError(f"output={output!r} is unknown; choose pil, tensor or latent")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images={num_images} and batch_size={batch_size} must be at least 1")
        metadata = self.parts.metadata
        guidance = self.guidance if guidance is None else guidance
        rules = get_template(metadata.get("template", "release") if template is None else template)
        reps = repetitions(prompt_strength, metadata.get("prompt_reps", 20) if prompt_reps is None else prompt_reps)

        one_subject = isinstance(subject_text, str)
        subjects = [subject_text] if one_subject else list(subject_text)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        num_prompts = max(len(subjects), len(prompts))
        if not subjects or not prompts:
            raise ValueError("give at least one subject_text and one prompt")
        prompts = _spread(prompts, num_prompts, "prompts")
        targets = subjects if target_subject is None else target_subject
        targets = _spread([targets] if isinstance(targets, str) else list(targets), num_prompts, "target subjects")
        seeds = _spread([seed] if isinstance(seed, Integral) else list(seed), num_prompts, "seeds")

        if drop_subject:
            texts = [
                rules.text_without_subject(target, bare, repetitions=reps)
                for target, bare in zip(targets, prompts, strict=True)
            ]
            embeds = None
        else:
            texts = [rules.text(target, bare, repetitions=reps) for target, bare in zip(targets, prompts, strict=True)]
            if subject_embeds is None and subject_images is None:
                subject_embeds = self.parts.subject_embeds
                if subject_embeds is None:
                    raise ValueError("give subject_images: this model was not fine-tuned to one subject")
            if subject_embeds is None:
                entries = [subject_images] if one_subject else list(subject_images)
                if len(entries) != len(subjects):
                    raise ValueError(
                        f"{len(entries)} entries in subject_images for {len(subjects)} subjects; give one a subject"
                    )
                embeds = torch.stack(
                    [self.embed_subject(entry, text, fit=fit) for entry, text in zip(entries, subjects, strict=True)]
                )
            else:
                embeds = subject_embeds.to(self.device)
                embeds = embeds.unsqueeze(0) if embeds.ndim == 2 else embeds  # subjects Q D
                check_shape(embeds, "N Q D", name="subject_embeds", N=len(subjects))
            if len(subjects) != num_prompts:
                embeds = embeds.expand(num_prompts, -1, -1)
        # a release folder may say where its embeddings stand (`ctx_begin_pos`)
        position = rules.subject_position
        if rules.name == "release":
            position = metadata.get("subject_position", position)
        conditions = self.encode_prompts(
            texts,
            embeds,
            position,
            negative_prompts=[negative_prompt] * num_prompts if guidance > 1.0 else None,
        )

        size = self.denoiser.default_size
        if latents is None:
            latents = self.initial_latents(seeds, num_images, height or size, width or size)
        num_rows = num_prompts * num_images
        check_shape(latents, "N C h w", name="latents", N=num_rows, C=self.denoiser.latent_channels)

        pictures = []
        for start in range(0, num_rows, batch_size):
            rows = slice(start, min(start + batch_size, num_rows))
            owners = torch.arange(rows.start, rows.stop, device=self.device) // num_images  # the prompt of each row
            with evaluating(self.denoiser):
                result = self.denoiser.sample(
                    latents[rows].to(self.device),
                    conditions.prompt_embeds[owners],
                    None if conditions.negative_embeds is None else conditions.negative_embeds[owners],
                    steps=steps,
                    guidance=guidance,
                    scheduler=scheduler,
                    unet_arguments=None if unet_arguments is None else unet_arguments(rows),
                    on_step=on_step,
                )
                pictures.append(result if output == "latent" else self.denoiser.decode(result))
        stacked = torch.cat(pictures)
        return to_pil(stacked) if output == "pil" else stacked


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images from (N 3 H W) in [0, 1], rounded to 8 bits."""
    arrays = (images.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()  # N H W 3
    return [Image.fromarray(array) for array in arrays]


def _spread(values: list, count: int, name: str) -> list:
    if len(values) not in (1, count):
        raise ValueError(f"{len(values)} {name} where {count} (or one for all) are expected")
    return values * count if len(values) == 1 else values
