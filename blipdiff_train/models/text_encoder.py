"""CLIP's text encoder with the subject spliced into the prompt.

Sources: paper section 3.2; LAVIS ``modeling_ctx_clip.py`` and diffusers 0.32.2
``pipelines/blip_diffusion/modeling_ctx_clip.py`` (``ContextCLIPTextModel``). The token embeddings are cut at
``subject_position``, the subject embeddings go in between, and only then the position embeddings 0 … n+Q−1
and a causal mask over all n+Q positions are applied. There is no padding mask: pads are EOS tokens and later
positions attend to them. The result is the last hidden state after ``final_layer_norm``, whose eps is 1e-5 in both
references, whatever the configuration says of the other norms.

Deliberate differences, none of which changes a reference number:

* A batch may mix rows with and without a subject: rows with one have max_len − Q text tokens and Q
  embeddings, rows without one max_len text tokens, so all have max_len positions and go through the encoder
  together. The references need two calls. A dropped row is computed as if no subject had been given.
* Every row may have a position of its own, or :data:`AT_END`, before its EOS (the ``paper`` template).
* Training pads to max_len as inference does; LAVIS trains on unpadded captions, and so only on batches whose
  captions have equal token counts. ``pad=False`` restores that, with the same restriction.
* Prompts, negative ones too, are cut to what fits; the references crash on a negative prompt of more than 77
  tokens and accept captions of 77 of which 77 − Q fit.
* No pooled output: the references take it Q positions too early, and nothing uses it.
* The maximal length is the model's number of position embeddings, not a literal 77.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from blipdiff_train.common.shapes import check_shape

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

AT_END = -1
"""A subject position: just before the EOS token, after the last word that was kept."""


class TextEncoder(nn.Module):
    """``CLIPTextModel`` of transformers 5 with subject embeddings between its token embeddings.

    Args:
        clip_text_model: its ``embeddings``, ``encoder`` and ``final_layer_norm`` are used.
        tokenizer: the CLIP tokenizer that belongs to it.

    Attributes:
        max_length: number of positions, subject embeddings included (77 for Stable Diffusion).
        width: D, size of one hidden state.
    """

    def __init__(self, clip_text_model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = clip_text_model
        self.model.final_layer_norm.eps = 1e-5  # the references build this one norm without the configuration's eps
        self.tokenizer = tokenizer
        self.max_length: int = clip_text_model.config.max_position_embeddings
        self.width: int = clip_text_model.config.hidden_size

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each layer in the backward pass of training."""
        if enabled:
            # the old name warns where there is a new one, and transformers 5.20 has no other
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable()
        else:
            self.model.gradient_checkpointing_disable()

    def forward(
        self,
        prompts: Sequence[str],
        subject_embeds: Tensor | None = None,
        subject_dropped: Tensor | None = None,
        subject_position: int | Sequence[int] = 2,
        *,
        pad: bool = True,
    ) -> Tensor:
        """Hidden states (B L D) of ``prompts``, L = ``max_length``.

        Args:
            prompts: B sentences; what does not fit is cut off at the end.
            subject_embeds: (B Q D), or None for text alone.
            subject_dropped: (B) bool; where true the row has no subject, and its row of ``subject_embeds``
                is unused.
            subject_position: index among the token ids (BOS is 0), the same for all or one a row; or
                :data:`AT_END`.
            pad: False leaves the rows at their own length, which must then be the same for all (LAVIS's
                training).

        Raises:
            ValueError: sizes that do not belong together, or rows of unequal length with ``pad=False``.
        """
        batch_size = len(prompts)
        if subject_embeds is None:
            ids, _ = self.tokenize(prompts, [self.max_length] * batch_size, pad=pad)
            return self.encode(ids)

        sizes = check_shape(subject_embeds, "B Q D", name="subject_embeds", B=batch_size, D=self.width)
        num_queries = sizes["Q"]
        if num_queries + 2 >= self.max_length:
            raise ValueError(
                f"{num_queries} subject embeddings leave no room for text in {self.max_length} positions; "
                f"use fewer query tokens"
            )
        has_subject = [True] * batch_size
        if subject_dropped is not None:
            check_shape(subject_dropped, "B", name="subject_dropped", B=batch_size)
            has_subject = [not dropped for dropped in subject_dropped.tolist()]
        ids, lengths = self.tokenize(
            prompts, [self.max_length - num_queries if has else self.max_length for has in has_subject], pad=pad
        )
        positions = [subject_position] * batch_size if isinstance(subject_position, int) else list(subject_position)
        if len(positions) != batch_size:
            raise ValueError(
                f"{len(positions)} subject positions for {batch_size} prompts; give one a prompt or a single one"
            )
        ends = [length - 1 for length in lengths]
        positions = [end if position == AT_END else position for position, end in zip(positions, ends, strict=True)]
        return self.encode(ids, subject_embeds, positions, has_subject)

    def tokenize(
        self, prompts: Sequence[str], max_lengths: Sequence[int], *, pad: bool = True
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids with BOS and EOS, cut to ``max_lengths`` and padded to it; and the lengths before
        padding."""
        rows, lengths = [], []
        for prompt, max_length in zip(prompts, max_lengths, strict=True):
            row = self.tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]
            lengths.append(len(row))
            rows.append(row + [self.tokenizer.pad_token_id] * (max_length - len(row)) if pad else row)
        return rows, lengths

    def encode(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        subject_embeds: Tensor | None = None,
        positions: int | Sequence[int] | Tensor = 2,
        has_subject: Sequence[bool] | None = None,
    ) -> Tensor:
        """Hidden states (B L D) of token ids; the level on which the references' numbers are defined.

        Args:
            ids: B rows of token ids with BOS and EOS, L − Q of them in a row with a subject and L in one
                without.
            subject_embeds: (B Q D) or None.
            positions: where the embeddings go, 0 … number of ids; one for all or one a row. Unused in rows
                without.
            has_subject: B flags; None means all rows have one if ``subject_embeds`` is given.

        Raises:
            ValueError: more than ``max_length`` positions, rows of unequal length, or a position outside its
            row.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
        batch_size = len(rows)
        num_queries = 0
        flags = [False] * batch_size
        if subject_embeds is not None:
            sizes = check_shape(subject_embeds, "B Q D", name="subject_embeds", B=batch_size, D=self.width)
            num_queries = sizes["Q"]
            flags = [True] * batch_size if has_subject is None else [bool(flag) for flag in has_subject]
        if isinstance(positions, Tensor):
            positions = positions.tolist()
        places = [positions] * batch_size if isinstance(positions, int) else list(positions)
        if len(places) != batch_size or len(flags) != batch_size:
            raise ValueError(
                f"{batch_size} rows of ids, {len(places)} positions and {len(flags)} flags must be as many"
            )

        lengths = [len(row) + (num_queries if flag else 0) for row, flag in zip(rows, flags, strict=True)]
        if max(lengths) > self.max_length:
            raise ValueError(
                f"{max(lengths)} positions (token ids and subject embeddings) do not fit into the text "
                f"encoder's "
                f"{self.max_length}; "
                f"cut the ids to {self.max_length - num_queries} beside {num_queries} subject embeddings"
            )
        if len(set(lengths)) != 1:
            raise ValueError(f"rows of unequal length {lengths} cannot form one batch; pad the ids")

        # every output position is either a token (its id stands in `layout`) or one of the row's subject
        # embeddings
        layout, sources = [], []
        for row, flag, place in zip(rows, flags, places, strict=True):
            if not flag:
                layout.append(row)
                sources.append([-1] * len(row))
                continue
            if not 0 <= place <= len(row):
                raise ValueError(
                    f"subject position {place} lies outside its {len(row)} token ids; expected 0 to {len(row)}"
                )
            layout.append(row[:place] + [row[0]] * num_queries + row[place:])
            sources.append([-1] * place + list(range(num_queries)) + [-1] * (len(row) - place))

        device = self.model.embeddings.token_embedding.weight.device
        embeds = self.model.embeddings.token_embedding(torch.tensor(layout, device=device))  # B L D
        if subject_embeds is not None and num_queries:
            source = torch.tensor(sources, device=device).unsqueeze(-1)  # B L 1
            index = source.clamp_min(0).expand(-1, -1, self.width)  # B L D
            spliced = subject_embeds.to(embeds.dtype).gather(1, index)
            embeds = torch.where(source >= 0, spliced, embeds)
        return self._encode_embeds(embeds)

    def _encode_embeds(self, embeds: Tensor) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        positions = torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0)  # 1 L
        hidden_states = self.model.embeddings(inputs_embeds=embeds, position_ids=positions)
        mask = create_causal_mask(
            config=self.model.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
        )
        output = self.model.encoder(inputs_embeds=hidden_states, attention_mask=mask, is_causal=True)
        return self.model.final_layer_norm(output.last_hidden_state)
