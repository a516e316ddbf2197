"""Was the subject learned? Held-out toybox subjects in scenes they were not shown in.

Each identity is shown once, in one scene, and asked for in another. The same noise is denoised under three
conditions: with its *own* picture, with the subject *dropped* (the text alone guides), and with the picture of
another identity of the same category *swapped* in. A model that ignores the subject makes the same colour error
in all three. Whether the scene is the one asked for, and not the one in the subject's picture, is judged by CLIP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.data import toybox
from blipdiff_train.evaluation.prompt_fidelity import ClipScorer
from blipdiff_train.evaluation.subject_fidelity import colour_error, paired_ratio, subject_colours
from blipdiff_train.inference.pipeline import SubjectPipeline

CONDITIONS = ("own", "dropped", "swapped")


@dataclass(frozen=True)
class Case:
    """One identity to generate: where it is shown, where it is asked for, and who is swapped in."""

    identity: toybox.Identity
    shown_in: str
    asked_for: str
    photograph: np.ndarray
    other: toybox.Identity
    other_photograph: np.ndarray


def make_cases(count: int, *, seed: int = 0, size: int = 64) -> list[Case]:
    """``count`` held-out identities, spread over categories and scenes; a pure function of ``seed``.

    Raises:
        ValueError: there are fewer held-out identities than asked for.
    """
    held_out = toybox.identities("heldout")
    if not 2 <= count <= len(held_out):
        raise ValueError(f"count={count}: toybox has {len(held_out)} held-out identities; choose 2 to {len(held_out)}")
    random = numpy_generator(seed, "evaluation/cases")
    shuffled = [held_out[index] for index in random.permutation(len(held_out))]
    scenes = list(toybox.SCENES)
    cases = []
    for number, identity in enumerate(_spread_over_categories(shuffled)[:count]):
        shown_in, asked_for = random.choice(scenes, size=2, replace=False)
        candidates = [
            other
            for other in shuffled
            if other.category == identity.category
            and not {other.colour_a, other.colour_b} & {identity.colour_a, identity.colour_b}
        ]
        other = candidates[random.integers(len(candidates))]
        cases.append(
            Case(
                identity,
                str(shown_in),
                str(asked_for),
                toybox.render(identity, str(shown_in), pose_seed=2 * number, size=size).image,
                other,
                toybox.render(other, str(shown_in), pose_seed=2 * number + 1, size=size).image,
            )
        )
    return cases


def _spread_over_categories(identities: list[toybox.Identity]) -> list[toybox.Identity]:
    """The same identities so that any beginning of the list has all categories equally often."""
    rank: dict[str, int] = {}
    order = []
    for identity in identities:
        rank[identity.category] = rank.get(identity.category, 0) + 1
        order.append((rank[identity.category], identity.category))
    return [identities[index] for index in sorted(range(len(identities)), key=lambda index: order[index])]


@dataclass(frozen=True)
class SubjectReport:
    """What was measured.

    Attributes:
        summary: plain data, ready for JSON: mean ΔE*ab per condition, the ratios own/dropped and own/swapped with
            95 % intervals, scene accuracy, share of copied scenes, share of images in which a subject was found.
        rows: one plain record an identity.
        images: the generated images per condition, in the order of ``cases``.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    cases: list[Case]
    images: dict[str, list[Image.Image]]


