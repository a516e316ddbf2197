"""Generation of a subject under a ControlNet: an edge map, a pose or a depth map says where things are.

Sources: paper section 3.4; diffusers 0.32.2 ``pipeline_controlnet_blip_diffusion.py``; LAVIS
``blip_diffusion.py`` ``generate_with_ControlNet``. The ControlNet reads the UNet's own batch and text states (with the
subject in them) and a control picture in [0, 1]; its residuals are added inside the UNet.

Deliberate differences:

* The control picture is stretched to the picture's size with a bicubic filter, as diffusers does (LAVIS: lanczos).
* A control picture for each prompt, or one for all (diffusers: one for all).
* The argument is spelled ``control_image`` (diffusers: ``condtioning_image``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blipdiff_train.checkpoints import diffusers as diffusers_layout
from blipdiff_train.checkpoints.safety import find_file, read_json, read_tensors, weight_names
from blipdiff_train.common.shapes import check_shape
from blipdiff_train.inference.pipeline import SubjectPipeline, UNetArguments
from blipdiff_train.models.modes import evaluating
from blipdiff_train.models.parts import ModelParts

if TYPE_CHECKING:
    from diffusers import ControlNetModel


def load_controlnet(source: str | Path, *, subfolder: str = "") -> ControlNetModel:
    """A ``ControlNetModel`` folder or hub id, in fp32.

    Raises:
        ValueError: a file is missing, damaged, of another class or does not fit; it and the keys are named.
    """
    from diffusers import ControlNetModel

    config_file = find_file(source, ["config.json"], subfolder=subfolder)
    config = read_json(config_file, allowed_class_names=("ControlNetModel",))
    with torch.device("meta"):
        controlnet = ControlNetModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    file = find_file(source, weight_names("diffusion_pytorch_model"), subfolder=subfolder)
    diffusers_layout.fill(controlnet, read_tensors(file), file)
    return controlnet.eval()


class ControlPipeline(SubjectPipeline):
    """:class:`SubjectPipeline` with a ControlNet.

    Args:
        parts: a complete model.
        controlnet: one that was made for the model's UNet (for the release: any of Stable Diffusion 1.5's).

    Raises:
        ValueError: a part is missing, or the ControlNet reads text states of another width.
    """

    def __init__(self, parts: ModelParts, controlnet: ControlNetModel) -> None:
        super().__init__(parts)
        width, expected = controlnet.config.cross_attention_dim, self.text_encoder.width
        if width != expected:
            raise ValueError(f"the ControlNet reads text states of width {width}, this model's have {expected}")
        self.controlnet = controlnet

    def to(self, device: torch.device | str) -> ControlPipeline:
        self.controlnet.to(device)
        super().to(device)
        return self

    def preprocess_control(self, image: Image.Image | Tensor, height: int, width: int) -> Tensor:
        """A control picture (3 H W) fp32 in [0, 1], not normalised; a tensor is only checked."""
        if isinstance(image, Tensor):
            check_shape(image, "3 H W", name="control_image", H=height, W=width)
            return image.float()
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255

    @torch.no_grad()
    def generate(
        self,
        subject_images: Any,
        subject_text: str | Sequence[str],
        prompt: str | Sequence[str],
        *,
        control_image: Image.Image | Tensor | Sequence[Image.Image | Tensor],
        control_scale: float = 1.0,
        num_images: int = 1,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> list[Image.Image] | Tensor:
        """Pictures as of :meth:`SubjectPipeline.generate`, laid out as ``control_image`` says.

        Args:
            control_image: one for all prompts or one a prompt: PIL, or tensors (3 H W) in [0, 1].
            control_scale: factor of the ControlNet's residuals.
            options: everything else that :meth:`SubjectPipeline.generate` takes.

        Raises:
            ValueError: arguments that do not belong together.
        """
        size = self.denoiser.default_size
        if latents is not None:  # they say the size
            height, width = (side * self.denoiser.vae_factor for side in latents.shape[-2:])
        height, width = height or size, width or size
        pictures = [control_image] if isinstance(control_image, (Image.Image, Tensor)) else list(control_image)
        num_prompts = max(1 if isinstance(text, str) else len(text) for text in (subject_text, prompt))
        if len(pictures) not in (1, num_prompts):
            raise ValueError(f"{len(pictures)} control images for {num_prompts} prompts; give one each or one for all")
        stacked = torch.stack([self.preprocess_control(picture, height, width) for picture in pictures])
        owners = torch.arange(num_prompts).repeat_interleave(num_images) % len(pictures)  # control image of each row

        def arguments_of(rows: slice) -> UNetArguments:
            control = stacked[owners[rows]].to(self.device, self.controlnet.dtype)  # b 3 H W

            def arguments(unet_input: Tensor, timestep: Tensor, states: Tensor) -> dict[str, Any]:
                repeats = len(unet_input) // len(control)  # 2 under guidance: [negative, prompt]
                down, mid = self.controlnet(
                    unet_input.to(self.controlnet.dtype),
                    timestep,
                    encoder_hidden_states=states.to(self.controlnet.dtype),
                    controlnet_cond=torch.cat([control] * repeats),
                    conditioning_scale=control_scale,
                    return_dict=False,
                )
                dtype = self.denoiser.unet.dtype
                return {
                    "down_block_additional_residuals": [residual.to(dtype) for residual in down],
                    "mid_block_additional_residual": mid.to(dtype),
                }

            return arguments

        with evaluating(self.controlnet):
            return super().generate(
                subject_images,
                subject_text,
                prompt,
                num_images=num_images,
                latents=latents,
                height=height,
                width=width,
                unet_arguments=arguments_of,
                **options,
            )


def canny_edges(image: Image.Image, *, low: float = 100, high: float = 200) -> Image.Image:
    """White edges on black, three channels: the control picture of the ControlNets called canny.

    Args:
        image: at the size at which edges matter; about 512 pixels for Stable Diffusion.
        low, high: Canny's two thresholds.
    """
    import cv2

    edges = cv2.Canny(np.array(image.convert("RGB")), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2))
