"""Error of the mattes on toybox, where the truth is exact: from the true trimap, and from the one CLIPSeg gives.

    python scripts/bench_toybox_mattes.py [--clipseg FOLDER] [--count 256]

SAD, MSE, gradient error (Rhemann et al. 2009: derivatives of a Gaussian with sigma 1.4) and mean IoU at 0.5; for
reference CLIPSeg's own probability taken as the matte, and GrabCut.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

import blipdiff_train
from blipdiff_train.context.matting import estimate_alpha
from blipdiff_train.context.rejection import Rejected, Rejection
from blipdiff_train.context.segmentation import CLIPSegSegmenter, GrabCutSegmenter
from blipdiff_train.context.trimap import make_trimap
from blipdiff_train.data import toybox

THRESHOLDS = {"foreground_threshold": 0.7, "background_threshold": 0.1, "margin": 0.01}


def errors(alpha: np.ndarray, truth: np.ndarray) -> tuple[float, float, float, float]:
    """SAD (pixels), MSE, gradient error (sum), IoU at 0.5 of H W mattes in [0, 1]."""
    difference = alpha.astype(np.float64) - truth
    gradient = gradient_magnitude(alpha) - gradient_magnitude(truth)
    union = np.count_nonzero((alpha > 0.5) | (truth > 0.5))
    iou = np.count_nonzero((alpha > 0.5) & (truth > 0.5)) / max(1, union)
    return float(np.abs(difference).sum()), float((difference**2).mean()), float((gradient**2).sum()), iou


def gradient_magnitude(matte: np.ndarray, sigma: float = 1.4) -> np.ndarray:
    x = np.arange(-5, 6, dtype=np.float64)
    smooth = np.exp(-(x**2) / (2 * sigma**2))
    smooth /= smooth.sum()
    slope = -x / sigma**2 * smooth
    matte = matte.astype(np.float64)
    border = cv2.BORDER_REPLICATE
    dx = cv2.sepFilter2D(matte, cv2.CV_64F, slope, smooth, borderType=border)
    dy = cv2.sepFilter2D(matte, cv2.CV_64F, smooth, slope, borderType=border)
    return np.hypot(dx, dy)


def true_trimap(truth: np.ndarray, radius_px: int = 2) -> np.ndarray:
    """The exact matte with its fractional pixels, and ``radius_px`` around them, unknown."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1, 2 * radius_px + 1))
    edge = (cv2.dilate(truth, kernel) > 0) & (cv2.erode(truth, kernel) < 1)
    return np.where(edge, 0.5, truth > 0.5).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(blipdiff_train.__file__).parent / "assets" / "toy_foundation" / "clipseg"
    parser.add_argument("--clipseg", type=Path, default=default, help="CLIPSeg folder")
    parser.add_argument("--count", type=int, default=256, help="held-out samples")
    parser.add_argument("--size-px", type=int, default=64)
    arguments = parser.parse_args()
    samples = [toybox.sample(i, split="heldout", size=arguments.size_px) for i in range(arguments.count)]
    images, subjects = [sample.image for sample in samples], [sample.subject for sample in samples]
    truths = [sample.alpha.astype(np.float32) / 255 for sample in samples]
    clipseg = CLIPSegSegmenter(arguments.clipseg, batch_size=32).segment(images, subjects)
    grabcut = GrabCutSegmenter().segment(images, subjects)

    def matte(index: int, seg_prob: np.ndarray | Rejection) -> np.ndarray | None:
        if isinstance(seg_prob, Rejection):
            return None
        try:
            return estimate_alpha(images[index], make_trimap(seg_prob, **THRESHOLDS))
        except Rejected:
            return None

    count = range(len(samples))
    rows = {
        "true trimap, closed form": [estimate_alpha(images[i], true_trimap(truths[i])) for i in count],
        "CLIPSeg trimap, closed form": [matte(i, clipseg[i]) for i in count],
        "CLIPSeg probability as matte": clipseg,
        "GrabCut trimap, closed form": [matte(i, grabcut[i]) for i in count],
    }
    print(f"{len(samples)} held-out samples at {arguments.size_px} px, thresholds {THRESHOLDS}")
    print(f"{'':<30}{'SAD px':>9}{'MSE':>9}{'gradient':>10}{'mean IoU':>10}{'rejected':>10}")
    for name, mattes in rows.items():
        found = np.array([errors(m, t) for m, t in zip(mattes, truths, strict=True) if isinstance(m, np.ndarray)])
        sad, mse, gradient, iou = found.mean(axis=0)
        print(f"{name:<30}{sad:>9.1f}{mse:>9.4f}{gradient:>10.2f}{iou:>10.4f}{len(samples) - len(found):>10}")


if __name__ == "__main__":
    main()
