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
* Pads are not computed (captions are unequal: about a third of a padded batch is pads), except in attention itself,
  nor what no caller reads of the last layer. ``pad_outputs=True`` computes them, for those who compare with LAVIS.
* The scale and shift of ``ln_vision`` are multiplied into the key and value weights, so that the gradient of the image
  features, which are frozen, is never formed: the same function, and a third less work for keys and values.
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
    layer_norm_eps: float = 1e-12  # of BERT's norms
    image_norm_eps: float = 1e-5  # of ln_vision: CLIP's

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


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a pass stand. Attention works on R rows of N positions, all else on a list of T tokens.

    The list begins with the queries of all rows and goes on with the text of all rows, mostly without its pads.
    """

    num_rows: int
    num_positions: int  # N: queries and text, pads included
    num_queries: int = 0  # Q: the first positions of a row, and the first R · Q tokens of the list
    place: Tensor | None = None  # (T,): each token's index into R · N; None where it is its index in the list

    def to_rows(self, tokens: Tensor) -> Tensor:
        """(T, D) → (R, N, D), zeros at pads."""
        if self.place is not None:
            empty = tokens.new_zeros(self.num_rows * self.num_positions, tokens.shape[1])
            tokens = empty.index_copy(0, self.place, tokens)
        return tokens.unflatten(0, (self.num_rows, self.num_positions))

    def to_tokens(self, rows: Tensor) -> Tensor:
        """(R, N, D) → (T, D)."""
        tokens = rows.flatten(0, 1)
        return tokens if self.place is None else tokens.index_select(0, self.place)


@dataclass(frozen=True)
class Outputs:
    """The tokens that a caller reads of the last layer, in rows of their own; the others are not computed there."""

    index: Tensor  # into the list of tokens
    layout: Layout


class ImageNorm(nn.LayerNorm):
    """Layer norm of image features, computed in fp32 whatever goes in; the result has the parameters' dtype."""

    def forward(self, image_embeds: Tensor) -> Tensor:
        normed = F.layer_norm(
            image_embeds.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(self.weight.dtype)

    def standardize(self, image_embeds: Tensor) -> Tensor:
        """Mean 0 and variance 1, without this norm's scale and shift; no parameter has a part in it."""
        return F.layer_norm(image_embeds.float(), self.normalized_shape, eps=self.eps).to(self.weight.dtype)

    def then(self, linear: nn.Linear, standardized: Tensor) -> Tensor:
        """``linear(self(x))`` from ``standardize(x)``: scale and shift act on the weights, which are few."""
        with torch.autocast(standardized.device.type, enabled=False):
            weight, bias = linear.weight * self.weight, linear.weight @ self.bias + linear.bias
        return F.linear(standardized, weight, bias)


class Embeddings(nn.Module):
    """Word plus position embedding of text; the norm and dropout after it are shared with the queries."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def embed_text(self, input_ids: Tensor, place: Tensor | None) -> Tensor:
        """(R, L) ids → (T, D) for the tokens at ``place`` in R · L, or for all R · L of them.

        Positions start at 0 whether or not queries precede the text.
        """
        num_rows, length = input_ids.shape
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"text has {length} tokens, the Q-Former has "
                f"{self.position_embeddings.num_embeddings} position embeddings; lower max_text_len"
            )
        positions, ids = torch.arange(length, device=input_ids.device).repeat(num_rows), input_ids.flatten()
        if place is not None:
            positions, ids = positions[place], ids[place]
        return self.norm(self.word_embeddings(ids) + self.position_embeddings(positions))

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

    def keys_values(self, tokens: Tensor, layout: Layout) -> KeyValue:
        """(T, D) → keys and values of the rows, each (R, H, N, d)."""
        return (
            self._heads(layout.to_rows(self.attention.key(tokens))),
            self._heads(layout.to_rows(self.attention.value(tokens))),
        )

    def image_keys_values(self, standardized: Tensor, norm: ImageNorm) -> KeyValue:
        """Keys and values, each (B, H, P, d), of ``norm``'s output, from its ``standardize``'s (B, P, D_image)."""
        return (
            self._heads(norm.then(self.attention.key, standardized)),
            self._heads(norm.then(self.attention.value, standardized)),
        )

    def forward(
        self, tokens: Tensor, layout: Layout, blocks: Sequence[KeyValue], mask: Tensor | None = None
    ) -> Tensor:
        """Attend from ``tokens`` (T, D) to ``blocks``; returns (T, D).

        Args:
            blocks: keys and values of consecutive blocks of rows. One block of R rows is the ordinary case; several
                let rows read the same keys and values without a copy of them.
            mask: (R, 1, 1 or N, M), True where attention is allowed; for a single block only.
        """
        queries = self._heads(layout.to_rows(self.attention.query(tokens)))
        dropout = self.dropout if self.training else 0.0
        rows = torch.split(queries, [key.shape[0] for key, _ in blocks])
        attended = [
            F.scaled_dot_product_attention(row, key, value, attn_mask=mask, dropout_p=dropout)
            for row, (key, value) in zip(rows, blocks, strict=True)
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.output(layout.to_tokens(joined.transpose(1, 2).flatten(2)), tokens)

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
        tokens: Tensor,
        layout: Layout,
        mask: Tensor | None,
        image_blocks: Sequence[KeyValue],
        past: KeyValue | None,
        outputs: Outputs | None,
    ) -> tuple[Tensor, KeyValue]:
        """One layer over ``tokens`` (T, D), the queries first.

        Args:
            mask: (R, 1, 1 or N, keys), True where attention is allowed; keys are past, queries, text.
            image_blocks: cross-attention keys and values, blocks of rows; empty without an image.
            past: keys and values to put before this pass's own.
            outputs: which tokens to compute; None for all.

        Returns:
            the tokens, and the self-attention keys and values of this pass (without ``past``).
        """
        own = self.attention.keys_values(tokens, layout)
        seen = own if past is None else (torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2))
        if outputs is not None:
            tokens, layout = tokens.index_select(0, outputs.index), outputs.layout
        tokens = self.attention(tokens, layout, [seen], mask)

        num_query_tokens = layout.num_rows * layout.num_queries
        queries, text = tokens[:num_query_tokens], tokens[num_query_tokens:]
        parts = []
        if len(queries):
            if self.crossattention is not None and image_blocks:
                rows = Layout(layout.num_rows, layout.num_queries)
                queries = self.crossattention(queries, rows, image_blocks)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if len(text):
            parts.append(self.output(self.intermediate(text), text))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), own


class Encoder(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        mask: Tensor | None = None,
        contexts: Sequence[ImageContext] = (),
        past: Sequence[KeyValue] | None = None,
        outputs: Outputs | None = None,
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """All layers; see :meth:`Layer.forward`. ``outputs`` holds for the last layer."""
        cache = []
        last = len(self.layer) - 1
        for index, layer in enumerate(self.layer):
            blocks = [context.keys_values[index] for context in contexts if context.keys_values[index] is not None]
            arguments = (
                tokens,
                layout,
                mask,
                blocks,
                None if past is None else past[index],
                outputs if index == last else None,
            )
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                tokens, own = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                tokens, own = layer(*arguments)
            cache.append(own)
        return tokens, tuple(cache)


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
        self.ln_vision = ImageNorm(config.image_width, eps=config.image_norm_eps)
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
        standardized = self.ln_vision.standardize(image_embeds)
        return ImageContext(
            tuple(
                layer.crossattention and layer.crossattention.image_keys_values(standardized, self.ln_vision)
                for layer in self.encoder.layer
            )
        )

    def image_pass(self, context: ImageContext) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Queries alone: query_output (B, Q, D), and the self-attention cache that :meth:`caption_pass` reads."""
        layout = Layout(len(context), self.config.num_query_tokens, self.config.num_query_tokens)
        tokens, cache = self.encoder(self._queries(len(context)), layout, contexts=[context])
        return layout.to_rows(tokens), cache

    def text_pass(
        self, input_ids: Tensor, attention_mask: Tensor, *, cls_only: bool = False, pad_outputs: bool = False
    ) -> Tensor:
        """Text alone, both ways: (R, L, D), pads zero unless ``pad_outputs``; or the [CLS] position, (R, 1, D)."""
        layout = _text_layout(attention_mask, pad_outputs)
        tokens = self.embeddings.embed_text(input_ids, layout.place)
        outputs = Outputs(_first_tokens(layout, tokens.device), Layout(layout.num_rows, 1)) if cls_only else None
        tokens, _ = self.encoder(tokens, layout, mask=_key_mask(attention_mask), outputs=outputs)
        return (layout if outputs is None else outputs.layout).to_rows(tokens)

    def multimodal_pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *contexts: ImageContext,
        text_output: bool = False,
        pad_outputs: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and text together, both ways.

        Args:
            input_ids: (R, L).
            attention_mask: (R, L), zero at pads.
            contexts: the images, blocks of rows in order: R is the sum of their lengths. A context may stand in
                several blocks; its keys and values are neither recomputed nor copied.
            text_output: whether the text positions are wanted too.
            pad_outputs: whether pads are computed; zero without.

        Returns:
            query_output (R, Q, D), and the text positions (R, L, D) or None.
        """
        num_rows, num_queries = sum(len(context) for context in contexts), self.config.num_query_tokens
        check_shape(input_ids, "R L", name="input_ids", R=num_rows)
        text = _text_layout(attention_mask, pad_outputs)
        layout = _after_queries(text, num_queries, input_ids.device)
        tokens = torch.cat([self._queries(num_rows), self.embeddings.embed_text(input_ids, text.place)])
        queries = Layout(num_rows, num_queries, num_queries)
        num_query_tokens = num_rows * num_queries
        tokens, _ = self.encoder(
            tokens,
            layout,
            mask=_key_mask(attention_mask, num_before=num_queries),
            contexts=contexts,
            outputs=None if text_output else Outputs(torch.arange(num_query_tokens, device=tokens.device), queries),
        )
        return (
            queries.to_rows(tokens[:num_query_tokens]),
            text.to_rows(tokens[num_query_tokens:]) if text_output else None,
        )

    def caption_pass(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Sequence[KeyValue], *, pad_outputs: bool = False
    ) -> Tensor:
        """Text that sees all queries of ``cache`` and its own past: (B, L, D), with [DEC] in place of [CLS].

        Pads are zero unless ``pad_outputs``. The cache is :meth:`image_pass`'s and not detached: captioning trains
        queries and cross-attention through it.
        """
        num_tokens = input_ids.shape[1]
        ids = torch.cat([torch.full_like(input_ids[:, :1], self.config.dec_token_id), input_ids[:, 1:]], 1)
        past = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=ids.device).tril()
        mask = _key_mask(attention_mask) & past  # B 1 L L
        to_queries = mask.new_ones(()).expand(*mask.shape[:3], self.config.num_query_tokens)
        layout = _text_layout(attention_mask, pad_outputs)
        tokens, _ = self.encoder(
            self.embeddings.embed_text(ids, layout.place),
            layout,
            mask=torch.cat([to_queries, mask], 3),
            past=cache,
        )
        return layout.to_rows(tokens)

    def lm_logits(self, text_output: Tensor) -> Tensor:
        """Scores of the next token, (…, V), for the positions of :meth:`caption_pass`."""
        return self.lm_head(text_output, self.embeddings.word_embeddings.weight)

    def _queries(self, num_rows: int) -> Tensor:
        """(R · Q, D)."""
        return self.embeddings.norm(self.query_tokens.expand(num_rows, -1, -1)).flatten(0, 1)


def _key_mask(attention_mask: Tensor, num_before: int = 0) -> Tensor:
    """(R, L) of ones and zeros → (R, 1, 1, num_before + L), True where a key may be read."""
    return F.pad(attention_mask.bool(), (num_before, 0), value=True)[:, None, None, :]


def _text_layout(attention_mask: Tensor, pad_outputs: bool) -> Layout:
    """Rows of text (R, L); the list holds what is no pad, or everything."""
    num_rows, length = attention_mask.shape
    place = torch.arange(num_rows * length, device=attention_mask.device)
    if not pad_outputs:
        place = place[attention_mask.flatten().bool()]
    return Layout(num_rows, length, place=None if len(place) == num_rows * length else place)


def _after_queries(text: Layout, num_queries: int, device: torch.device) -> Layout:
    """The rows of ``text`` with queries before it."""
    num_positions = num_queries + text.num_positions
    rows = torch.arange(text.num_rows, device=device)[:, None] * num_positions
    queries = rows + torch.arange(num_queries, device=device)
    tokens = rows + torch.arange(num_queries, num_positions, device=device)
    tokens = tokens.flatten() if text.place is None else tokens.flatten()[text.place]
    return Layout(text.num_rows, num_positions, num_queries, torch.cat([queries.flatten(), tokens]))


def _first_tokens(text: Layout, device: torch.device) -> Tensor:
    """(R,): each row's first position in the list; it is [CLS], never a pad."""
    first = torch.arange(text.num_rows, device=device) * text.num_positions
    return first if text.place is None else torch.searchsorted(text.place, first)
