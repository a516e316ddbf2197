"""Two thresholds turn a segmenter's probability into foreground, background and a band that matting must decide."""

from __future__ import annotations

import cv2
import numpy as np

from blipdiff_train.context.rejection import Rejected

BACKGROUND, UNKNOWN, FOREGROUND = np.float32(0.0), np.float32(0.5), np.float32(1.0)


def make_trimap(
    seg_prob: np.ndarray,
    *,
    foreground_threshold: float,
    background_threshold: float,
    margin: float = 0.0,
    subject_text: str = "",
    sample: str = "",
) -> np.ndarray:
    """Trimap (H W float32) with 1 where ``seg_prob`` ≥ high, 0 where ≤ low and 0.5 between (BLIP-Diffusion, §3.3).

    The paper states the rule and not the values. The margin is ours: segmenters are confidently wrong within a few
    pixels of an outline, so both certain regions are eroded by it and the band between grows.

    Args:
        seg_prob: H W float in [0, 1].
        foreground_threshold: high; in (background_threshold, 1].
        background_threshold: low; in [0, foreground_threshold).
        margin: share of the longest side by which each certain region is eroded, rounded to pixels, 0 for none.
        subject_text, sample: stand in the messages only.

    Raises:
        Rejected: ``no_foreground``, ``no_background`` (matting needs both), or ``bad_probability`` (not finite).
        ValueError: thresholds or shapes that make no sense.
    """
    if seg_prob.ndim != 2 or 0 in seg_prob.shape:
        raise ValueError(f"seg_prob has shape {seg_prob.shape}, expected (H W)")
    if not 0.0 <= background_threshold < foreground_threshold <= 1.0:
        raise ValueError(
            f"trimap.background_threshold={background_threshold}, trimap.foreground_threshold={foreground_threshold}: "
            "expected 0 ≤ background < foreground ≤ 1"
        )
    if not 0.0 <= margin < 0.5:
        raise ValueError(f"trimap.margin={margin}, expected a share of the longest side in [0, 0.5)")
    where = _where(subject_text, sample)
    if not np.isfinite(seg_prob).all():
        raise Rejected("bad_probability", f"the segmenter gave values that are not finite{where}; drop the sample")

    foreground = (seg_prob >= foreground_threshold).astype(np.uint8)
    background = (seg_prob <= background_threshold).astype(np.uint8)
    counts = int(foreground.sum()), int(background.sum())
    radius_px = round(margin * max(seg_prob.shape))
    if radius_px > 0:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))
        # outside the frame counts as more of the same: a subject cut by the frame has no outline there
        foreground = cv2.erode(foreground, kernel, borderType=cv2.BORDER_REPLICATE)
        background = cv2.erode(background, kernel, borderType=cv2.BORDER_REPLICATE)
    for cause, region, count, sign, key, value, change in (
        ("no_foreground", foreground, counts[0], "≥", "foreground_threshold", foreground_threshold, "lower"),
        ("no_background", background, counts[1], "≤", "background_threshold", background_threshold, "raise"),
    ):
        if not region.any():
            eroded = f", none left after a margin of {radius_px} px" if count else ""
            raise Rejected(
                cause,
                f"trimap has {cause.replace('_', ' ')}: {count} of {seg_prob.size} pixels {sign} {value}{eroded}{where}"
                f"; {change} trimap.{key}{' or lower trimap.margin' if count else ''} or drop the sample",
            )
    trimap = np.full(seg_prob.shape, UNKNOWN, np.float32)
    trimap[foreground > 0] = FOREGROUND
    trimap[background > 0] = BACKGROUND
    return trimap


def unknown_share(trimap: np.ndarray) -> float:
    """Share of the pixels that matting has to decide, in [0, 1]."""
    return float(((trimap > 0) & (trimap < 1)).mean())


def _where(subject_text: str, sample: str) -> str:
    subject = f" for subject_text='{subject_text}'" if subject_text else ""
    return subject + (f" (sample {sample})" if sample else "")
