"""GrabCut finds a plain subject, repeats itself, and fails as a value; given masks and CLIPSeg keep their contract."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from blipdiff_train.context.generator import AnnotatedSample, ContextGenerator
from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import (
    AlphaSegmenter,
    CLIPSegSegmenter,
    GrabCutSegmenter,
    keep_central_parts,
    whole_frame_cut,
)


def ball(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mask = cv2.circle(np.zeros((rows, columns), np.uint8), (columns // 2, rows // 2), min(rows, columns) // 4, 1, -1)
    image = np.where(mask[..., None] > 0, (200, 40, 40), (60, 120, 60)) + generator.normal(0, 8, (rows, columns, 3))
    return np.clip(image, 0, 255).astype(np.uint8), mask


@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (61, 133), (301, 400)])
def test_grabcut_finds_a_plain_subject_and_repeats_itself(rows, columns):
    image, mask = ball(rows, columns)
    cv2.setRNGSeed(5)
    (first,) = GrabCutSegmenter().segment([image], ["ball"])
    cv2.setRNGSeed(6)
    (second,) = GrabCutSegmenter().segment([image], ["anything"])
    assert np.array_equal(first, second)
    assert first.shape == (rows, columns)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    found = first > 0.5
    assert (found & (mask > 0)).sum() / (found | (mask > 0)).sum() > 0.9


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (40, 40)])
def test_grabcut_on_nothing_at_all_is_no_crash(shape):
    (result,) = GrabCutSegmenter().segment([np.full((*shape, 3), 77, np.uint8)], [""])
    assert isinstance(result, Rejection) or result.shape == shape


@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (61, 133), (301, 400)])
def test_a_second_cut_without_a_prior_finds_a_subject_anywhere_and_repeats_itself(rows, columns):
    image, mask = ball(rows, columns)
    shift = columns // 6
    moved, moved_mask = np.roll(image, shift, axis=1), np.roll(mask, shift, axis=1)
    cv2.setRNGSeed(5)
    first = whole_frame_cut(moved)
    cv2.setRNGSeed(6)
    assert np.array_equal(first, whole_frame_cut(moved))
    assert first.dtype == np.uint8
    assert max(first.shape) == min(128, max(rows, columns))
    found = cv2.resize(first, (columns, rows), interpolation=cv2.INTER_NEAREST) > 0
    assert (found & (moved_mask > 0)).sum() / (found | (moved_mask > 0)).sum() > 0.85


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (40, 40)])
def test_a_second_cut_of_nothing_at_all_is_no_crash(shape):
    cut = whole_frame_cut(np.full((*shape, 3), 77, np.uint8))
    assert set(np.unique(cut)) <= {0, 1}


def test_parts_away_from_the_centre_and_specks_go_and_small_holes_close():
    cut = np.zeros((100, 100), np.uint8)
    cut[30:70, 30:70] = 1
    cut[50, 50] = 0
    cut[2:12, 2:12] = 1
    kept = keep_central_parts(cut)
    assert kept[50, 50] == 1
    assert not kept[:20, :20].any()
    assert kept[31:69, 31:69].all()


def test_a_given_mask_is_the_probability_and_its_absence_a_rejection():
    image, mask = ball(20, 30)
    segmenter = AlphaSegmenter()
    segmenter.set_masks([mask * 255, None, mask[:10]])
    given, missing, wrong = segmenter.segment([image] * 3, [""] * 3)
    assert np.array_equal(given, mask.astype(np.float32))
    assert missing.cause == "no_mask"
    assert wrong.cause == "bad_mask"
    with pytest.raises(ValueError, match="3 masks for 1 images"):
        segmenter.segment([image], [""])


def test_the_generator_runs_the_four_steps_and_passes_rejections_on():
    image, mask = ball(64, 80)
    segmenter = AlphaSegmenter()
    segmenter.set_masks([mask * 255, np.zeros_like(mask), None])
    generator = ContextGenerator(segmenter, margin=0.04, engine="fast")
    sample, empty, missing = generator.annotate([image] * 3, ["ball"] * 3, ["a", "b", "c"])
    assert isinstance(sample, AnnotatedSample)
    assert sample.alpha_matte.dtype == sample.foreground.dtype == np.uint8
    assert np.abs(sample.alpha_matte / 255 - mask).mean() < 0.01
    assert set(sample.seconds) == {"segment", "trimap", "matte", "foreground"}
    assert (empty.cause, missing.cause) == ("no_foreground", "no_mask")
    assert "(sample b)" in empty.detail
    segmenter.set_masks([mask * 255])
    strict = ContextGenerator(segmenter, margin=0.04, max_unknown_share=0.01)
    assert strict.annotate([image], ["ball"])[0].cause == "too_uncertain"
    assert generator.describe()["segmenter"] == {"name": "alpha"}


def test_toy_clipseg_answers_the_category_for_one_or_many(repository):
    folder = repository / "blipdiff_train/assets/toy_foundation/clipseg"
    from blipdiff_train.data import toybox

    samples = [toybox.sample(number, split="heldout") for number in range(6)]
    segmenter = CLIPSegSegmenter(folder, batch_size=4)
    images, subjects = [sample.image for sample in samples], [sample.subject for sample in samples]
    many = segmenter.segment(images, subjects)
    larger = cv2.resize(images[1], (90, 130))
    (resized,) = segmenter.segment([larger], subjects[1:2])
    assert resized.shape == (130, 90)
    for probability, sample in zip(many, samples, strict=True):
        assert probability.shape == (64, 64)
        inside = sample.alpha > 128
        assert probability[inside].mean() > probability[~inside].mean() + 0.3


def test_toy_clipseg_gives_the_same_bits_whatever_it_is_asked_with(repository):
    """Alone, in a full or a half-empty batch, in any order: what `prepare` stores is what a training run would make."""
    from blipdiff_train.data import toybox

    samples = [toybox.sample(number, split="heldout") for number in range(11)]
    segmenter = CLIPSegSegmenter(repository / "blipdiff_train/assets/toy_foundation/clipseg", batch_size=8)

    def ask(*numbers: int) -> dict[int, bytes]:
        images, subjects = [samples[n].image for n in numbers], [samples[n].subject for n in numbers]
        return {n: row.tobytes() for n, row in zip(numbers, segmenter.segment(images, subjects), strict=True)}

    every = ask(*range(11))
    assert len(set(every.values())) == 11
    for numbers in ([3], [10, 9], [5, 2, 7, 0, 1], list(range(10, -1, -1)), [0, 0]):
        assert ask(*numbers) == {number: every[number] for number in numbers}
