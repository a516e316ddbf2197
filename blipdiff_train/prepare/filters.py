"""Which photographs and mattes are left out, and why: each filter measures one thing and compares it with one limit."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np

from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import whole_frame_cut
from blipdiff_train.prepare.settings import FilterSettings


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits that survive resizing and compression: signs of the low frequencies of a 32 × 32 cosine transform.

    Args:
        grey: H W uint8.
    """
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(hashes: Sequence[int | None], distance: int) -> dict[int, int]:
    """Index of each photograph to leave out → index of the earlier one that it repeats.

    Photographs are taken in order; one is left out if a kept one is within ``distance`` bits. By the pigeonhole
    principle two such hashes agree in one of ``distance + 1`` pieces, so only those are compared.
    """
    pieces = distance + 1
    edges = [round(64 * piece / pieces) for piece in range(pieces + 1)]
    buckets: list[dict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in range(pieces)]
    repeated: dict[int, int] = {}
    for index, value in enumerate(hashes):
        if value is None:
            continue
        keys = [(value >> low) & ((1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        found = [
            other
            for bucket, key in zip(buckets, keys, strict=True)
            for other, other_value in bucket.get(key, ())
            if (value ^ other_value).bit_count() <= distance
        ]
        if found:
            repeated[index] = min(found)
            continue
        for bucket, key in zip(buckets, keys, strict=True):
            bucket[key].append((index, value))
    return repeated


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian of the grey photograph (H W 3 uint8), in squared grey levels."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def measure_matte(alpha_matte: np.ndarray) -> dict[str, float]:
    """What the matte filters look at, for H W uint8: ``area``, ``border_contact`` (shares) and ``num_components``."""
    solid = alpha_matte >= 128
    border = np.concatenate([solid[0], solid[-1], solid[1:-1, 0], solid[1:-1, -1]])
    count, _, stats, _ = cv2.connectedComponentsWithStats(solid.astype(np.uint8), connectivity=8)
    areas = stats[1:count, cv2.CC_STAT_AREA]
    return {
        "area": round(float(alpha_matte.mean(dtype=np.float64)) / 255, 6),
        "border_contact": round(float(border.mean()), 6),
        "num_components": int((areas >= 0.01 * areas.sum()).sum()) if areas.size else 0,
    }


def measure_agreement(image: np.ndarray, alpha_matte: np.ndarray) -> float:
    """IoU in [0, 1] of the matte (H W uint8) with :func:`whole_frame_cut` of its photograph (H W 3 uint8).

    Where the colours decide, GrabCut finds the same subject from any start; where they do not, the start does. A low
    agreement therefore says that one of two cuts is wrong, and a high one only that both are, or neither is.
    """
    cut = whole_frame_cut(image) > 0
    solid = cv2.resize(alpha_matte, cut.shape[::-1], interpolation=cv2.INTER_AREA) >= 128
    union = np.count_nonzero(cut | solid)
    return round(np.count_nonzero(cut & solid) / union, 6) if union else 0.0


def check_photograph(value: float, filters: FilterSettings) -> Rejection | None:
    """Whether the photograph, of that :func:`sharpness`, is too blurred to learn from."""
    if filters.blur is None or value >= filters.blur:
        return None
    detail = f"variance of the Laplacian is {value:.1f}, expected ≥ {filters.blur}; lower filters.blur to keep it"
    return Rejection("blurred", detail, value)


def check_matte(measures: dict[str, float], filters: FilterSettings) -> Rejection | None:
    """Whether the matte is too small, too large, cut off by the frame, or in too many pieces."""
    area = measures["area"]
    if filters.area is not None:
        low, high = filters.area
        if area < low:
            detail = f"the subject covers {area:.1%} of the frame, expected ≥ {low:.1%} (filters.area)"
            return Rejection("too_small", detail, area)
        if area > high:
            detail = f"the subject covers {area:.1%} of the frame, expected ≤ {high:.1%} (filters.area)"
            return Rejection("too_large", detail, area)
    contact = measures["border_contact"]
    if filters.border_contact is not None and contact > filters.border_contact:
        limit = f"expected ≤ {filters.border_contact:.1%} (filters.border_contact)"
        return Rejection("cut_off", f"the subject touches {contact:.1%} of the frame's border, {limit}", contact)
    parts = measures["num_components"]
    if filters.num_components is not None and parts > filters.num_components:
        limit = f"expected ≤ {filters.num_components} (filters.num_components)"
        return Rejection("in_pieces", f"the matte has {parts} separate parts, {limit}", parts)
    return None


def check_agreement(agreement: float, limit: float) -> Rejection | None:
    """Whether another cut of the photograph contradicts the matte."""
    if agreement >= limit:
        return None
    expected = f"IoU {agreement:.1%}, expected ≥ {limit:.1%} (filters.agreement)"
    detail = f"GrabCut from the whole frame finds another subject or none: {expected}"
    return Rejection("disputed", detail, agreement)
