"""Captions from an image-to-text model (BLIP-2 in the paper, §4.1), for photographs that came without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blipdiff_train.checkpoints.safety import read_json
from blipdiff_train.common.files import sha256_tensors

CONFIGURATIONS = ("config.json", "preprocessor_config.json", "tokenizer_config.json")


class Captioner:
    """Any model that transformers lists for image to text: BLIP, BLIP-2, GIT, an encoder–decoder such as ViT-GPT2.

    Decoding is greedy: the same photographs in the same batch give the same words.

    Args:
        model: local folder, or a hub id such as ``Salesforce/blip2-opt-6.7b``, with safetensors.
        device: of torch.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        batch_size: photographs a forward.
        max_new_tokens: a longer caption is cut.

    Raises:
        OSError: no such model, or one without safetensors.
        ValueError: a configuration that asks for code, or no image-to-text model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = 8,
        max_new_tokens: int = 30,
    ) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        for name in CONFIGURATIONS:
            if (path := Path(model) / name).is_file():
                read_json(path)
        data_only = {"trust_remote_code": False}
        self.model_name, self.device, self.dtype = str(model), device, dtype
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.model = AutoModelForImageTextToText.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, **data_only
        )
        self.model.to(device).eval().requires_grad_(False)
        self.image_processor = AutoImageProcessor.from_pretrained(model, **data_only)
        self.tokenizer = AutoTokenizer.from_pretrained(model, **data_only)

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """A sentence for each photograph (H W 3 uint8, sizes may differ); it may be empty."""
        import torch

        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            batch = list(images[start : start + self.batch_size])
            pixels = self.image_processor(batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                tokens = self.model.generate(
                    pixel_values=pixels.to(self.device, self.model.dtype),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.max_new_tokens,
                )
            texts = self.tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)
            captions += [" ".join(text.split()) for text in texts]
        return captions

    def describe(self) -> dict[str, Any]:
        """What the provenance of a sample says about its caption."""
        import transformers

        return {
            "model": Path(self.model_name).name if Path(self.model_name).is_dir() else self.model_name,
            "weights": sha256_tensors(self.model.state_dict())[:12],
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "transformers": transformers.__version__,
        }
