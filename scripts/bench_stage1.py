"""How much sharing the image keys saves: one stage-1 step, forward and backward, ours against a plain version of it.

The plain version is the same mathematics on the same modules as LAVIS arranges it: cross-attention keys and values are
computed anew for every row of every pass, text is padded to the full length, and all positions of all layers are
computed. Sizes are the real ones: BERT-base, 257 patches of width 1024, 16 queries, captions of 8 to 20 tokens. The two
run in turn, so that other work on the machine hits both alike; the median ratio of the pairs is printed.

    python scripts/bench_stage1.py --pairs 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer

from blipdiff_train.common.rng import torch_generator
from blipdiff_train.losses.captioning import itg_loss
from blipdiff_train.losses.contrastive import itc_loss, positive_pairs, similarities
from blipdiff_train.losses.matching import itm_loss, negative_weights, sample_hard_negatives
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.qformer import ImageContext, QFormer, QFormerConfig
from blipdiff_train.stages.stage1 import Stage1Module

MAX_TEXT_LEN = 32


def plain_context(qformer: QFormer, normed: Tensor) -> ImageContext:
    """Keys and values of ``normed`` (R, P, D_image), computed here and now."""
    layers = (layer.crossattention for layer in qformer.encoder.layer)
    return ImageContext(tuple(None if cross is None else cross.keys_values(normed) for cross in layers))


def plain_step(module: Stage1Module, image_embeds: Tensor, ids: Tensor, mask: Tensor, seed: int) -> dict[str, Tensor]:
    """The step of ``Stage1Module.forward`` without anything shared, in one process."""
    qformer, heads, num_rows = module.qformer, module.heads, len(ids)
    ids, mask = (F.pad(tensor, (0, MAX_TEXT_LEN - ids.shape[1])) for tensor in (ids, mask))
    normed = qformer.ln_vision(image_embeds)
    query_output, cache = qformer.image_pass(plain_context(qformer, normed))
    text_cls = qformer.text_pass(ids, mask)[:, 0]
    image_feats, text_feats = heads.image_feats(query_output), heads.text_feats(text_cls)
    sims = similarities(image_feats, text_feats, image_feats.detach(), text_feats.detach(), heads.temperature)
    positives = positive_pairs(num_rows, num_rows, 0)
    generator = torch_generator(seed, "itm", 0, 0)
    negative_image = sample_hard_negatives(negative_weights(sims[1], positives), generator)
    negative_text = sample_hard_negatives(negative_weights(sims[0], positives), generator)
    itm_output, _ = qformer.multimodal_pass(
        torch.cat([ids, ids, ids[negative_text]]),
        torch.cat([mask, mask, mask[negative_text]]),
        plain_context(qformer, torch.cat([normed, normed[negative_image], normed])),
        text_output=True,
    )
    logits = heads.match_logits(itm_output)
    labels = torch.arange(3 * num_rows).lt(num_rows).long()
    itg_logits = qformer.lm_logits(qformer.caption_pass(ids, mask, cache, pad_outputs=True))
    return {
        "itc": itc_loss(*sims, positives, label_smoothing=0.1),
        "itm": itm_loss(logits, labels, torch.ones(3 * num_rows, dtype=torch.bool)).loss,
        "itg": itg_loss(itg_logits, ids, mask, label_smoothing=0.1).loss,
    }


def shared_step(module: Stage1Module, image_embeds: Tensor, ids: Tensor, mask: Tensor, seed: int) -> dict[str, Tensor]:
    """Ours."""
    return module(image_embeds, ids, mask, generator=torch_generator(seed, "itm", 0, 0)).losses


def seconds(step, module: Stage1Module, inputs: tuple[Tensor, ...], seed: int) -> tuple[float, float]:
    """Time of one step, forward and backward: by the clock, and on the processors, which other work disturbs less."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    clock, processors = time.perf_counter(), time.process_time()
    sum(step(module, *inputs, seed).values()).backward()
    return time.perf_counter() - clock, time.process_time() - processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each version")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patches", type=int, default=257)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    qformer = QFormer(QFormerConfig(num_hidden_layers=arguments.layers))
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    module = Stage1Module(
        nn.Identity(),
        qformer,
        AlignmentHeads(qformer.config.hidden_size),
        tokenizer,
        total_steps=1,
        max_text_len=MAX_TEXT_LEN,
        mask_same_caption=False,
    ).train()
    lengths = torch.randint(8, 21, (arguments.batch,))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, 30000, mask.shape) * mask
    inputs = (torch.randn(arguments.batch, arguments.patches, qformer.config.image_width), ids, mask)

    # the two are the same function: without dropout they give the same losses
    with torch.no_grad():
        module.eval()
        pairs = zip(plain_step(module, *inputs, 0).values(), shared_step(module, *inputs, 0).values(), strict=True)
        difference = max((a - b).abs().item() for a, b in pairs)
        module.train()
    print(f"captions of {lengths.tolist()} tokens; losses differ by {difference:.1e}; {arguments.threads} threads")

    ratios = []
    for number in range(arguments.pairs):
        plain = seconds(plain_step, module, inputs, number)
        shared = seconds(shared_step, module, inputs, number)
        ratios.append(tuple(a / b for a, b in zip(plain, shared, strict=True)))
        print(
            f"pair {number}: plain {plain[0]:.2f} s ({plain[1]:.2f} s of processor), "
            f"shared {shared[0]:.2f} s ({shared[1]:.2f} s), ratio {ratios[-1][0]:.2f} ({ratios[-1][1]:.2f})",
            flush=True,
        )
    clock, processors = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"median ratio {clock:.2f} by the clock, {processors:.2f} of processor time")


if __name__ == "__main__":
    main()
