"""From a picture of a subject and its category word to the embeddings that stand for it in a prompt.

Sources: paper section 3.2; LAVIS ``blip_diffusion.py`` ``ProjLayer`` and ``forward_ctx_embeddings``;
diffusers 0.32.2 ``pipelines/blip_diffusion/modeling_blip2.py`` ``ProjLayer`` and
``Blip2QFormerModel.forward``.

Deliberate differences:

* The Q-Former is trainable from here. LAVIS calls ``extract_features``, which is ``torch.no_grad``, so that
  its ``qformer_train=True`` trains nothing.
* The category text is cut to the Q-Former's number of position embeddings; the references would fail on a
  longer one.
* :class:`SubjectProjection` says in its docstring what the code does; the comment in the references
  ("post-norm") says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blipdiff_train.common.shapes import check_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blipdiff_train.models.image_encoder import ImageEncoder
    from blipdiff_train.models.qformer import QFormer


class SubjectProjection(nn.Module):
    """``x + dropout(dense2(QuickGELU(dense1(LayerNorm(x)))))``: from the Q-Former's width to the text
    encoder's.

    The norm comes first, the residual is the un-normed input, nothing is normed after. Because of the
    residual both widths are one number (768 for BERT-base and for CLIP ViT-L/14's text tower).

    Args:
        width: D of input and output.
        hidden_width: inner width; 4 D in the references.
        dropout: probability, in training mode only.
        layer_norm_eps: 1e-12 in the references.
    """

    def __init__(
        self, width: int, hidden_width: int | None = None, *, dropout: float = 0.1, layer_norm_eps: float = 1e-12
    ) -> None:
        super().__init__()
        hidden_width = 4 * width if hidden_width is None else hidden_width
        self.LayerNorm = nn.LayerNorm(width, eps=layer_norm_eps)  # named as in the public checkpoints
        self.dense1 = nn.Linear(width, hidden_width)
        self.dense2 = nn.Linear(hidden_width, width)
        self.dropout = nn.Dropout(dropout)

    @property
    def width(self) -> int:
        return self.dense2.out_features

    def forward(self, query_output: Tensor) -> Tensor:
        """(B Q D) → (B Q D)."""
        hidden = self.dense1(self.LayerNorm(query_output))
        hidden = hidden * torch.sigmoid(1.702 * hidden)  # QuickGELU
        return query_output + self.dropout(self.dense2(hidden))


class SubjectEncoder(nn.Module):
    """Picture and category word in, Q embeddings in the text encoder's space out.

    Args:
        image_encoder: frozen image tower.
        qformer: run on queries and text together, both ways; its first Q outputs are taken.
        projection: of the Q-Former's width.
        tokenizer: the Q-Former's BERT tokenizer.

    Raises:
        ValueError: Q-Former and projection differ in width.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        qformer: QFormer,
        projection: SubjectProjection,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        if qformer.config.hidden_size != projection.width:
            raise ValueError(
                f"the Q-Former is {qformer.config.hidden_size} wide, the projection {projection.width}: the "
                "residual around the projection needs them equal"
            )
        self.image_encoder = image_encoder
        self.qformer = qformer
        self.projection = projection
        self.tokenizer = tokenizer

    @property
    def num_queries(self) -> int:
        return self.qformer.config.num_query_tokens

    def forward(self, subject_image: Tensor, subject_text: Sequence[str]) -> Tensor:
        """``subject_embeds`` (B Q D).

        Args:
            subject_image: (B 3 S S), CLIP-normalised.
            subject_text: B category words ("dog"), padded to the longest here; pads are masked.
        """
        check_shape(subject_image, "B 3 S S", name="subject_image", B=len(subject_text))
        return self.project(self.image_encoder(subject_image), subject_text)

    def project(self, image_embeds: Tensor, subject_text: Sequence[str]) -> Tensor:
        """:meth:`forward` from the image tower's output (B P D_image)."""
        tokens = self.tokenizer(
            list(subject_text),
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.qformer.config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.qformer.query_tokens.device)
        context = self.qformer.encode_images(image_embeds)
        query_output, _ = self.qformer.multimodal_pass(tokens.input_ids, tokens.attention_mask, context)
        return self.projection(query_output)

    def idle_parameters(self) -> set[str]:
        """Names of parameters that no subject embedding depends on, so that they must not be called
        trainable.

        The language-model head, and the last layer's feed-forward for text, whose output nothing reads: they
        serve stage 1. Left trainable, they would stop DDP, which waits for every parameter's gradient.
        """
        last = f"qformer.encoder.layer.{self.qformer.config.num_hidden_layers - 1}."
        idle = ("qformer.lm_head.", f"{last}intermediate.", f"{last}output.")
        return {name for name, _ in self.named_parameters() if name.startswith(idle)}
