"""The ``evaluate`` command on the toy world: what a model folder can do, as numbers, a table and pictures.

A folder with stage 1's heads is measured by retrieval, matching and captioning on held-out pairs; a complete one by
whether it keeps the subject and follows the prompt.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipdiff_train.checkpoints.model_folder import load_model_folder
from blipdiff_train.common import rng
from blipdiff_train.common.files import atomic_path, write_json
from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import CLIPSegSegmenter
from blipdiff_train.data import toybox
from blipdiff_train.data.pixels import Normalisation
from blipdiff_train.data.samples import Stage1Batch
from blipdiff_train.data.transforms import resize_and_crop
from blipdiff_train.evaluation.prompt_fidelity import ClipScorer
from blipdiff_train.evaluation.toybox_subjects import SubjectReport, contact_sheet, evaluate_subjects
from blipdiff_train.inference.pipeline import SubjectPipeline
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.stages.stage1 import Stage1Module, ValidationRecord

log = logging.getLogger(__name__)


def run(
    model: str,
    output: str | Path,
    *,
    clip: str,
    clipseg: str,
    pairs: int = 256,
    pairs_batch_size: int = 64,
    subjects: int = 64,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    pictures: int = 12,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a model folder on the toy world and write ``metrics.json`` and ``subjects.png`` into ``output``.

    Args:
        model: model folder of stage 1 or a complete one.
        output: folder for what is written.
        clip, clipseg: the judges: folders or hub ids.
        pairs: held-out image–caption pairs for a model with stage 1's heads.
        pairs_batch_size: pairs that compete for a hard negative.
        subjects: held-out identities for a complete model.
        steps, guidance, batch_size: of the sampler; no guidance: the model's own.
        seed: of cases, negatives and noise.
        pictures: identities on the contact sheet.

    Returns:
        ``{"alignment": …}`` and/or ``{"subjects": …}`` as written.

    Raises:
        ValueError: the folder has neither stage 1's heads nor a denoiser.
    """
    output = Path(output)
    parts = load_model_folder(model)
    metrics: dict[str, Any] = {"model": str(model), "seed": seed}
    if parts.alignment_heads is not None and parts.denoiser is None:
        metrics["alignment"] = evaluate_alignment(
            parts, count=pairs, batch_size=pairs_batch_size, seed=seed, device=device
        )
    if parts.denoiser is not None:
        pipeline = SubjectPipeline(parts).to(device)
        guidance = pipeline.guidance if guidance is None else guidance
        report = evaluate_subjects(
            pipeline,
            ClipScorer.from_pretrained(clip).to(device),
            _segment_with(CLIPSegSegmenter(clipseg, device=device, batch_size=batch_size)),
            count=subjects,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch_size=batch_size,
        )
        metrics["subjects"] = report.summary | {"steps": steps, "guidance": guidance}
        _write_pictures(output, report, pictures)
    if len(metrics) == 2:
        raise ValueError(f"{model}: there is nothing to measure: neither stage 1's heads nor a denoiser")
    write_json(output / "metrics.json", metrics)
    return metrics


def _segment_with(segmenter: CLIPSegSegmenter):
    def segment(images: list[np.ndarray], categories: list[str]) -> list[np.ndarray]:
        found = segmenter.segment(images, categories)
        # a rejected image has no subject
        return [
            np.zeros(image.shape[:2], np.float32) if isinstance(seg_prob, Rejection) else seg_prob
            for image, seg_prob in zip(images, found, strict=True)
        ]

    return segment


def _write_pictures(output: Path, report: SubjectReport, count: int) -> None:
    with atomic_path(output / "subjects.png") as temporary:
        contact_sheet(report, count=count).save(temporary)
    write_json(output / "subjects.json", report.rows)


