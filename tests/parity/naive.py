"""Stage 1 written down once more, as plainly as possible: one row, one head, one token list at a time, in float64.

Nothing is shared, padded, masked by tricks or batched, and nothing is imported from the package; the rules are those of
LAVIS ``blip2_qformer.py`` and ``Qformer.py``. Weights come by our parameter names. Several processes are a list of
local batches: their gathered features are detached, their losses averaged, which is what DDP does to gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rank:
    """One process's batch: image features (P, W) and token ids of each row (no pads), ids of images, negatives."""

    images: list[Tensor]
    texts: list[list[int]]
    image_ids: list[int]
    negative_image: list[int]
    negative_text: list[int]


class Naive:
    def __init__(self, weights: dict[str, Tensor], config, label_smoothing: float) -> None:
        self.weights, self.config, self.label_smoothing = weights, config, label_smoothing

    # ---- pieces ----

    def linear(self, name: str, states: Tensor) -> Tensor:
        return states @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, states: Tensor, eps: float) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def bert_norm(self, name: str, states: Tensor) -> Tensor:
        return self.norm(f"qformer.{name}", states, self.config.layer_norm_eps)

    def attend(self, name: str, states: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        queries = self.linear(f"qformer.{name}.attention.query", states)
        size = self.config.hidden_size // self.config.num_attention_heads
        outputs = []
        for head in range(self.config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            scores = queries[:, part] @ keys[:, part].T / math.sqrt(size)
            scores = scores.masked_fill(~allowed, -math.inf)
            outputs.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ values[:, part])
        dense = self.linear(f"qformer.{name}.output.dense", torch.cat(outputs, 1))
        return self.bert_norm(f"{name}.output.LayerNorm", dense + states)

    def feed_forward(self, name: str, suffix: str, states: Tensor) -> Tensor:
        inner = self.linear(f"qformer.{name}.intermediate{suffix}.dense", states)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        dense = self.linear(f"qformer.{name}.output{suffix}.dense", inner)
        return self.bert_norm(f"{name}.output{suffix}.LayerNorm", dense + states)

    def run(self, text: list[int], image: Tensor | None, causal: bool = False, past=None, queries: bool = True):
        """(query states, text states, keys and values of each layer) of one row."""
        num_queries = self.config.num_query_tokens if queries else 0
        words = self.weights["qformer.embeddings.word_embeddings.weight"][text]
        words = words + self.weights["qformer.embeddings.position_embeddings.weight"][: len(text)]
        states = torch.cat([self.weights["qformer.query_tokens"][0][:num_queries], words])
        states = self.bert_norm("embeddings.LayerNorm", states)
        cache = []
        for index in range(self.config.num_hidden_layers):
            name = f"encoder.layer.{index}"
            keys = self.linear(f"qformer.{name}.attention.attention.key", states)
            values = self.linear(f"qformer.{name}.attention.attention.value", states)
            cache.append((keys, values))
            if past is not None:
                keys, values = torch.cat([past[index][0], keys]), torch.cat([past[index][1], values])
            allowed = torch.ones(len(states), len(keys), dtype=torch.bool)
            if causal:
                before = len(keys) - len(states)
                for row in range(len(states)):
                    allowed[row, before + row + 1 :] = False
            states = self.attend(f"{name}.attention", states, keys, values, allowed)
            seen, read = states[:num_queries], states[num_queries:]
            if num_queries:
                if image is not None and index % self.config.cross_attention_freq == 0:
                    name_cross = f"{name}.crossattention"
                    seen = self.attend(
                        name_cross,
                        seen,
                        self.linear(f"qformer.{name_cross}.attention.key", image),
                        self.linear(f"qformer.{name_cross}.attention.value", image),
                        torch.ones(num_queries, len(image), dtype=torch.bool),
                    )
                seen = self.feed_forward(name, "_query", seen)
            if len(read):
                read = self.feed_forward(name, "", read)
            states = torch.cat([seen, read])
        return states[:num_queries], states[num_queries:], cache

    # ---- the step ----

    def losses(self, ranks: list[Rank]) -> list[dict[str, Tensor]]:
        """ITC, ITM and LM loss of each process."""
        unit = torch.nn.functional.normalize
        everything = []
        for rank in ranks:
            normed = [self.norm("qformer.ln_vision", image, self.config.image_norm_eps) for image in rank.images]
            seen = [self.run([], image) for image in normed]
            text = [self.run(text, None, queries=False)[1][0] for text in rank.texts]
            image_feats = [unit(self.linear("heads.vision_proj", queries), dim=-1) for queries, _, _ in seen]
            text_feats = [unit(self.linear("heads.text_proj", state), dim=-1) for state in text]
            everything.append((normed, [cache for _, _, cache in seen], image_feats, text_feats))
        images = [image for normed, _, _, _ in everything for image in normed]  # with gradient, as LAVIS gathers them
        texts = [text for rank in ranks for text in rank.texts]
        ids = [number for rank in ranks for number in rank.image_ids]
        all_image_feats = [feats.detach() for _, _, image_feats, _ in everything for feats in image_feats]
        all_text_feats = [feats.detach() for _, _, _, text_feats in everything for feats in text_feats]
        found = []
        for rank, (normed, caches, image_feats, text_feats) in zip(ranks, everything, strict=True):
            found.append(
                {
                    "itc": self.itc(rank, ids, image_feats, text_feats, all_image_feats, all_text_feats),
                    "itm": self.itm(rank, normed, images, texts),
                    "itg": self.itg(rank, caches),
                }
            )
        return found

    def itc(self, rank, ids, image_feats, text_feats, all_image_feats, all_text_feats) -> Tensor:
        temperature = self.weights["heads.temperature"]
        losses = []
        for row, own in enumerate(rank.image_ids):
            matches = torch.tensor([float(number == own) for number in ids], dtype=torch.float64)
            targets = (1 - self.label_smoothing) * matches / matches.sum() + self.label_smoothing / len(ids)
            i2t = torch.stack([(image_feats[row] @ text).max() for text in all_text_feats]) / temperature
            t2i = torch.stack([(image @ text_feats[row]).max() for image in all_image_feats]) / temperature
            losses += [-(targets * scores.log_softmax(0)).sum() for scores in (i2t, t2i)]
        return torch.stack(losses).mean()

    def itm(self, rank, normed, images, texts) -> Tensor:
        losses = []
        for row, (image, text) in enumerate(zip(normed, rank.texts, strict=True)):
            for one, other, label in (
                (image, text, 1),
                (images[rank.negative_image[row]], text, 0),
                (image, texts[rank.negative_text[row]], 0),
            ):
                logits = self.linear("heads.itm_head", self.run(other, one)[0]).mean(0)
                losses.append(-logits.log_softmax(0)[label])
        return torch.stack(losses).mean()

    def itg(self, rank, caches) -> Tensor:
        losses = []
        for text, cache in zip(rank.texts, caches, strict=True):
            ids = [self.config.vocab_size - 1, *text[1:]]
            states = self.run(ids, None, causal=True, past=cache, queries=False)[1]
            states = self.linear("qformer.lm_head.dense", states)
            states = self.bert_norm("lm_head.LayerNorm", states * 0.5 * (1 + torch.erf(states / math.sqrt(2))))
            words = self.weights["qformer.embeddings.word_embeddings.weight"]
            scores = (states @ words.T + self.weights["qformer.lm_head.bias"]).log_softmax(1)
            for position, target in enumerate(text[1:]):
                own, others = scores[position, target], scores[position].mean()
                losses.append(-(1 - self.label_smoothing) * own - self.label_smoothing * others)
        return torch.stack(losses).mean()