def evaluate_subjects(
    pipeline: SubjectPipeline,
    scorer: ClipScorer,
    segment: Callable[[list[np.ndarray], list[str]], list[np.ndarray]],
    *,
    count: int = 64,
    steps: int = 25,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> SubjectReport:
    """Generate every case under every condition and measure the images.

    Args:
        pipeline: the model; its image size is the size of the pictures.
        scorer: CLIP, for the scene.
        segment: images (H W 3 uint8) and category words to probabilities (H W).
        count: number of held-out identities.
        steps, guidance: of the sampler; no guidance: the model's own.
        seed: of the cases and of the noise; the noise of a case is the same in all conditions.
    """
    cases = make_cases(count, seed=seed, size=pipeline.denoiser.default_size)
    images = {
        condition: _generate(pipeline, cases, condition, steps, guidance, seed, batch_size) for condition in CONDITIONS
    }
    rows: list[dict[str, Any]] = [
        {"identity": asdict(case.identity), "shown_in": case.shown_in, "asked_for": case.asked_for} for case in cases
    ]
    scenes = list(toybox.SCENES)
    categories = [case.identity.category for case in cases]
    for condition in CONDITIONS:
        arrays = [np.asarray(image) for image in images[condition]]
        for row, case, array, seg_prob in zip(rows, cases, arrays, segment(arrays, categories), strict=True):
            colours = subject_colours(array, seg_prob)
            row[f"colour_error_{condition}"] = colour_error(colours.lab, _expected_lab(case.identity))
            row[f"found_{condition}"] = colours.found
    texts = [toybox.scene_prompt(case.identity.category, scene) for case in cases for scene in scenes]
    similarity = scorer.embed_images(images["own"]) @ scorer.embed_texts(sorted(set(texts))).T
    column = {text: index for index, text in enumerate(sorted(set(texts)))}
    for number, (row, case) in enumerate(zip(rows, cases, strict=True)):
        columns = [column[toybox.scene_prompt(case.identity.category, scene)] for scene in scenes]
        row["scene"] = scenes[int(similarity[number, columns].argmax())]
    return SubjectReport(_summarise(rows), rows, cases, images)


def _generate(
    pipeline: SubjectPipeline,
    cases: list[Case],
    condition: str,
    steps: int,
    guidance: float | None,
    seed: int,
    batch_size: int,
) -> list[Image.Image]:
    photographs = [case.other_photograph if condition == "swapped" else case.photograph for case in cases]
    return pipeline.generate(
        [Image.fromarray(photograph) for photograph in photographs],
        [case.identity.category for case in cases],
        [toybox.SCENES[case.asked_for] for case in cases],
        steps=steps,
        guidance=guidance,
        seed=[seed * 100_003 + number for number in range(len(cases))],
        drop_subject=condition == "dropped",
        batch_size=batch_size,
    )


def _expected_lab(identity: toybox.Identity) -> np.ndarray:
    return np.stack([toybox.colour_lab(identity.colour_a), toybox.colour_lab(identity.colour_b)])


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = {condition: np.array([row[f"colour_error_{condition}"] for row in rows]) for condition in CONDITIONS}
    return {
        "num_identities": len(rows),
        "colour_error": {condition: float(errors[condition].mean()) for condition in CONDITIONS},
        "own_over_dropped": asdict(paired_ratio(errors["own"], errors["dropped"])),
        "own_over_swapped": asdict(paired_ratio(errors["own"], errors["swapped"])),
        "scene_accuracy": float(np.mean([row["scene"] == row["asked_for"] for row in rows])),
        "scene_copied": float(np.mean([row["scene"] == row["shown_in"] for row in rows])),
        "subject_found": float(np.mean([row["found_own"] for row in rows])),
    }


def contact_sheet(report: SubjectReport, *, count: int = 12, scale: int = 2) -> Image.Image:
    """A picture with one row an identity: its photograph, what was generated under each condition, and the prompt."""
    from PIL import ImageDraw

    size = report.images["own"][0].width * scale
    gap, head, foot = 6, 18, 16
    columns = ("photograph", "own subject", "subject dropped", "swapped in", "with it")
    per_row = 2
    rows = -(-min(count, len(report.cases)) // per_row)
    width = per_row * (len(columns) * (size + gap) + 18)
    sheet = Image.new("RGB", (width, head + rows * (size + foot + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, case in enumerate(report.cases[:count]):
        left = (number % per_row) * (width // per_row) + gap
        top = head + (number // per_row) * (size + foot + gap)
        pictures = (
            Image.fromarray(case.photograph),
            report.images["own"][number],
            report.images["dropped"][number],
            Image.fromarray(case.other_photograph),
            report.images["swapped"][number],
        )
        for position, (title, picture) in enumerate(zip(columns, pictures, strict=True)):
            x = left + position * (size + gap)
            if number < per_row:
                draw.text((x, 3), title, fill="black")
            sheet.paste(picture.resize((size, size), Image.Resampling.NEAREST), (x, top))
        draw.text(
            (left, top + size + 2),
            f"asked for: a {case.identity.category} {toybox.SCENES[case.asked_for]}",
            fill="black",
        )
    return sheet
