"""Closed-form matting and foreground colours: from a trimap to 8-bit mattes that composite without bleeding."""

from __future__ import annotations

from types import ModuleType

import numpy as np

ENGINES = ("fast", "pymatting")


def estimate_alpha(image: np.ndarray, trimap: np.ndarray, *, engine: str = "fast") -> np.ndarray:
    """Alpha matte (H W float32 in [0, 1]) by closed-form matting (Levin et al. 2007).

    Known pixels of the trimap keep their value exactly.

    Args:
        image: H W 3 uint8.
        trimap: H W float with 0 background, 1 foreground, anything between unknown.
        engine: ``"pymatting"``, the reference (its Laplacian, incomplete Cholesky, conjugate gradients to 1e-7), or
            ``"fast"``, the same equations solved to 8-bit accuracy (:mod:`blipdiff_train.context.closed_form`).

    Raises:
        ValueError: shapes, types, an unknown engine, or a trimap without foreground or background.
    """
    if image.dtype != np.uint8 or image.shape != (*trimap.shape, 3):
        raise ValueError(f"image {image.dtype} {image.shape}, trimap {trimap.shape}: expected uint8 (H W 3) and (H W)")
    if engine not in ENGINES:
        raise ValueError(f"matting.engine={engine!r}, expected one of {', '.join(ENGINES)}")
    for value, name in ((1.0, "foreground"), (0.0, "background")):
        if not (trimap == value).any():
            raise ValueError(f"trimap has no {name}: 0 of {trimap.size} pixels are {value}; reject it before matting")
    unknown = (trimap > 0) & (trimap < 1)
    if not unknown.any():
        return trimap.astype(np.float32)
    if engine == "fast":
        from blipdiff_train.context.closed_form import solve_alpha

        return solve_alpha(image, trimap)
    alpha = _pymatting().estimate_alpha_cf(image.astype(np.float64) / 255, trimap.astype(np.float64)).astype(np.float32)
    return np.where(unknown, alpha, trimap).astype(np.float32)


def estimate_foreground(image: np.ndarray, alpha_matte: np.ndarray) -> np.ndarray:
    """The subject's own colours (H W 3 uint8), continued beyond its outline, by the multi-level method.

    Blending the photograph itself would carry its background into every translucent pixel (Germer et al. 2020,
    pymatting ``estimate_foreground_ml``).

    Args:
        image: H W 3 uint8.
        alpha_matte: H W float in [0, 1].
    """
    image32, alpha32 = image.astype(np.float32) / np.float32(255), alpha_matte.astype(np.float32)
    foreground = _pymatting().estimate_foreground_ml(image32, alpha32)
    return np.rint(foreground * np.float32(255)).astype(np.uint8)


def to_u8(alpha_matte: np.ndarray) -> np.ndarray:
    """Matte in [0, 1] as 8 bits, rounded to nearest."""
    return np.rint(np.clip(alpha_matte, 0, 1) * 255).astype(np.uint8)


def _pymatting() -> ModuleType:
    """The library, after numba has been told to survive a fork.

    With GNU OpenMP, which it would take by itself, a process that was forked off one that has matted is killed when it
    mattes too; loaders are such processes.
    """
    import numba

    numba.config.THREADING_LAYER = "forksafe"
    import pymatting

    return pymatting
