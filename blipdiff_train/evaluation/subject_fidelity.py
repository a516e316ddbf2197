"""Is it the same subject? Toybox identities are known by their two colours, so these are measured.

The generated subject is segmented by its category, its pixels are clustered into two colours in CIELAB, and the
error is the mean ΔE*ab (CIE 1976, Euclidean) to the identity's two colours under the better of the two pairings.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.cluster.vq import kmeans2

MIN_SUBJECT_PIXELS = 24
"""Below this a mask is taken as "no subject found" (0.6 % of a 64 × 64 image)."""


@dataclass(frozen=True)
class SubjectColours:
    """Two colours of a segmented subject.

    Attributes:
        lab: (2, 3) CIELAB, the more frequent colour first.
        share: (2,) share of the subject's pixels.
        found: whether the mask had enough pixels; if not, the colours are those of the whole image.
    """

    lab: np.ndarray
    share: np.ndarray
    found: bool


def to_lab(image_u8: np.ndarray) -> np.ndarray:
    """CIELAB (H, W, 3) float32 of an sRGB image (H, W, 3) uint8."""
    return cv2.cvtColor(image_u8.astype(np.float32) / 255.0, cv2.COLOR_RGB2Lab)


def subject_colours(image_u8: np.ndarray, seg_prob: np.ndarray, *, threshold: float = 0.5) -> SubjectColours:
    """The two main colours of the subject in an image.

    Args:
        image_u8: (H, W, 3) uint8 sRGB.
        seg_prob: (H, W) in [0, 1], probability of the subject.
        threshold: pixels above it belong to the subject; the mask is then eroded by one pixel, because pixels at the
            border are mixed with the background.

    Raises:
        ValueError: the sizes of image and probability differ.
    """
    if image_u8.shape[:2] != seg_prob.shape:
        raise ValueError(f"image is {image_u8.shape[:2]}, seg_prob is {seg_prob.shape}: sizes must agree")
    mask = (seg_prob > threshold).astype(np.uint8)
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8))
    if inner.sum() >= MIN_SUBJECT_PIXELS:
        mask = inner
    found = bool(mask.sum() >= MIN_SUBJECT_PIXELS)
    lab = to_lab(image_u8)
    pixels = lab[mask.astype(bool)] if found else lab.reshape(-1, 3)
    return SubjectColours(*_two_colours(pixels.astype(np.float64)), found=found)


def _two_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # starting from the two ends of the main axis makes the clustering a pure function of the pixels
    centred = pixels - pixels.mean(0)
    axis = np.linalg.svd(centred[:: max(1, len(pixels) // 2000)], full_matrices=False)[2][0]
    along = centred @ axis
    low, high = np.quantile(along, [0.2, 0.8])
    start = np.stack([pixels[along <= low].mean(0), pixels[along >= high].mean(0)])
    if np.allclose(*start):
        return start, np.array([1.0, 0.0])
    centres, labels = kmeans2(pixels, start, iter=20, minit="matrix", missing="warn")
    share = np.bincount(labels, minlength=2) / len(labels)
    order = np.argsort(-share, kind="stable")
    return centres[order], share[order]


def colour_error(found_lab: np.ndarray, expected_lab: np.ndarray) -> float:
    """Mean ΔE*ab of two colours to two colours under the better pairing; both (2, 3) CIELAB."""
    distance = np.linalg.norm(found_lab[:, None] - expected_lab[None], axis=-1)
    return float(min(distance[0, 0] + distance[1, 1], distance[0, 1] + distance[1, 0]) / 2)


@dataclass(frozen=True)
class PairedRatio:
    """Ratio of two mean errors over the same items, with its bootstrap interval."""

    ratio: float
    low: float
    high: float


def paired_ratio(errors: np.ndarray, baseline: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> PairedRatio:
    """``mean(errors) / mean(baseline)`` with a 95 % percentile interval from a bootstrap over the pairs.

    Args:
        errors, baseline: (N,) errors of the same N items in two conditions.

    Raises:
        ValueError: different lengths or fewer than two items.
    """
    errors, baseline = np.asarray(errors, float), np.asarray(baseline, float)
    if errors.shape != baseline.shape or len(errors) < 2:
        raise ValueError(
            f"need two equally long series of at least 2 items, got {errors.shape} and {baseline.shape}"
        )
    rows = np.random.default_rng(seed).integers(len(errors), size=(draws, len(errors)))
    ratios = errors[rows].mean(1) / baseline[rows].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return PairedRatio(float(errors.mean() / baseline.mean()), float(low), float(high))
