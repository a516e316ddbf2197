"""Generation: deterministic for a seed, independent of its neighbours, and what each argument does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, NUM_QUERIES, TARGET_SIZE, WIDTH, tiny_parts

from blipdiff_train.inference.pipeline import SubjectPipeline, to_pil
from blipdiff_train.models.parts import ModelParts

FAST = {"steps": 3, "guidance": 3.0, "prompt_reps": 1, "output": "tensor"}


@pytest.fixture(scope="module")
def pipeline() -> SubjectPipeline:
    return SubjectPipeline(tiny_parts())


def photo(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool((first - second).abs().max() < 1e-4)


def test_output_forms(pipeline: SubjectPipeline) -> None:
    images = pipeline.generate(photo(0), "dog", "in the snow", num_images=2, **{**FAST, "output": "pil"})
    assert [image.size for image in images] == [(TARGET_SIZE, TARGET_SIZE)] * 2
    tensor = pipeline.generate(photo(0), "dog", "in the snow", num_images=2, **FAST)
    assert tensor.shape == (2, 3, TARGET_SIZE, TARGET_SIZE)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert [np.array(image).tolist() for image in to_pil(tensor)] == [np.array(image).tolist() for image in images]
    wide = pipeline.generate(photo(0), "dog", "in the snow", height=16, width=24, **FAST)
    assert wide.shape == (1, 3, 16, 24)


def test_a_seed_gives_the_same_pictures(pipeline: SubjectPipeline) -> None:
    first = pipeline.generate(photo(0), "dog", "in the snow", seed=0, **FAST)
    torch.rand(10)
    assert torch.equal(pipeline.generate(photo(0), "dog", "in the snow", seed=0, **FAST), first)
    assert not same(pipeline.generate(photo(0), "dog", "in the snow", seed=1, **FAST), first)


@pytest.mark.parametrize("scheduler", ["pndm", "ddim"])
def test_a_picture_does_not_depend_on_its_neighbours(pipeline: SubjectPipeline, scheduler: str) -> None:
    settings = {**FAST, "scheduler": scheduler}
    subjects, prompts, photos = ["dog", "cat"], ["in the snow", "on a marble table"], [photo(0), photo(1)]
    together = pipeline.generate(photos, subjects, prompts, num_images=2, seed=[5, 9], batch_size=3, **settings)
    assert together.shape[0] == 4
    second = pipeline.generate(photo(1), "cat", "on a marble table", num_images=2, seed=9, **settings)
    assert same(together[2:], second)
    assert same(second[:1], pipeline.generate(photo(1), "cat", "on a marble table", seed=9, **settings))


def test_one_subject_in_many_scenes_and_many_subjects_in_one(pipeline: SubjectPipeline) -> None:
    scenes = ["in the snow", "on a marble table", "swimming underwater"]
    many_scenes = pipeline.generate(photo(0), "dog", scenes, **FAST)
    assert same(many_scenes[1:2], pipeline.generate(photo(0), "dog", scenes[1], **FAST))
    many_subjects = pipeline.generate([photo(0), photo(1)], ["dog", "cat"], "in the snow", **FAST)
    assert same(many_subjects[:1], many_scenes[:1])
    assert same(many_subjects[1:], pipeline.generate(photo(1), "cat", "in the snow", **FAST))


def test_several_photographs_are_averaged_after_the_projection(pipeline: SubjectPipeline) -> None:
    apart = [pipeline.embed_subject(photo(seed), "dog") for seed in (0, 1)]
    assert apart[0].shape == (NUM_QUERIES, WIDTH)
    mean = pipeline.embed_subject([photo(0), photo(1)], "dog")
    torch.testing.assert_close(mean, (apart[0] + apart[1]) / 2, atol=1e-5, rtol=1e-5)
    weighted = pipeline.embed_subject([photo(0), photo(1)], "dog", weights=[3, 1])
    torch.testing.assert_close(weighted, 0.75 * apart[0] + 0.25 * apart[1], atol=1e-5, rtol=1e-5)
    pictures = pipeline.generate([photo(0), photo(1)], "dog", "in the snow", **FAST)
    assert same(pictures, pipeline.generate(None, "dog", "in the snow", subject_embeds=mean, **FAST))
    assert not same(pictures, pipeline.generate(photo(0), "dog", "in the snow", **FAST))


def test_a_fine_tuned_model_knows_its_subject(pipeline: SubjectPipeline, monkeypatch) -> None:
    embeds = pipeline.embed_subject(photo(3), "dog")
    expected = pipeline.generate(photo(3), "dog", "in the snow", **FAST)
    monkeypatch.setattr(pipeline.parts, "subject_embeds", embeds)
    assert same(expected, pipeline.generate(None, "dog", "in the snow", **FAST))
    other = pipeline.generate(photo(4), "dog", "in the snow", **FAST)  # a picture says otherwise
    assert not same(expected, other)
    monkeypatch.setattr(pipeline.parts, "subject_embeds", None)
    with pytest.raises(ValueError, match="give subject_images: this model was not fine-tuned"):
        pipeline.generate(None, "dog", "in the snow", **FAST)


def test_without_the_subject_the_photograph_is_not_needed(pipeline: SubjectPipeline) -> None:
    dropped = pipeline.generate(None, "dog", "in the snow", drop_subject=True, **FAST)
    assert same(dropped, pipeline.generate(photo(3), "dog", "in the snow", drop_subject=True, **FAST))
    assert not same(dropped, pipeline.generate(photo(3), "dog", "in the snow", **FAST))


def test_target_subject_is_written_source_subject_is_read(pipeline: SubjectPipeline) -> None:
    cat = pipeline.generate(photo(0), "dog", "in the snow", target_subject="cat", **FAST)
    by_hand = pipeline.generate(
        None, "cat", "in the snow", subject_embeds=pipeline.embed_subject(photo(0), "dog"), **FAST
    )
    assert same(cat, by_hand)
    assert not same(cat, pipeline.generate(photo(0), "cat", "in the snow", **FAST))


def test_given_latents_replace_the_seed(pipeline: SubjectPipeline) -> None:
    latents = pipeline.initial_latents([4], 2, TARGET_SIZE, TARGET_SIZE)
    given = pipeline.generate(photo(0), "dog", "in the snow", num_images=2, latents=latents, seed=99, **FAST)
    assert torch.equal(given, pipeline.generate(photo(0), "dog", "in the snow", num_images=2, seed=4, **FAST))


def test_guidance_is_the_models_own_unless_given(pipeline: SubjectPipeline) -> None:
    settings = {**FAST, "guidance": None}
    pipeline.parts.metadata["guidance"] = 3.0
    own = pipeline.generate(photo(0), "dog", "on the beach", **settings)
    pipeline.parts.metadata.pop("guidance")
    assert torch.equal(own, pipeline.generate(photo(0), "dog", "on the beach", **{**FAST, "guidance": 3.0}))
    references = pipeline.generate(photo(0), "dog", "on the beach", **settings)
    assert not torch.equal(own, references)
    assert torch.equal(references, pipeline.generate(photo(0), "dog", "on the beach", **{**FAST, "guidance": 7.5}))


def test_negative_prompt_counts_with_guidance_only(pipeline: SubjectPipeline) -> None:
    guided = [pipeline.generate(photo(0), "dog", "in the snow", negative_prompt=n, **FAST) for n in ("", "blurry")]
    assert not same(*guided)
    settings = {**FAST, "guidance": 1.0}
    free = [pipeline.generate(photo(0), "dog", "in the snow", negative_prompt=n, **settings) for n in ("", "blurry")]
    assert torch.equal(*free)
    pipeline.generate(photo(0), "dog", "in the snow", negative_prompt="blurry, lowres, " * 40, **FAST)


def test_metadata_of_the_model_set_template_and_repetitions() -> None:
    parts = tiny_parts()
    parts.metadata.update(template="paper", prompt_reps=1)
    settings = {key: value for key, value in FAST.items() if key != "prompt_reps"}
    own = SubjectPipeline(parts).generate(photo(0), "dog", "in the snow", **settings)
    plain = SubjectPipeline(tiny_parts())
    assert same(own, plain.generate(photo(0), "dog", "in the snow", template="paper", **FAST))
    assert not same(own, plain.generate(photo(0), "dog", "in the snow", **settings))


def test_preprocessing(pipeline: SubjectPipeline) -> None:
    wide = photo(0, width=90, height=30)
    assert pipeline.preprocess(wide).shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert not torch.equal(pipeline.preprocess(wide), pipeline.preprocess(wide, fit="stretch"))
    grey = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 128)
    expected = (128 / 255 - torch.tensor(pipeline.parts.image_mean)) / torch.tensor(pipeline.parts.image_std)
    torch.testing.assert_close(pipeline.preprocess(grey)[:, 5, 5], expected)
    ready = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(pipeline.preprocess(ready), ready)


def test_modules_keep_their_mode(pipeline: SubjectPipeline) -> None:
    pipeline.denoiser.unet.train()
    pipeline.subject_encoder.qformer.train()
    pipeline.generate(photo(0), "dog", "in the snow", **FAST)
    assert pipeline.denoiser.unet.training
    assert pipeline.subject_encoder.qformer.training
    pipeline.denoiser.eval()
    pipeline.subject_encoder.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subject_images": []}, "no picture of the subject 'dog'"),
        ({"subject_text": ["dog", "cat"], "subject_images": [photo(0)]}, "1 entries in subject_images for 2 subjects"),
        (
            {"subject_text": ["dog", "cat"], "prompt": ["a", "b", "c"], "drop_subject": True},
            "2 target subjects where 3",
        ),
        ({"seed": [1, 2]}, "2 seeds where 1"),
        ({"prompt": []}, "at least one subject_text and one prompt"),
        ({"prompt_strength": 0.0}, "repeated 0 times"),
        ({"num_images": 0}, "num_images=0"),
        ({"steps": 0}, "steps=0"),
        ({"height": 30}, "pictures of 30×32 pixels"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents has shape \(2, 4, 8, 8\).*N=1"),
        ({"output": "jpeg"}, "output='jpeg' is unknown"),
        ({"fit": "squeeze"}, "fit='squeeze' is unknown"),
        ({"template": "none"}, "template 'none' is unknown"),
    ],
)
def test_wrong_arguments_are_named(pipeline: SubjectPipeline, arguments: dict, message: str) -> None:
    call = {"subject_images": photo(0), "subject_text": "dog", "prompt": "in the snow", **FAST, **arguments}
    with pytest.raises(ValueError, match=message):
        pipeline.generate(call.pop("subject_images"), call.pop("subject_text"), call.pop("prompt"), **call)


def test_an_incomplete_model_is_refused() -> None:
    parts: ModelParts = tiny_parts()
    parts.text_encoder = parts.denoiser = None
    with pytest.raises(ValueError, match="generation needs text_encoder, denoiser"):
        SubjectPipeline(parts)
