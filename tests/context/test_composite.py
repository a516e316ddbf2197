"""Blending is exact at both ends, placement stays inside and is a function of its generator."""

import numpy as np
import pytest

from blipdiff_train.context.composite import blend, blend_on_background, cover, place, sample_placement, subject_box


def random_image(generator, *shape):
    return generator.integers(0, 256, shape, dtype=np.uint8)


def test_every_pair_of_bytes_is_rounded_to_nearest():
    alpha, colour = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    foreground = np.repeat(colour[..., None], 3, axis=2)
    for other in (0, 1, 77, 254, 255):
        background = np.full_like(foreground, other)
        exact = (alpha.astype(float) * colour + (255.0 - alpha) * other) / 255
        assert np.abs(blend(foreground, alpha, background)[..., 0] - exact).max() <= 0.5


def test_matte_zero_gives_the_background_and_255_the_foreground():
    generator = np.random.default_rng(0)
    foreground, background = random_image(generator, 5, 7, 3), random_image(generator, 5, 7, 3)
    assert np.array_equal(blend(foreground, np.zeros((5, 7), np.uint8), background), background)
    assert np.array_equal(blend(foreground, np.full((5, 7), 255, np.uint8), background), foreground)


def test_errors_name_shapes_and_types():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 4, 3\).*\(5, 4\)"):
        blend(image, np.zeros((5, 4), np.uint8), image)
    with pytest.raises(ValueError, match="float64"):
        blend(image.astype(float), np.zeros((4, 4), np.uint8), image)
    with pytest.raises(ValueError, match="largest value is 0"):
        subject_box(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("seed", range(20))
def test_the_subject_lies_inside_and_only_it_changes_the_background(seed):
    generator = np.random.default_rng(seed)
    rows, columns = generator.integers(3, 70, 2)
    alpha = np.zeros((rows, columns), np.uint8)
    top, left = generator.integers(0, rows), generator.integers(0, columns)
    alpha[top : top + 20, left : left + 9] = 255
    foreground = random_image(generator, rows, columns, 3)
    background = random_image(generator, *generator.integers(2, 90, 2), 3)
    inputs = foreground, alpha, background
    composite, matte = blend_on_background(*inputs, size_px=48, generator=np.random.default_rng(seed))
    again, _ = blend_on_background(*inputs, size_px=48, generator=np.random.default_rng(seed))
    assert composite.shape == (48, 48, 3)
    assert matte.shape == (48, 48)
    assert matte.max() == 255
    assert np.array_equal(composite, again)
    replay = np.random.default_rng(seed)
    sample_placement(alpha, 48, replay)
    canvas = cover(background, 48, replay)
    assert np.array_equal(composite[matte == 0], canvas[matte == 0])


def test_a_side_cut_by_the_frame_stays_at_the_frame():
    alpha = np.zeros((40, 40), np.uint8)
    alpha[20:, 10:20] = 255  # the bottom is cut
    for seed in range(10):
        placement = sample_placement(alpha, 64, np.random.default_rng(seed))
        assert placement.top + placement.height == 64


def test_placement_can_mirror():
    alpha = np.full((8, 8), 255, np.uint8)
    foreground = np.zeros((8, 8, 3), np.uint8)
    foreground[:, :4] = 200
    canvas = np.full((8, 8, 3), 9, np.uint8)
    placement = sample_placement(alpha, 8, np.random.default_rng(0), scale=(1.0, 1.0), flip_probability=1.0)
    composite, _ = place(foreground, alpha, canvas, placement)
    assert np.array_equal(composite, foreground[:, ::-1])
