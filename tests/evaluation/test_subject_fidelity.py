"""The colour error must be small for the subject itself, large for another one, and blind to the background."""

from __future__ import annotations

import numpy as np
import pytest

from blipdiff_train.data import toybox
from blipdiff_train.evaluation.subject_fidelity import colour_error, paired_ratio, subject_colours, to_lab


def expected_lab(identity: toybox.Identity) -> np.ndarray:
    return np.stack([toybox.colour_lab(identity.colour_a), toybox.colour_lab(identity.colour_b)])


def test_a_drawn_subject_has_its_own_colours_and_not_anothers() -> None:
    samples = [toybox.sample(number, split="heldout") for number in range(32)]
    colours = [subject_colours(sample.image, sample.alpha / 255.0).lab for sample in samples]
    own = np.array([colour_error(lab, expected_lab(s.identity)) for lab, s in zip(colours, samples, strict=True)])
    others = samples[1:] + samples[:1]
    swapped = np.array([colour_error(lab, expected_lab(s.identity)) for lab, s in zip(colours, others, strict=True)])
    assert own.mean() < 10
    assert paired_ratio(own, swapped).high < 0.3


def test_the_order_of_the_colours_does_not_matter_and_the_better_pairing_counts() -> None:
    red_blue = np.array([[50.0, 60, 40], [30, 20, -60]])
    assert colour_error(red_blue, red_blue[::-1]) == 0
    assert colour_error(red_blue, red_blue + np.array([[3, 0, 0], [0, 4, 0]])) == pytest.approx(3.5)


def test_the_background_is_not_measured() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:16], image[8:24, 16:24] = (255, 0, 0), (0, 0, 255)
    mask = np.zeros((32, 32))
    mask[8:24, 8:24] = 1
    on_black = subject_colours(image, mask)
    image[mask == 0] = (0, 255, 0)
    on_green = subject_colours(image, mask)
    np.testing.assert_array_equal(on_black.lab, on_green.lab)
    assert colour_error(on_green.lab, to_lab(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))[0]) < 1e-3


def test_an_absent_subject_is_reported_and_still_measured() -> None:
    result = subject_colours(np.full((16, 16, 3), 90, np.uint8), np.zeros((16, 16)))
    assert not result.found
    assert np.isfinite(result.lab).all()


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="sizes must agree"):
        subject_colours(np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8)))


def test_the_interval_of_a_ratio_covers_it_and_shrinks_with_more_pairs() -> None:
    random = np.random.default_rng(0)
    baseline = random.uniform(20, 60, 1000)
    errors = 0.5 * baseline + random.normal(0, 5, 1000)
    few, many = paired_ratio(errors[:20], baseline[:20]), paired_ratio(errors, baseline)
    for result in (few, many):
        assert result.low < result.ratio < result.high
    assert many.low < 0.5 < many.high
    assert many.high - many.low < few.high - few.low
    with pytest.raises(ValueError, match="at least 2"):
        paired_ratio(errors[:1], baseline[:1])
