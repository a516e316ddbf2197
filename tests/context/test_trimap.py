"""Thresholds, margin, and the degenerate cases with their messages."""

import numpy as np
import pytest

from blipdiff_train.context.rejection import Rejected
from blipdiff_train.context.trimap import make_trimap, unknown_share

THRESHOLDS = {"foreground_threshold": 0.9, "background_threshold": 0.1}


def disc(size: int = 33) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.clip(1.5 - np.hypot(x, y) / (0.3 * size), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(7, 5), (33, 33), (1, 64), (64, 48)])
def test_values_follow_the_two_thresholds(shape):
    seg_prob = np.random.default_rng(0).random(shape).astype(np.float32)
    seg_prob.flat[0], seg_prob.flat[-1] = 0.9, 0.1  # the thresholds themselves belong to the certain regions
    trimap = make_trimap(seg_prob, **THRESHOLDS)
    expected = np.where(seg_prob >= np.float32(0.9), 1, np.where(seg_prob <= np.float32(0.1), 0, 0.5))
    assert trimap.dtype == np.float32
    assert np.array_equal(trimap, expected)
    assert unknown_share(trimap) == pytest.approx((expected == 0.5).mean())


def test_a_margin_only_moves_certain_pixels_to_unknown():
    seg_prob = disc()
    without, with_margin = make_trimap(seg_prob, **THRESHOLDS), make_trimap(seg_prob, **THRESHOLDS, margin=0.06)
    changed = without != with_margin
    assert changed.any()
    assert (with_margin[changed] == 0.5).all()


def test_a_margin_does_not_erode_at_the_frame():
    seg_prob = np.zeros((20, 20), np.float32)
    seg_prob[8:, 5:15] = 1
    assert (make_trimap(seg_prob, **THRESHOLDS, margin=0.1)[-1, 8:12] == 1).all()


@pytest.mark.parametrize(
    ("value", "margin", "cause", "words"),
    [
        (0.0, 0.0, "no_foreground", ["0 of 256 pixels ≥ 0.9", "subject_text='dog'", "00012/000345", "lower trimap."]),
        (1.0, 0.0, "no_background", ["0 of 256 pixels ≤ 0.1", "raise trimap.background_threshold"]),
        (0.5, 0.0, "no_foreground", ["0 of 256"]),
        (np.nan, 0.0, "bad_probability", ["not finite"]),
    ],
)  # fmt: skip
def test_degenerate_trimaps_are_typed_rejections(value, margin, cause, words):
    seg_prob = np.full((16, 16), value, np.float32)
    with pytest.raises(Rejected) as caught:
        make_trimap(seg_prob, **THRESHOLDS, margin=margin, subject_text="dog", sample="00012/000345")
    assert caught.value.rejection.cause == cause
    for word in words:
        assert word in caught.value.rejection.detail


def test_a_margin_that_eats_the_subject_says_so():
    seg_prob = np.zeros((16, 16), np.float32)
    seg_prob[8, 8] = 1
    with pytest.raises(Rejected, match=r"1 of 256 pixels ≥ 0\.9, none left after a margin of 2 px"):
        make_trimap(seg_prob, **THRESHOLDS, margin=0.1)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.1, 1.1)])
def test_thresholds_out_of_order_are_the_users_error(low, high):
    with pytest.raises(ValueError, match=f"background_threshold={low}.*foreground_threshold={high}"):
        make_trimap(disc(), foreground_threshold=high, background_threshold=low)
