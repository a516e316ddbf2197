"""How much stage 1 saves by sharing the images' keys and values: one step, forward and backward, three ways.

* *plain*: the same mathematics on the same modules as LAVIS arranges it. Cross-attention keys and values are computed
  anew for every row of every pass, text is padded to the full length, and all positions of all layers are computed.
* *shared*: the plain version, but keys and values are computed once per image and layer, and nothing else is spared.
* *ours*: the step that trains. It shares, skips pads and outputs that nobody reads, and forms no gradient of the frozen
  image features.

Sizes are the real ones: BERT-base, 257 patches of width 1024, 16 queries, captions of 8 to 20 tokens. The versions run
in turn, so that other work on the machine hits all alike. Time is the processor's, which other work disturbs less than
the clock; the ratios to *plain* of the same round are summarised by median and range.

    python scripts/bench_stage1.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer

from blipdiff_train.common.rng import torch_generator
from blipdiff_train.losses.contrastive import itc_loss, positive_pairs, similarities
from blipdiff_train.losses.matching import itm_loss, negative_weights, sample_hard_negatives
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.qformer import ImageContext, Layout, QFormer, QFormerConfig
from blipdiff_train.stages.stage1 import Stage1Module

MAX_TEXT_LEN = 32

Step = Callable[[Stage1Module, Tensor, Tensor, Tensor, int], dict[str, Tensor]]


def plain_context(qformer: QFormer, normed: Tensor) -> ImageContext:
    """Keys and values of ``normed`` (R, P, D_image), computed here and now."""
    layout = Layout(*normed.shape[:2])
    crosses = [layer.crossattention for layer in qformer.encoder.layer]
    return ImageContext(tuple(cross and cross.keys_values(normed.flatten(0, 1), layout) for cross in crosses))


def plain_step(
    module: Stage1Module, image_embeds: Tensor, ids: Tensor, mask: Tensor, seed: int, share: bool = False
) -> dict[str, Tensor]:
    """The step of ``Stage1Module.forward`` without anything spared, in one process."""
    qformer, heads, num_rows = module.qformer, module.heads, len(ids)
    ids, mask = (F.pad(tensor, (0, MAX_TEXT_LEN - ids.shape[1])) for tensor in (ids, mask))
    normed = qformer.ln_vision(image_embeds)
    own = plain_context(qformer, normed)
    query_output, cache = qformer.image_pass(own)
    text_cls = qformer.text_pass(ids, mask, pad_outputs=True)[:, 0]
    image_feats, text_feats = heads.image_feats(query_output), heads.text_feats(text_cls)
    sims = similarities(image_feats, text_feats, image_feats.detach(), text_feats.detach(), heads.temperature)
    positives = positive_pairs(num_rows, num_rows, 0)
    generator = torch_generator(seed, "itm", 0, 0)
    negative_image = sample_hard_negatives(negative_weights(sims[1], positives), generator)
    negative_text = sample_hard_negatives(negative_weights(sims[0], positives), generator)
    if share:
        contexts = [own, own.select(negative_image), own]
    else:
        contexts = [plain_context(qformer, torch.cat([normed, normed[negative_image], normed]))]
    itm_output, _ = qformer.multimodal_pass(
        torch.cat([ids, ids, ids[negative_text]]),
        torch.cat([mask, mask, mask[negative_text]]),
        *contexts,
        text_output=True,
        pad_outputs=True,
    )
    labels = torch.arange(3 * num_rows).lt(num_rows).long()
    itg_logits = qformer.lm_logits(qformer.caption_pass(ids, mask, cache, pad_outputs=True))
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return {
        "itc": itc_loss(*sims, positives, label_smoothing=0.1),
        "itm": itm_loss(heads.match_logits(itm_output), labels, torch.ones(3 * num_rows, dtype=torch.bool)).loss,
        "itg": F.cross_entropy(itg_logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=0.1),
    }


def shared_step(module: Stage1Module, *inputs: Tensor, seed: int) -> dict[str, Tensor]:
    """Keys and values shared, nothing else spared."""
    return plain_step(module, *inputs, seed=seed, share=True)


def our_step(module: Stage1Module, *inputs: Tensor, seed: int) -> dict[str, Tensor]:
    """What trains."""
    return module(*inputs, generator=torch_generator(seed, "itm", 0, 0)).losses


STEPS: dict[str, Step] = {"plain": plain_step, "shared": shared_step, "ours": our_step}


def seconds(step: Step, module: Stage1Module, inputs: tuple[Tensor, ...], seed: int) -> tuple[float, float]:
    """Processor time of one step, forward and backward, and time by the clock."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    clock, processors = time.perf_counter(), time.process_time()
    sum(step(module, *inputs, seed=seed).values()).backward()
    return time.process_time() - processors, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each version, after one that is not")
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
    generator = torch_generator(arguments.seed, "batch")
    lengths = torch.randint(8, 21, (arguments.batch,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(5, 30000, mask.shape, generator=generator) * mask
    image_shape = (arguments.batch, arguments.patches, qformer.config.image_width)
    inputs = (torch.randn(image_shape, generator=generator), ids, mask)

    # all are the same function: without dropout they give the same losses
    with torch.no_grad():
        module.eval()
        losses = [torch.stack(list(step(module, *inputs, seed=0).values())) for step in STEPS.values()]
        module.train()
    difference = max((losses[0] - other).abs().max().item() for other in losses[1:])
    print(f"captions of {lengths.tolist()} tokens; losses differ by {difference:.1e}; {arguments.threads} threads")

    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS if name != "plain"}
    for number in range(-1, arguments.rounds):
        times = {name: seconds(step, module, inputs, max(number, 0)) for name, step in STEPS.items()}
        if number < 0:
            continue  # memory is touched for the first time
        for name, pairs in ratios.items():
            pairs.append(tuple(plain / own for plain, own in zip(times["plain"], times[name], strict=True)))
        shown = ", ".join(f"{name} {own:.2f} s ({clock:.2f} s by the clock)" for name, (own, clock) in times.items())
        print(f"round {number}: {shown}", flush=True)
    for name, pairs in ratios.items():
        own, clock = (sorted(values) for values in zip(*pairs, strict=True))
        print(
            f"plain / {name}: median {statistics.median(own):.2f} of processor time, {own[0]:.2f} to {own[-1]:.2f}; "
            f"{statistics.median(clock):.2f} by the clock, {clock[0]:.2f} to {clock[-1]:.2f}"
        )


if __name__ == "__main__":
    main()
