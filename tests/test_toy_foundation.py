"""The embedded foundation models: they load as the real ones do, stay small, and are as good as was measured.

Floors lie below the values in `metrics.json`, by a margin for other versions of the libraries, not for luck: the
samples are fixed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

import blipdiff_train
from blipdiff_train.data import toybox

FOLDER = Path(blipdiff_train.__file__).parent / "assets" / "toy_foundation"
LOCAL = {"local_files_only": True}
SUBJECT_TOKENS, TEXT_TOKENS = 16, 32


@pytest.fixture(scope="module")
def heldout() -> list[toybox.ToySample]:
    return [toybox.sample(number, split="heldout") for number in range(64)]


def pixels_01(samples: list[toybox.ToySample]) -> torch.Tensor:
    return torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER / "clip", **LOCAL).eval()


def test_folder_is_small_enough_to_be_committed() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 17e6


def test_everything_loads_in_float32_from_local_files(clip: CLIPModel) -> None:
    models = [
        clip,
        CLIPSegForImageSegmentation.from_pretrained(FOLDER / "clipseg", **LOCAL),
        CLIPTextModel.from_pretrained(FOLDER / "stable_diffusion" / "text_encoder", **LOCAL),
        AutoencoderKL.from_pretrained(FOLDER / "stable_diffusion" / "vae", **LOCAL),
        UNet2DConditionModel.from_pretrained(FOLDER / "stable_diffusion" / "unet", **LOCAL),
    ]
    for model in models:
        assert {p.dtype for p in model.parameters()} == {torch.float32}, type(model).__name__
        assert all(torch.isfinite(p).all() for p in model.parameters()), type(model).__name__


def test_sizes_fit_together(clip: CLIPModel) -> None:
    diffusion = FOLDER / "stable_diffusion"
    text = CLIPTextModel.from_pretrained(diffusion / "text_encoder", **LOCAL).config
    vae = AutoencoderKL.from_pretrained(diffusion / "vae", **LOCAL).config
    unet = UNet2DConditionModel.from_pretrained(diffusion / "unet", **LOCAL).config
    assert text.max_position_embeddings == SUBJECT_TOKENS + TEXT_TOKENS
    assert unet.cross_attention_dim == text.hidden_size
    assert unet.in_channels == unet.out_channels == vae.latent_channels
    assert 2 ** (len(vae.block_out_channels) - 1) == 8
    assert unet.sample_size * 8 == vae.sample_size == clip.config.vision_config.image_size
    assert not 0.999 < vae.scaling_factor < 1.001  # measured, not left at its default


def test_scheduler_is_stable_diffusions() -> None:
    config = PNDMScheduler.from_pretrained(FOLDER / "stable_diffusion" / "scheduler", **LOCAL).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.num_train_timesteps, config.skip_prk_steps) == (1000, True)
    assert config.prediction_type == "epsilon"


def test_clip_tokenizer_spells_any_string_and_knows_the_world(clip: CLIPModel) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "stable_diffusion" / "tokenizer", **LOCAL)
    text = clip.config.text_config
    assert len(tokenizer) == text.vocab_size
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    for strange in ("Zürich, 1984!", "犬 🙂", "q" * 9):
        ids = tokenizer(strange, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id not in ids  # which is CLIP's unknown token too
        assert tokenizer.decode(ids).replace(" ", "") == strange.lower().replace(" ", "")
    drawn = toybox.sample(0)
    assert len(tokenizer(drawn.prompt).input_ids) == 2 + len(drawn.prompt.split())


def test_bert_tokenizer_reads_captions_without_unknowns() -> None:
    tokenizer = BertTokenizer.from_pretrained(FOLDER / "bert_tokenizer", **LOCAL)
    for number in range(50):
        assert tokenizer.unk_token_id not in tokenizer(toybox.sample(number).caption).input_ids
    assert tokenizer.unk_token_id not in tokenizer("A quick ZEBRA (9 years) jumps; café?").input_ids
    assert tokenizer("dog").input_ids[0] == tokenizer.cls_token_id
    assert tokenizer.pad_token_id == 0


def test_text_pooling_reads_the_first_end_token(clip: CLIPModel) -> None:
    """A wrong eos id makes transformers pool another position; padding must not change the embedding."""
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "clip", **LOCAL)
    short = tokenizer("a dog at night", return_tensors="pt").input_ids
    padded = tokenizer("a dog at night", padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.inference_mode():
        pooled = [clip.text_model(input_ids=ids).pooler_output for ids in (short, padded)]
    torch.testing.assert_close(pooled[0], pooled[1], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_clip_recognises_heldout_scenes_and_categories(clip: CLIPModel, heldout: list[toybox.ToySample]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "clip", **LOCAL)
    processor = CLIPImageProcessor.from_pretrained(FOLDER / "clip", **LOCAL)
    pairs = [(category, scene) for category in toybox.CATEGORIES for scene in toybox.SCENES]
    ids = tokenizer([toybox.scene_prompt(*pair) for pair in pairs], padding=True, return_tensors="pt").input_ids
    texts = F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
    pixels = processor([s.image for s in heldout], return_tensors="pt").pixel_values
    images = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    found = [pairs[i] for i in (images @ texts.T).argmax(1)]
    scenes = np.mean([scene == s.scene for (_, scene), s in zip(found, heldout, strict=True)])
    categories = np.mean([category == s.subject for (category, _), s in zip(found, heldout, strict=True)])
    assert scenes >= 0.95
    assert categories >= 0.7


@torch.inference_mode()
def test_clipseg_finds_heldout_subjects(heldout: list[toybox.ToySample]) -> None:
    model = CLIPSegForImageSegmentation.from_pretrained(FOLDER / "clipseg", **LOCAL).eval()
    processor = CLIPSegProcessor.from_pretrained(FOLDER / "clipseg", **LOCAL)
    inputs = processor(
        text=[s.subject for s in heldout], images=[s.image for s in heldout], padding=True, return_tensors="pt"
    )
    found = model(**inputs).logits.numpy() > 0
    truth = np.stack([s.alpha for s in heldout]) > 127
    assert found.shape == truth.shape
    iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clip(min=1)
    assert iou.mean() >= 0.7


@torch.inference_mode()
def test_vae_keeps_the_subjects_colours(heldout: list[toybox.ToySample]) -> None:
    vae = AutoencoderKL.from_pretrained(FOLDER / "stable_diffusion" / "vae", **LOCAL).eval()
    samples = heldout[:24]
    image = pixels_01(samples)
    latents = vae.encode(2 * image - 1).latent_dist.mean
    assert 0.7 < (latents * vae.config.scaling_factor).std() < 1.4
    decoded = vae.decode(latents).sample.clamp(-1, 1) / 2 + 0.5
    lab = [toybox.srgb_to_lab(255 * x.permute(0, 2, 3, 1).numpy()) for x in (image, decoded)]
    inside = np.stack([s.alpha for s in samples]) == 255
    assert np.linalg.norm(lab[0] - lab[1], axis=-1)[inside].mean() <= 18.5


def test_pipeline_draws_a_picture() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "stable_diffusion", **LOCAL)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(prompt, num_inference_steps=8, guidance_scale=5.0, generator=torch.Generator().manual_seed(1),
                 height=64, width=64, output_type="np").images[0]
        for prompt in ("a dog at night", "a dog in the snow")
    ]  # fmt: skip
    assert pictures[0].shape == (64, 64, 3)
    # Enough to see that the prompt reaches the picture: a night is darker than snow.
    assert pictures[0].mean() < pictures[1].mean() - 0.15


def test_metrics_file_names_what_was_measured() -> None:
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    assert {"clip_zero_shot_heldout_512", "clipseg_mean_iou_heldout_512", "vae_heldout_256"} <= set(metrics)
