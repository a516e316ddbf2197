"""What stage 1 puts on top of the Q-Former: projections to the shared space, the match classifier, the temperature.

Source: salesforce/LAVIS ``lavis/models/blip2_models/blip2_qformer.py`` (``vision_proj``, ``text_proj``, ``itm_head``,
``temp``).

Deliberate difference from LAVIS: features are normalised, and match logits averaged over the queries, in fp32 whatever
the model's precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlignmentHeads(nn.Module):
    """Heads of image–text contrast and matching.

    Args:
        hidden_size: width of the Q-Former.
        embed_dim: E, width of the shared space (256 in the paper's release).
        temperature: initial value; learned, similarities are divided by it.
    """

    def __init__(self, hidden_size: int, embed_dim: int = 256, temperature: float = 0.07) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}, expected a positive number: similarities are divided by it")
        self.vision_proj = nn.Linear(hidden_size, embed_dim)
        self.text_proj = nn.Linear(hidden_size, embed_dim)
        self.itm_head = nn.Linear(hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def image_feats(self, query_output: Tensor) -> Tensor:
        """(…, Q, D) → (…, Q, E), unit length, fp32."""
        return F.normalize(self.vision_proj(query_output).float(), dim=-1)

    def text_feats(self, text_output: Tensor) -> Tensor:
        """(…, D) → (…, E), unit length, fp32."""
        return F.normalize(self.text_proj(text_output).float(), dim=-1)

    def match_logits(self, query_output: Tensor) -> Tensor:
        """(R, Q, D) of the multimodal pass → (R, 2), fp32: no match, match; the mean over queries."""
        return self.itm_head(query_output).float().mean(dim=1)
