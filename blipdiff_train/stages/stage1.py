"""Stage 1: the Q-Former learns to speak of images — contrast (ITC), matching (ITM) and captioning (ITG).

Source: BLIP-Diffusion §3.1 and BLIP-2 (arXiv 2301.12597) §3.1; salesforce/LAVIS
``lavis/models/blip2_models/blip2_qformer.py`` (``Blip2Qformer.forward``).
Letters: B local batch, G batch over all processes, Q queries, L text tokens, P patches, D width.

Deliberate differences from LAVIS, beyond those listed in ``models.qformer`` and ``losses``:

* Works without a process group and at batch 1.
* Image keys and values are shared by the three losses; across processes only the negative images that come from
  elsewhere are encoded, from the frozen tower's output gathered without gradient. LAVIS gathers ``ln_vision``'s output
  with gradient and sends it back to the image's own process: after DDP's averaging the two gradients are the same.
* Captions that read the same are no negatives of each other, and a sample without a negative is left out of the
  matching loss (``mask_same_caption=False`` is LAVIS in both).
* Text is padded to the longest caption of the batch.
* Dropout and the draw of negatives come from (seed, step, rank), so that an interrupted run repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor

from blipdiff_train.common import distributed, rng
from blipdiff_train.losses.captioning import CaptioningResult, itg_loss, predicting_positions
from blipdiff_train.losses.contrastive import itc_loss, positive_pairs, recall_at_k, similarities
from blipdiff_train.losses.matching import (
    MatchingResult,
    inadmissible_negatives,
    itm_loss,
    negative_weights,
    sample_hard_negatives,
)
from blipdiff_train.models.ema import ParameterAverage
from blipdiff_train.models.freezing import keep_frozen_in_eval, set_trainable
from blipdiff_train.models.qformer import ImageContext
from blipdiff_train.stages.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blipdiff_train.data.samples import Stage1Batch
    from blipdiff_train.models.alignment import AlignmentHeads
    from blipdiff_train.models.image_encoder import ImageEncoder
    from blipdiff_train.models.qformer import QFormer

LOSSES = ("itc", "itm", "itg")


@dataclass
class Stage1Outputs:
    """All that one step computes, under the names of the glossary; losses are unweighted fp32 scalars."""

    loss_itc: Tensor
    itm: MatchingResult
    itg: CaptioningResult
    query_output: Tensor  # B Q D, image pass
    text_cls: Tensor  # B D, text pass
    image_feats: Tensor  # B Q E
    text_feats: Tensor  # B E
    sim_i2t: Tensor  # B G
    sim_t2i: Tensor  # B G
    weights_i2t: Tensor  # B G, which text is a negative of each image
    weights_t2i: Tensor  # B G, which image is a negative of each text
    negative_image: Tensor  # B, into G
    negative_text: Tensor  # B, into G
    itm_exists: Tensor  # 3B, False where a row has no admissible negative
    itm_query_output: Tensor  # 3B Q D: own pairs, negative images, negative texts
    itm_logits: Tensor  # 3B 2
    itg_logits: Tensor  # N V, of the N positions that predict a token

    @property
    def losses(self) -> dict[str, Tensor]:
        return {"itc": self.loss_itc, "itm": self.itm.loss, "itg": self.itg.loss}


class Stage1Module(LightningModule):
    """Trains the Q-Former and the alignment heads on images and captions.

    Args:
        image_encoder: the frozen tower.
        qformer, heads: what trains.
        tokenizer: BERT WordPiece; its vocabulary and [DEC] are the Q-Former's rows.
        total_steps: optimizer steps of the whole run; the schedule's length.
        seed: of dropout and negatives.
        max_text_len: captions are cut to this many tokens.
        loss_weights: factor of each loss in the total; one of ``itc``, ``itm``, ``itg`` left out counts 1.
        label_smoothing: of ITC and ITG; ITM has none.
        mask_same_caption: whether pairs whose captions read the same are kept out of the ITM negatives, and samples
            without a negative out of the ITM loss; False is the reference's draw.
        lr, min_lr, warmup_steps, warmup_lr, schedule: see ``stages.optim.learning_rate``.
        weight_decay, betas, eps: of AdamW.
        trainable: patterns on parameter names; what matches none of them is frozen.
        gradient_checkpointing: recompute the Q-Former's layers in the backward pass.
        ema_decay: of the averaged weights, see ``stages.callbacks.Averaging``; None keeps none.

    Attributes:
        trainable_report: what trains and what does not, with counts.
        ema: the averaged weights, or None.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        qformer: QFormer,
        heads: AlignmentHeads,
        tokenizer: PreTrainedTokenizerBase,
        *,
        total_steps: int,
        seed: int = 0,
        max_text_len: int = 32,
        loss_weights: dict[str, float] | None = None,
        label_smoothing: float = 0.1,
        mask_same_caption: bool = True,
        lr: float = 1e-4,
        min_lr: float = 1e-5,
        warmup_steps: int = 0,
        warmup_lr: float = 1e-6,
        schedule: str = "cosine",
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        trainable: Sequence[str] = ("qformer.*", "heads.*"),
        gradient_checkpointing: bool = False,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(loss_weights or {}) - set(LOSSES))
        if unknown:
            raise ValueError(f"loss_weights has {', '.join(unknown)}; stage 1's losses are {', '.join(LOSSES)}")
        if max_text_len > qformer.config.max_position_embeddings:
            raise ValueError(
                f"max_text_len={max_text_len} exceeds the Q-Former's "
                f"{qformer.config.max_position_embeddings} position embeddings"
            )
        if len(tokenizer) > qformer.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the Q-Former {qformer.config.vocab_size} rows ([DEC] "
                "included): they do not belong together"
            )
        self.image_encoder = image_encoder
        self.qformer = qformer
        self.heads = heads
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_text_len = max_text_len
        self.loss_weights = dict.fromkeys(LOSSES, 1.0) | dict(loss_weights or {})
        self.label_smoothing = label_smoothing
        self.mask_same_caption = mask_same_caption
        self.optimizer_arguments = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        self.schedule_arguments = {
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "total_steps": total_steps,
            "warmup_lr": warmup_lr,
            "min_lr": min_lr,
        }
        qformer.set_gradient_checkpointing(gradient_checkpointing)
        self.trainable_report = set_trainable(self, trainable, without_gradient=("image_encoder.",))
        self.ema = None if ema_decay is None else ParameterAverage(self.named_parameters(), ema_decay)
        self._validation = self._new_record()

    # ---- one step ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Stage1Batch, batch_idx: int) -> Tensor:
        step, rank = self.micro_step(batch), distributed.rank()
        torch.manual_seed(rng.derive_seed(self.seed, "dropout", step, rank))
        image_embeds = self.image_encoder(batch.image)  # B P D_image, no gradient
        input_ids, attention_mask = self.tokenize(batch.caption)  # B L
        generator = rng.torch_generator(self.seed, "itm", step, 0)
        outputs = self(image_embeds, input_ids, attention_mask, batch.image_id, generator=generator)
        return self.log_and_sum(outputs, len(batch))

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_id: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        across_ranks: bool = True,
    ) -> Stage1Outputs:
        """The three losses of one local batch.

        Args:
            image_embeds: (B, P, D_image) of the frozen tower.
            input_ids, attention_mask: (B, L) tokens with [CLS] and [SEP], pads on the right.
            image_id: (B,), equal id = same image; None where every image is its own.
            generator: draws the negatives; on the CPU, and in the same state on every process.
            negatives: image and text indices (B,) into the G pairs, in place of a draw.
            across_ranks: whether contrast and negatives span all processes, which must then hold the same B.
        """
        gather = distributed.gather_no_grad if across_ranks else Tensor.detach
        rank, world_size = (distributed.rank(), distributed.world_size()) if across_ranks else (0, 1)
        num_rows = image_embeds.shape[0]

        # images and texts apart; the images' keys and values and the queries' cache serve all that follows
        context = self.qformer.encode_images(image_embeds)
        query_output, query_cache = self.qformer.image_pass(context)
        text_cls = self.qformer.text_pass(input_ids, attention_mask, cls_only=True)[:, 0]

        # ITC: local against all
        image_feats, text_feats = self.heads.image_feats(query_output), self.heads.text_feats(text_cls)
        sim_i2t, sim_t2i = similarities(
            image_feats, text_feats, gather(image_feats), gather(text_feats), self.heads.temperature
        )
        image_id_all = None if image_id is None else gather(image_id)
        positives = positive_pairs(num_rows, num_rows * world_size, rank, image_id, image_id_all).to(sim_i2t.device)
        loss_itc = itc_loss(sim_i2t, sim_t2i, positives, label_smoothing=self.label_smoothing)

        # ITM: each pair, its text with a hard negative image, its image with a hard negative text
        ids_all, mask_all = ids_own, mask_own = (
            input_ids * attention_mask,
            attention_mask,
        )  # pads alike, for `same_text`
        if world_size > 1:
            ids_all, mask_all = self.gather_text(ids_own, mask_own)
            ids_own, mask_own = _pad_to(ids_own, ids_all.shape[1]), _pad_to(mask_own, ids_all.shape[1])
        same_text = (ids_own[:, None] == ids_all[None]).all(-1) if self.mask_same_caption else None
        inadmissible = inadmissible_negatives(positives, same_text)
        draw_anyway = not self.mask_same_caption
        weights_t2i = negative_weights(sim_t2i, inadmissible, draw_anyway=draw_anyway)
        weights_i2t = negative_weights(sim_i2t, inadmissible, draw_anyway=draw_anyway)
        has_negative = (~inadmissible).any(1) | draw_anyway
        if negatives is None:
            own = {"first_row": rank * num_rows, "num_rows": world_size * num_rows}
            negative_image = sample_hard_negatives(weights_t2i, generator, **own)
            negative_text = sample_hard_negatives(weights_i2t, generator, **own)
        else:
            negative_image, negative_text = negatives
        itm_query_output, _ = self.qformer.multimodal_pass(
            torch.cat([ids_own, ids_own, ids_all[negative_text]]),
            torch.cat([mask_own, mask_own, mask_all[negative_text]]),
            context,
            self.negative_context(context, image_embeds, negative_image, rank, world_size),
            context,
        )
        itm_logits = self.heads.match_logits(itm_query_output)
        labels = torch.arange(3 * num_rows, device=itm_logits.device).lt(num_rows).long()
        itm_exists = torch.cat([torch.ones_like(has_negative), has_negative, has_negative])
        itm = itm_loss(itm_logits, labels, itm_exists)

        # ITG: the caption from the cached queries
        predicting = predicting_positions(attention_mask)  # B L−1
        text_output = self.qformer.caption_pass(input_ids, attention_mask, query_cache)
        itg_logits = self.qformer.lm_logits(text_output[:, :-1][predicting])
        itg = itg_loss(itg_logits, input_ids[:, 1:][predicting], label_smoothing=self.label_smoothing)

        return Stage1Outputs(
            loss_itc=loss_itc,
            itm=itm,
            itg=itg,
            query_output=query_output,
            text_cls=text_cls,
            image_feats=image_feats,
            text_feats=text_feats,
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            weights_i2t=weights_i2t,
            weights_t2i=weights_t2i,
            negative_image=negative_image,
            negative_text=negative_text,
            itm_exists=itm_exists,
            itm_query_output=itm_query_output,
            itm_logits=itm_logits,
            itg_logits=itg_logits,
        )

    def negative_context(
        self, context: ImageContext, image_embeds: Tensor, negative_image: Tensor, rank: int, world_size: int
    ) -> ImageContext:
        """Keys and values of the negative images (B): own ones reused, those of other processes computed here."""
        if world_size == 1:
            return context.select(negative_image)
        num_rows = len(context)
        image_embeds_all = distributed.gather_no_grad(image_embeds)  # G P D_image, frozen: no gradient to send back
        row = negative_image - rank * num_rows
        remote = (row < 0) | (row >= num_rows)
        # also with no remote image at all: every process then runs the same operations
        remote_context = self.qformer.encode_images(image_embeds_all[negative_image[remote]])
        return context.joined(remote_context).select(torch.where(remote, num_rows + remote.cumsum(0) - 1, row))

    def log_and_sum(self, outputs: Stage1Outputs, num_samples: int) -> Tensor:
        """Log the unweighted losses and their weighted total, and return the total: what is logged is what trains."""
        loss = sum(self.loss_weights[name] * value for name, value in outputs.losses.items())
        values = {f"train/loss_{name}": value.detach() for name, value in outputs.losses.items()}
        values |= {
            "train/itm_accuracy": outputs.itm.accuracy,
            "train/itm_baseline": outputs.itm.baseline,
            "train/itg_accuracy": outputs.itg.token_accuracy,
            "train/temperature": self.heads.temperature.detach().clone(),
        }
        self.log_dict(values, batch_size=num_samples)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=num_samples)
        return loss

    def micro_step(self, batch: Stage1Batch) -> int:
        """How many batches every process has seen before this one, from the batch's place in the global order."""
        return int(batch.positions[0]) // (len(batch) * distributed.world_size())

    # ---- text ----------------------------------------------------------------------------------------------------

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, (B, L) each, L the longest of the batch and at most ``max_text_len``."""
        tokens = self.tokenizer(
            list(captions),
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_text_len,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)

    def gather_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Every process's texts (G, L), cut to the longest of them all; processes may come with different L."""
        length = max(self.max_text_len, input_ids.shape[1])
        mask_all = distributed.gather_no_grad(_pad_to(attention_mask, length))
        ids_all = distributed.gather_no_grad(_pad_to(input_ids, length))
        longest = int(mask_all.sum(1).max())
        return ids_all[:, :longest], mask_all[:, :longest]

    # ---- validation ----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._validation = self._new_record()

    def validation_step(self, batch: Stage1Batch, batch_idx: int) -> None:
        """Losses and accuracies with negatives from within the batch (processes may hold unequal batches)."""
        image_embeds = self.image_encoder(batch.image)
        input_ids, attention_mask = self.tokenize(batch.caption)
        generator = rng.torch_generator(self.seed, "itm-validation", int(batch.positions[0]))
        outputs = self(image_embeds, input_ids, attention_mask, batch.image_id, generator=generator, across_ranks=False)
        self._validation.add(outputs, batch)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._validation.metrics(), batch_size=1)
        self._validation = self._new_record()

    def _new_record(self) -> ValidationRecord:
        return ValidationRecord(self.qformer.config.num_query_tokens, self.heads.text_proj.out_features, self.device)

    # ---- optimization --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.named_parameters(), **self.optimizer_arguments)
        schedule = build_schedule(optimizer, **self.schedule_arguments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train(self, mode: bool = True) -> Stage1Module:
        super().train(mode)
        keep_frozen_in_eval(self)
        return self


class ValidationRecord:
    """Sums and features of one pass over the validation set; :meth:`metrics` joins all processes.

    Args:
        num_queries, embed_dim: Q and E of the features.
        device: where the sums live.
    """

    NAMES = ("loss_itc", "loss_itm", "loss_itg", "itm_accuracy", "itm_baseline", "itg_accuracy")

    def __init__(self, num_queries: int, embed_dim: int, device: torch.device) -> None:
        self.totals = torch.zeros(len(self.NAMES), 2, device=device)  # sum of value · count, sum of counts
        # an empty row each: a process without a single batch joins in the gathers all the same
        self.image_feats = [torch.zeros(0, num_queries, embed_dim, device=device)]
        self.text_feats = [torch.zeros(0, embed_dim, device=device)]
        self.image_id = [torch.zeros(0, dtype=torch.int64, device=device)]
        self.position = [torch.zeros(0, dtype=torch.int64, device=device)]

    def add(self, outputs: Stage1Outputs, batch: Stage1Batch) -> None:
        """Take in one batch. A value counts as often as it has pairs (ITC), matched rows (ITM) or tokens (ITG)."""
        num_pairs = outputs.loss_itc.new_tensor(len(batch))
        num_matched, num_tokens = outputs.itm_exists.sum(), outputs.itg.num_tokens
        values = torch.stack(
            [
                outputs.loss_itc,
                outputs.itm.loss,
                outputs.itg.loss,
                outputs.itm.accuracy,
                outputs.itm.baseline,
                outputs.itg.token_accuracy,
            ]
        )
        counts = torch.stack([num_pairs, num_matched, num_tokens, num_matched, num_matched, num_tokens])
        self.totals += torch.stack([values * counts, counts], 1)
        self.image_feats.append(outputs.image_feats)
        self.text_feats.append(outputs.text_feats)
        self.image_id.append(batch.image_id.to(outputs.image_feats.device))
        self.position.append(batch.positions.to(outputs.image_feats.device))

    def metrics(self) -> dict[str, float]:
        """``val/…``: means of losses and accuracies, and recall both ways among all pairs; {} without any."""
        sums, counts = distributed.gather_no_grad(self.totals[None]).sum(0).unbind(1)
        if not counts.all():
            return {}
        metrics = {f"val/{name}": float(value) for name, value in zip(self.NAMES, sums / counts, strict=True)}
        metrics["val/loss"] = sum(metrics[f"val/loss_{name}"] for name in LOSSES)
        image_feats, text_feats, image_id, position = (
            _gather_rows(torch.cat(rows)) for rows in (self.image_feats, self.text_feats, self.image_id, self.position)
        )
        # processes may have been given a sample twice to even out their batches: rank each once
        first = _first_occurrences(position)
        image_feats, text_feats, image_id = image_feats[first], text_feats[first], image_id[first]
        one = torch.ones((), device=image_feats.device)
        sim_i2t, sim_t2i = similarities(image_feats, text_feats, image_feats, text_feats, one)
        same_image = image_id[:, None] == image_id[None, :]
        for direction, scores in (("i2t", sim_i2t), ("t2i", sim_t2i)):
            for k, recall in recall_at_k(scores, same_image).items():
                metrics[f"val/{direction}_r{k}"] = recall
        return metrics


def _pad_to(tokens: Tensor, length: int) -> Tensor:
    """(B, L) → (B, length) with zeros on the right; masked there, so any id would do."""
    return F.pad(tokens, (0, length - tokens.shape[1]))


def _first_occurrences(values: Tensor) -> Tensor:
    """Indices of the first occurrence of each value, ascending."""
    order = torch.argsort(values, stable=True)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = values[order][1:] != values[order][:-1]
    return order[is_first].sort().values


def _gather_rows(rows: Tensor) -> Tensor:
    """Concatenate (N_rank, …) of all processes, whose N may differ."""
    if distributed.world_size() == 1:
        return rows
    counts = distributed.gather_no_grad(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = distributed.gather_no_grad(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
