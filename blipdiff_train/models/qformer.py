"""The Q-Former: learned queries that read an image through cross-attention and share self-attention with text.

Source: BLIP-Diffusion §3.1–3.2 and BLIP-2 (arXiv 2301.12597) §3; salesforce/LAVIS, ``Qformer.py`` (``BertLMHeadModel``)
and ``blip2_qformer.py`` (which pass sees what) in ``lavis/models/blip2_models``. Parameter names below ``embeddings.``
and ``encoder.`` are those of diffusers' ``Blip2QFormerModel``. ``tests/parity`` holds the numbers to the references.

Letters: B images, R rows of a pass, Q queries, L text tokens, P patches, D hidden width, H heads, d = D / H,
V vocabulary.

Four passes over one set of weights; they differ in who sees whom:

=====================  =============================  ==========================================================
pass                   rows contain                   self-attention
=====================  =============================  ==========================================================
:meth:`image_pass`     queries                        all queries
:meth:`text_pass`      text                           all tokens but pads
:meth:`multimodal_pass`  queries, then text           everything but pads, both ways
:meth:`caption_pass`   text                           the queries of :meth:`image_pass`, and earlier tokens
=====================  =============================  ==========================================================

Deliberate differences from LAVIS, none of which changes a number (the parity tests show it):

* The cross-attention keys and values of an image are computed once (:meth:`encode_images`) and read by every pass
  that needs them. LAVIS computes them anew in the matching pass, three times over: P ≫ Q makes that its main cost.
* Masks are boolean and go to ``scaled_dot_product_attention``; LAVIS adds −10000, which a softmax rounds to zero.
* Text may be padded to the longest of the batch: pads are masked as keys and never read as outputs.
* In the last layer only the positions that a caller reads are computed, and where no caller reads pads the text's
  feed-forwards run on real tokens only (captions are unequal: about a third of a padded batch is pads).
* Queries and text are two tensors that meet in self-attention only, so nothing is cut and joined at the feed-forwards.
* The [DEC] token is the vocabulary's last row, by definition here and by ``add_special_tokens`` there.
* ``ln_vision`` lives here, not beside the image tower: it is trained with the Q-Former and in no other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipdiff_train.common.shapes import check_shape

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, each (R, H, N, d)."""


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former. The defaults are BLIP-Diffusion's: BERT-base plus [DEC], reading CLIP ViT-L/14."""

    vocab_size: int = 30523  # bert-base-uncased (30522) and [DEC], which is the last row
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    num_query_tokens: int = 16
    cross_attention_freq: int = 1  # layer i reads the image iff i % cross_attention_freq == 0; BLIP-2 has 2
    image_width: int = 1024
    dropout: float = 0.1  # of hidden states and of attention probabilities, as in BERT
    layer_norm_eps: float = 1e-12  # of BERT's norms; ln_vision has CLIP's 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"qformer hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.cross_attention_freq < 1:
            raise ValueError(f"qformer cross_attention_freq={self.cross_attention_freq}, expected 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"qformer dropout={self.dropout}, expected a probability in [0, 1)")

    @property
    def dec_token_id(self) -> int:
        """Id of [DEC], which starts a caption in place of [CLS]."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class ImageContext:
    """What cross-attention reads of B images: keys and values (B, H, P, d) for each layer, None where it has none."""

    keys_values: tuple[KeyValue | None, ...]

    def __len__(self) -> int:
        return next(key.shape[0] for key, _ in filter(None, self.keys_values))

    def select(self, index: Tensor) -> ImageContext:
        """The images at ``index`` (R,), with gradient, nothing recomputed."""
        return ImageContext(
            tuple(kv and (kv[0].index_select(0, index), kv[1].index_select(0, index)) for kv in self.keys_values)
        )

    def joined(self, other: ImageContext) -> ImageContext:
        """These images, then ``other``'s."""
        pairs = zip(self.keys_values, other.keys_values, strict=True)
        return ImageContext(
            tuple(mine and (torch.cat([mine[0], its[0]]), torch.cat([mine[1], its[1]])) for mine, its in pairs)
        )


class Fp32LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32 whatever goes in; the result has the parameters' dtype, so the next matmul agrees."""

    def forward(self, states: Tensor) -> Tensor:
        normed = F.layer_norm(states.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(self.weight.dtype)


class Embeddings(nn.Module):
    """Word plus position embedding of text; the norm and dropout after it are shared with the queries."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """(R, L) → (R, L, D). Positions start at 0 whether or not queries precede the text."""
        if input_ids.shape[1] > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"text has {input_ids.shape[1]} tokens, the Q-Former has "
                f"{self.position_embeddings.num_embeddings} position embeddings; lower max_text_len"
            )
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.norm(self.word_embeddings(input_ids) + positions)

    def norm(self, states: Tensor) -> Tensor:
        """Queries come here as they are: they have no position embedding."""
        return self.dropout(self.LayerNorm(states))


class Projections(nn.Module):
    """Query, key and value projections."""

    def __init__(self, query_size: int, key_size: int, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, hidden_size)
        self.key = nn.Linear(key_size, hidden_size)
        self.value = nn.Linear(key_size, hidden_size)


class ResidualOutput(nn.Module):
    """dense → dropout → add the residual → norm: BERT is post-norm."""

    def __init__(self, in_size: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(states)) + residual)


class Intermediate(nn.Module):
    """dense → erf GELU."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, states: Tensor) -> Tensor:
        return F.gelu(self.dense(states))


class Attention(nn.Module):
    """Multi-head attention with its output layer; keys and values are handed in, so that they can be shared."""

    def __init__(self, config: QFormerConfig, key_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.attention = Projections(config.hidden_size, key_size, config.hidden_size)
        self.output = ResidualOutput(config.hidden_size, config)

    def keys_values(self, states: Tensor) -> KeyValue:
        """(R, N, ·) → keys and values, each (R, H, N, d)."""
        return self._heads(self.attention.key(states)), self._heads(self.attention.value(states))

    def forward(self, states: Tensor, blocks: Sequence[KeyValue], mask: Tensor | None = None) -> Tensor:
        """Attend from ``states`` (R, N, D) to ``blocks``; returns (R, N, D).

        Args:
            blocks: keys and values of consecutive blocks of rows. One block of R rows is the ordinary case; several
                let rows read the same keys and values without a copy of them.
            mask: (R, 1, 1 or N, M), True where attention is allowed; for a single block only.
        """
        queries = self._heads(self.attention.query(states))
        dropout = self.dropout if self.training else 0.0
        rows = torch.split(queries, [key.shape[0] for key, _ in blocks])
        attended = [
            F.scaled_dot_product_attention(row, key, value, attn_mask=mask, dropout_p=dropout)
            for row, (key, value) in zip(rows, blocks, strict=True)
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.output(joined.transpose(1, 2).flatten(2), states)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # R H N d


class Layer(nn.Module):
    """Self-attention of queries and text together, cross-attention of the queries, a feed-forward for each."""

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if index % config.cross_attention_freq == 0:
            self.crossattention = Attention(config, config.image_width)
        else:
            self.crossattention = None
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualOutput(config.intermediate_size, config)

    def forward(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
        image_blocks: Sequence[KeyValue],
        past: KeyValue | None,
        num_text_outputs: int | None,
        real_tokens: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, KeyValue]:
        """One layer over ``queries`` (R, Q, D) and ``text`` (R, L, D), either of which may be absent.

        Args:
            mask: (R, 1, 1 or L, keys), True where attention is allowed; keys are past, queries, text.
            image_blocks: cross-attention keys and values, blocks of rows; empty without an image.
            past: keys and values to put before this pass's own.
            num_text_outputs: how many text positions the caller will read; None for all.
            real_tokens: indices into R · L of the tokens that are no pads; pads then skip the feed-forward, which is
                of no consequence where they are masked as keys. None computes all.

        Returns:
            queries, text and the self-attention keys and values of this pass (without ``past``).
        """
        states = _join(queries, text)
        own = self.attention.keys_values(states)
        seen = own if past is None else (torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2))
        num_queries = 0 if queries is None else queries.shape[1]
        if num_text_outputs is not None:
            states = states[:, : num_queries + num_text_outputs]
        states = self.attention(states, [seen], mask)

        queries, text = states[:, :num_queries], states[:, num_queries:]
        if num_queries:
            if self.crossattention is not None and image_blocks:
                queries = self.crossattention(queries, image_blocks)
            queries = self.output_query(self.intermediate_query(queries), queries)
        if text.shape[1] and (real_tokens is None or num_text_outputs is not None):
            text = self.output(self.intermediate(text), text)
        elif text.shape[1]:
            every = text.flatten(0, 1)
            real = every.index_select(0, real_tokens)
            text = every.index_copy(0, real_tokens, self.output(self.intermediate(real), real)).view_as(text)
        return (queries if num_queries else None), (text if text.shape[1] else None), own


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        queries: Tensor | None,
        text: Tensor | None,
        *,
        mask: Tensor | None = None,
        contexts: Sequence[ImageContext] = (),
        past: Sequence[KeyValue] | None = None,
        num_text_outputs: int | None = None,
        real_tokens: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, tuple[KeyValue, ...]]:
        """All layers; see :meth:`Layer.forward`. ``num_text_outputs`` holds for the last layer."""
        cache = []
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            blocks = [context.keys_values[index] for context in contexts if context.keys_values[index] is not None]
            arguments = (
                queries,
                text,
                mask,
                blocks,
                None if past is None else past[index],
                num_text_outputs if index == last else None,
                real_tokens,
            )
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                queries, text, own = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                queries, text, own = layer(*arguments)
            cache.append(own)
        return queries, text, tuple(cache)


class LanguageModelHead(nn.Module):
    """dense → GELU → norm → scores over the vocabulary; the last matrix is the word embedding itself (tied)."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(R, L, D) → (R, L, V)."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(states))), word_embeddings, self.bias)


class QFormer(nn.Module):
    """The Q-Former with its image norm and its language-model head; the module's docstring lists the passes."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.ln_vision = Fp32LayerNorm(config.image_width, eps=1e-5)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.lm_head = LanguageModelHead(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """BERT's initialisation: normal(0, 0.02), zero biases; query feed-forwards start as copies of the text's."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        self.query_tokens.normal_(0.0, 0.02)
        self.copy_text_feed_forward()

    def copy_text_feed_forward(self) -> None:
        """Set the queries' feed-forwards to the text's, as LAVIS does after loading BERT."""
        for layer in self.encoder.layer:
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each layer in the backward pass: less memory, about a third more time."""
        self.encoder.gradient_checkpointing = enabled

    def encode_images(self, image_embeds: Tensor) -> ImageContext:
        """Keys and values of every cross-attention layer for the frozen tower's ``image_embeds`` (B, P, D_image)."""
        check_shape(image_embeds, "B P W", name="image_embeds", W=self.config.image_width)
        normed = self.ln_vision(image_embeds)
        return ImageContext(
            tuple(
                None if layer.crossattention is None else layer.crossattention.keys_values(normed)
                for layer in self.encoder.layer
            )
        )

    def image_pass(self, context: ImageContext) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Queries alone: query_output (B, Q, D), and the self-attention cache that :meth:`caption_pass` reads."""
        queries, _, cache = self.encoder(self._queries(len(context)), None, contexts=[context])
        return queries, cache

    def text_pass(self, input_ids: Tensor, attention_mask: Tensor, *, num_outputs: int | None = None) -> Tensor:
        """Text alone, both ways: (R, L, D), or the first ``num_outputs`` positions (1: the [CLS] position)."""
        _, text, _ = self.encoder(
            None,
            self.embeddings.embed_text(input_ids),
            mask=_key_mask(attention_mask),
            num_text_outputs=num_outputs,
            real_tokens=None if num_outputs is None else _real_tokens(attention_mask),
        )
        return text

    def multimodal_pass(
        self, input_ids: Tensor, attention_mask: Tensor, *contexts: ImageContext, text_output: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and text together, both ways.

        Args:
            input_ids: (R, L).
            attention_mask: (R, L), zero at pads.
            contexts: the images, blocks of rows in order: R is the sum of their lengths. A context may stand in
                several blocks; its keys and values are neither recomputed nor copied.
            text_output: whether the text positions are wanted too.

        Returns:
            query_output (R, Q, D), and the text positions (R, L, D) or None.
        """
        num_rows = sum(len(context) for context in contexts)
        check_shape(input_ids, "R L", name="input_ids", R=num_rows)
        queries, text, _ = self.encoder(
            self._queries(num_rows),
            self.embeddings.embed_text(input_ids),
            mask=_key_mask(attention_mask, num_before=self.config.num_query_tokens),
            contexts=contexts,
            num_text_outputs=None if text_output else 0,
            real_tokens=None if text_output else _real_tokens(attention_mask),
        )
        return queries, text

    def caption_pass(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Sequence[KeyValue], *, pad_outputs: bool = False
    ) -> Tensor:
        """Text that sees all queries of ``cache`` and its own past: (B, L, D), with [DEC] in place of [CLS].

        Pads come out unfinished unless ``pad_outputs``. The cache is :meth:`image_pass`'s and not detached: captioning
        trains queries and cross-attention through it.
        """
        num_tokens = input_ids.shape[1]
        ids = torch.cat([torch.full_like(input_ids[:, :1], self.config.dec_token_id), input_ids[:, 1:]], 1)
        past = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=ids.device).tril()
        mask = _key_mask(attention_mask) & past  # B 1 L L
        to_queries = mask.new_ones(()).expand(*mask.shape[:3], self.config.num_query_tokens)
        _, text, _ = self.encoder(
            None,
            self.embeddings.embed_text(ids),
            mask=torch.cat([to_queries, mask], 3),
            past=cache,
            real_tokens=None if pad_outputs else _real_tokens(attention_mask),
        )
        return text

    def lm_logits(self, text_output: Tensor) -> Tensor:
        """Scores of the next token, (…, V), for the positions of :meth:`caption_pass`."""
        return self.lm_head(text_output, self.embeddings.word_embeddings.weight)

    def _queries(self, num_rows: int) -> Tensor:
        return self.embeddings.norm(self.query_tokens.expand(num_rows, -1, -1))


def _join(queries: Tensor | None, text: Tensor | None) -> Tensor:
    if queries is None:
        return text
    return queries if text is None else torch.cat([queries, text], 1)


def _key_mask(attention_mask: Tensor, num_before: int = 0) -> Tensor:
    """(R, L) of ones and zeros → (R, 1, 1, num_before + L), True where a key may be read."""
    return F.pad(attention_mask.bool(), (num_before, 0), value=True)[:, None, None, :]


def _real_tokens(attention_mask: Tensor) -> Tensor | None:
    """Indices into the flattened (R, L) of what is no pad; None without pads."""
    index = attention_mask.flatten().nonzero().squeeze(1)
    return None if len(index) == attention_mask.numel() else index
