"""The fast engine against pymatting's, the properties of the equation, and photographs of every awkward kind."""

from __future__ import annotations

import numpy as np
import pytest

from blipdiff_train.context import closed_form
from blipdiff_train.context.matting import estimate_alpha, estimate_foreground, to_u8


def scene(seed: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A soft textured disc: image (uint8), its exact matte and a trimap with a band of some pixels."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    distance = np.hypot((y - rows / 2) / rows, (x - columns / 2) / columns)
    matte = np.clip((0.3 - distance) * 12 + 0.5, 0, 1)
    inside, outside = generator.uniform(0, 1, (2, 3))
    waves = 0.1 * np.sin(x / 3.0)[..., None] * matte[..., None] + 0.1 * np.cos(y / 5.0)[..., None]
    image = inside * matte[..., None] + outside * (1 - matte[..., None]) + waves
    image = np.clip(image * 255 + generator.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    trimap = np.where(distance < 0.2, 1.0, np.where(distance > 0.4, 0.0, 0.5)).astype(np.float32)
    return image, matte, trimap


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (33, 57), (128, 40), (9, 9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_fast_agrees_with_pymatting(seed, rows, columns):
    image, _, trimap = scene(seed, rows, columns)
    fast, reference = (estimate_alpha(image, trimap, engine=engine) for engine in ("fast", "pymatting"))
    assert np.abs(fast - reference).max() * 255 < 0.5
    assert fast.dtype == reference.dtype == np.float32


@pytest.mark.parametrize("engine", ["fast", "pymatting"])
@pytest.mark.parametrize("seed", range(3))
def test_known_pixels_keep_their_value_and_alpha_stays_in_range(engine, seed):
    image, matte, trimap = scene(seed, 48, 41)
    alpha = estimate_alpha(image, trimap, engine=engine)
    known = trimap != 0.5
    assert np.array_equal(alpha[known], trimap[known])
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert np.abs(alpha - matte)[~known].mean() < 0.15


def test_scattered_unknown_pixels_agree_too():
    """Isolated pixels and parts that touch only through a known pixel between them."""
    image, matte, _ = scene(3, 40, 40)
    generator = np.random.default_rng(3)
    trimap = np.where(generator.random(matte.shape) < 0.3, 0.5, (matte > 0.5).astype(float)).astype(np.float32)
    fast, reference = (estimate_alpha(image, trimap, engine=engine) for engine in ("fast", "pymatting"))
    assert np.abs(fast - reference).max() * 255 < 0.5


def test_unknown_pixels_at_the_frame_agree_too():
    image, _, _ = scene(4, 37, 29)
    trimap = np.full((37, 29), 0.5, np.float32)
    trimap[10:14, 10:14], trimap[20:30, 18:25] = 1, 0
    fast, reference = (estimate_alpha(image, trimap, engine=engine) for engine in ("fast", "pymatting"))
    assert np.abs(fast - reference).max() * 255 < 0.5


def test_rows_of_the_laplacian_sum_to_zero_and_it_is_symmetric():
    generator = np.random.default_rng(0)
    image = generator.random((12, 10, 3))
    state = np.full((12, 10), 2, np.uint8)
    index = np.arange(120, dtype=np.int32).reshape(12, 10)
    for stable in (False, True):
        values, rhs = closed_form._laplacian(image, state, index, 120, closed_form.EPSILON, stable)
        assert np.abs(values.sum(axis=1)).max() < 1e-9
        assert not rhs.any()
        grid = values.reshape(12, 10, 5, 5)
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                here = grid[2:-2, 2:-2, dy + 2, dx + 2]
                there = grid[2 + dy : 10 + dy, 2 + dx : 8 + dx, 2 - dy, 2 - dx]
                assert np.allclose(here, there, atol=1e-9)


def test_the_laplacian_is_pymattings():
    from pymatting import cf_laplacian

    image = scene(5, 20, 16)[0] / 255.0
    state = np.full((20, 16), 2, np.uint8)
    index = np.arange(320, dtype=np.int32).reshape(20, 16)
    reference = cf_laplacian(image).toarray()
    # flat windows make the 3 x 3 inverse ill-conditioned; the stable one differs from the textbook one there
    for stable, tolerance in ((False, 1e-12), (True, 1e-3)):
        values, _ = closed_form._laplacian(image, state, index, 320, closed_form.EPSILON, stable)
        for k in (0, 17, 100, 250, 319):
            y, x = divmod(k, 16)
            for o in range(25):
                ny, nx = y + o // 5 - 2, x + o % 5 - 2
                if 0 <= ny < 20 and 0 <= nx < 16:
                    assert values[k, o] == pytest.approx(reference[k, ny * 16 + nx], abs=tolerance)


def test_tiles_give_the_same_matte_when_the_factor_would_not_fit(monkeypatch):
    image, _, trimap = scene(6, 128, 120)
    whole = estimate_alpha(image, trimap)
    monkeypatch.setattr(closed_form, "MAX_ENVELOPE", 1)
    tiles = closed_form.solve_alpha(image, trimap, tolerance=1e-5)
    assert np.abs(whole - tiles).max() * 255 < 0.5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_image_is_solved_without_a_warning(value):
    _, _, trimap = scene(0, 40, 40)
    alpha = estimate_alpha(np.full((40, 40, 3), value, np.uint8), trimap)
    assert np.isfinite(alpha).all()
    assert 0.2 < alpha[trimap == 0.5].mean() < 0.8


def test_a_grey_image_agrees_with_pymatting():
    image, _, trimap = scene(2, 50, 50)
    grey = np.repeat(image[..., :1], 3, axis=2)
    fast, reference = (estimate_alpha(grey, trimap, engine=engine) for engine in ("fast", "pymatting"))
    assert np.abs(fast - reference).max() * 255 < 2


@pytest.mark.parametrize("shape", [(2, 2), (1, 7), (2, 30), (3, 3)])
def test_images_smaller_than_a_window_are_not_a_crash(shape):
    trimap = np.full(shape, 0.5, np.float32)
    trimap.flat[0], trimap.flat[-1] = 0, 1
    alpha = estimate_alpha(np.zeros((*shape, 3), np.uint8), trimap)
    assert alpha.shape == shape
    assert np.isfinite(alpha).all()


def test_a_trimap_without_unknown_pixels_is_its_own_matte():
    trimap = np.zeros((8, 8), np.float32)
    trimap[2:5] = 1
    assert np.array_equal(estimate_alpha(np.zeros((8, 8, 3), np.uint8), trimap), trimap)


def test_errors_name_the_trouble():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="no foreground: 0 of 64"):
        estimate_alpha(image, np.full((8, 8), 0.5, np.float32))
    with pytest.raises(ValueError, match=r"matting.engine='magic', expected one of fast, pymatting"):
        estimate_alpha(image, np.zeros((8, 8), np.float32), engine="magic")
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*\(8, 9\)"):
        estimate_alpha(image, np.zeros((8, 9), np.float32))


def test_foreground_colours_do_not_carry_the_background():
    y, x = np.mgrid[:60, :60]
    matte = np.clip((20 - np.hypot(y - 30, x - 30)) / 6 + 0.5, 0, 1)
    red, blue = np.array([220.0, 20, 20]), np.array([20.0, 20, 220])
    image = np.rint(red * matte[..., None] + blue * (1 - matte[..., None])).astype(np.uint8)
    foreground = estimate_foreground(image, matte)
    edge = (matte > 0.2) & (matte < 0.8)
    bleeding = lambda picture: np.abs(picture[edge].astype(float) - red).mean()  # noqa: E731
    assert bleeding(foreground) < 0.2 * bleeding(image)
    assert to_u8(np.array([0.0, 0.5, 1.0, 1.2])).tolist() == [0, 128, 255, 255]