@torch.no_grad()
def evaluate_alignment(
    parts: ModelParts, *, count: int = 256, batch_size: int = 64, seed: int = 0, device: str = "cpu"
) -> dict[str, float]:
    """Stage 1's validation metrics on ``count`` held-out toybox pairs.

    Hard negatives come from within batches of ``batch_size``; retrieval ranks all pairs against each other.

    Returns:
        ``i2t_r1`` …, ``itm_accuracy`` with its majority baseline, ``itg_accuracy`` and the losses.
    """
    parts.require("alignment_heads", purpose="the evaluation of stage 1")
    module = Stage1Module(
        parts.image_encoder, parts.qformer, parts.alignment_heads, parts.qformer_tokenizer, total_steps=1, seed=seed
    )
    module = module.to(device).eval()
    qformer, heads = parts.qformer, parts.alignment_heads
    record = ValidationRecord(qformer.config.num_query_tokens, heads.text_proj.out_features, module.device)
    normalise = Normalisation(parts.image_mean, parts.image_std)
    for number in range(math.ceil(count / batch_size)):
        positions = range(number * batch_size, min(count, (number + 1) * batch_size))
        samples = [toybox.sample(position, split="heldout", size=parts.image_size, seed=seed) for position in positions]
        batch = Stage1Batch(
            image=normalise([resize_and_crop(sample.image, parts.image_size) for sample in samples]),
            caption=[sample.caption for sample in samples],
            image_id=torch.tensor(list(positions)),
            keys=[sample.key for sample in samples],
            positions=torch.tensor(list(positions)),
        ).to(device)
        input_ids, attention_mask = module.tokenize(batch.caption)
        generator = rng.torch_generator(seed, "evaluation/negatives", number)
        embeds = module.image_encoder(batch.image)
        record.add(
            module(embeds, input_ids, attention_mask, batch.image_id, generator=generator, across_ranks=False), batch
        )
    return {"num_pairs": count} | {name.removeprefix("val/"): value for name, value in record.metrics().items()}


def table(metrics: dict[str, Any]) -> str:
    """The metrics as aligned lines, each beside its chance level or baseline."""
    rows: list[tuple[str, str, str]] = []
    if "alignment" in metrics:
        values = metrics["alignment"]
        chance = f"chance {1 / values['num_pairs']:.1%}"
        rows += [
            (f"Stage 1, {values['num_pairs']} held-out pairs", "", ""),
            ("  image → text R@1", f"{values['i2t_r1']:.1%}", chance),
            ("  text → image R@1", f"{values['t2i_r1']:.1%}", chance),
            (
                "  matching accuracy, hard negatives",
                f"{values['itm_accuracy']:.1%}",
                f"majority {values['itm_baseline']:.1%}",
            ),
            ("  caption tokens right", f"{values['itg_accuracy']:.1%}", ""),
        ]
    if "subjects" in metrics:
        values = metrics["subjects"]
        errors = values["colour_error"]
        ratios = {
            other: f"own / {other} {value['ratio']:.2f} (95 %: {value['low']:.2f} to {value['high']:.2f})"
            for other in ("dropped", "swapped")
            for value in [values[f"own_over_{other}"]]
        }
        rows += [
            (f"Stage 2, {values['num_identities']} held-out subjects in new scenes", "", ""),
            ("  colour error (ΔE) with its own picture", f"{errors['own']:.1f}", ""),
            ("  … with the picture dropped", f"{errors['dropped']:.1f}", ratios["dropped"]),
            ("  … with another subject's picture", f"{errors['swapped']:.1f}", ratios["swapped"]),
            (
                "  the scene asked for is drawn",
                f"{values['scene_accuracy']:.0%}",
                f"chance {1 / len(toybox.SCENES):.0%}",
            ),
            ("  the picture's own scene is copied", f"{values['scene_copied']:.0%}", "lower is better"),
            ("  a subject is found", f"{values['subject_found']:.0%}", ""),
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows]
    rule = "─" * max(len(line) for line in lines)
    return "\n".join([rule, *lines, rule])
