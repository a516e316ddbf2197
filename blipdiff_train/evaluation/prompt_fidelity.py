"""Does the image show what the prompt says? CLIP similarities and zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional


class ClipScorer(nn.Module):
    """A CLIP model with its tokenizer and image preprocessing, for scores only.

    Args:
        model: a ``transformers.CLIPModel``.
        tokenizer: its tokenizer.
        image_processor: its image processor (resize, crop, normalise).
    """

    def __init__(self, model: nn.Module, tokenizer, image_processor) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(cls, folder: str) -> ClipScorer:
        """Open a CLIP folder or hub id (safetensors only; nothing from it runs)."""
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

        return cls(
            CLIPModel.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32),
            CLIPTokenizerFast.from_pretrained(folder),
            CLIPImageProcessorPil.from_pretrained(folder),
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image], *, batch_size: int = 64) -> Tensor:
        """Unit-length image embeddings (N, E) of PIL images."""
        parts = []
        for start in range(0, len(images), batch_size):
            pixels = self.image_processor(images=list(images[start : start + batch_size]), return_tensors="pt")
            features = self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.device))
            parts.append(functional.normalize(_pooled(features).float(), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length text embeddings (N, E)."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return functional.normalize(_pooled(features).float(), dim=-1)

    def classify(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Index (N,) of the text most similar to each image (zero-shot classification)."""
        return (self.embed_images(images) @ self.embed_texts(texts).T).argmax(1).cpu().numpy()


def _pooled(features) -> Tensor:
    # transformers 5 returns an output object where 4 returned the projected tensor
    return features if isinstance(features, Tensor) else features.pooler_output
