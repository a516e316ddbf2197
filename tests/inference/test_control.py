"""Generation under a ControlNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from tiny_models import IMAGE_SIZE, TARGET_SIZE, tiny_parts

from blipdiff_train.inference.control import ControlPipeline, canny_edges, load_controlnet

FAST = {"steps": 2, "guidance": 3.0, "prompt_reps": 1, "output": "tensor"}


def tiny_controlnet(pipeline_unet, *, silent: bool = False) -> ControlNetModel:
    # three levels of convolutions: the tiny VAE's factor is 4
    controlnet = ControlNetModel.from_unet(pipeline_unet, conditioning_embedding_out_channels=(4, 8, 8))
    if not silent:
        torch.manual_seed(1)
        for name, parameter in controlnet.named_parameters():
            if "controlnet_" in name:  # the zero convolutions
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    return controlnet.eval()


@pytest.fixture(scope="module")
def pipeline() -> ControlPipeline:
    parts = tiny_parts()
    return ControlPipeline(parts, tiny_controlnet(parts.denoiser.unet))


@pytest.fixture
def subject() -> torch.Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def control(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_silent_controlnet_changes_nothing(subject: torch.Tensor) -> None:
    parts = tiny_parts()
    pipeline = ControlPipeline(parts, tiny_controlnet(parts.denoiser.unet, silent=True))
    controlled = pipeline.generate(subject, "dog", "in the snow", control_image=control(0), **FAST)
    plain = super(ControlPipeline, pipeline).generate(subject, "dog", "in the snow", **FAST)
    torch.testing.assert_close(controlled, plain, atol=1e-6, rtol=0)


def test_the_control_picture_matters(pipeline: ControlPipeline, subject: torch.Tensor) -> None:
    first, second = (
        pipeline.generate(subject, "dog", "in the snow", control_image=control(seed), **FAST) for seed in (0, 1)
    )
    assert (first - second).abs().max() > 1e-4
    off = pipeline.generate(subject, "dog", "in the snow", control_image=control(0), control_scale=0.0, **FAST)
    plain = super(ControlPipeline, pipeline).generate(subject, "dog", "in the snow", **FAST)
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)


def test_each_prompt_has_its_own(pipeline: ControlPipeline, subject: torch.Tensor) -> None:
    prompts, controls = ["in the snow", "on a marble table"], [control(0), control(1)]
    settings = {**FAST, "batch_size": 3, "num_images": 2}
    together = pipeline.generate(subject, "dog", prompts, control_image=controls, **settings)
    second = pipeline.generate(subject, "dog", prompts[1], control_image=controls[1], **settings)
    torch.testing.assert_close(together[2:], second, atol=1e-4, rtol=0)
    shared = pipeline.generate(subject, "dog", prompts, control_image=controls[1], **settings)
    torch.testing.assert_close(shared[2:], second, atol=1e-4, rtol=0)


def test_sizes(pipeline: ControlPipeline, subject: torch.Tensor) -> None:
    wide = pipeline.generate(subject, "dog", "in the snow", control_image=control(0), height=16, width=24, **FAST)
    assert wide.shape == (1, 3, 16, 24)
    latents = torch.randn(1, 4, 4, 6)
    given = pipeline.generate(subject, "dog", "in the snow", control_image=control(0), latents=latents, **FAST)
    assert given.shape == (1, 3, 16, 24)
    ready = torch.rand(3, TARGET_SIZE, TARGET_SIZE)
    assert torch.equal(pipeline.preprocess_control(ready, TARGET_SIZE, TARGET_SIZE), ready)
    with pytest.raises(ValueError, match="control_image has shape"):
        pipeline.generate(subject, "dog", "in the snow", control_image=torch.rand(3, 8, 8), **FAST)
    with pytest.raises(ValueError, match="2 control images for 1 prompts"):
        pipeline.generate(subject, "dog", "in the snow", control_image=[control(0)] * 2, **FAST)


def test_folders(tmp_path, pipeline: ControlPipeline) -> None:
    pipeline.controlnet.save_pretrained(tmp_path)
    loaded = load_controlnet(tmp_path)
    assert all(
        torch.equal(loaded.state_dict()[name], value) for name, value in pipeline.controlnet.state_dict().items()
    )
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_controlnet(tmp_path / "nowhere")


def test_width_must_agree() -> None:
    parts = tiny_parts()
    controlnet = tiny_controlnet(parts.denoiser.unet)
    controlnet.register_to_config(cross_attention_dim=48)
    with pytest.raises(ValueError, match="width 48, this model's have 32"):
        ControlPipeline(parts, controlnet)


def test_canny() -> None:
    image = Image.new("RGB", (32, 24))
    image.paste((255, 255, 255), (8, 8, 24, 16))
    edges = np.array(canny_edges(image))
    assert edges.shape == (24, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[12, 16].tolist() == [0, 0, 0]
    assert edges[12, 6:10].max() == 255
