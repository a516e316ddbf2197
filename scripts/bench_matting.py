"""Time and accuracy of the fast closed-form matting against pymatting's, photograph by photograph, in one run.

    python scripts/bench_matting.py ../shared/dreambench [--size-px 512] [--limit N]

Both solve the same trimap, one after the other on one thread; compilation is excluded by a warm-up. Time is the
process's CPU time, so that other load on the machine does not count, and wall time is shown beside it.
"""

# ruff: noqa: E402 (the thread counts must be set before NumPy and numba are imported)
from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np

from blipdiff_train.common.images import load_image
from blipdiff_train.context.matting import estimate_alpha
from blipdiff_train.context.rejection import Rejected, Rejection
from blipdiff_train.context.segmentation import GrabCutSegmenter
from blipdiff_train.context.trimap import make_trimap, unknown_share


def timed(image: np.ndarray, trimap: np.ndarray, engine: str) -> tuple[np.ndarray, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # pymatting prints advice about its preconditioner
        alpha = estimate_alpha(image, trimap, engine=engine)
    return alpha, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="photographs, in sub-folders or not")
    parser.add_argument("--size-px", type=int, default=512, help="square to which each is resized")
    parser.add_argument("--limit", type=int, default=None, help="first so many only")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    paths = sorted(p for p in arguments.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    segmenter = GrabCutSegmenter()
    rows, warm = [], False
    heading = f"{'photograph':<28}{'unknown':>8}{'pymatting s':>13}{'fast s':>9}{'ratio':>7}"
    print(f"{heading}{'mean |d|':>10}{'p99.9':>8}{'max':>8}")
    for path in paths[: arguments.limit]:
        size = (arguments.size_px, arguments.size_px)
        image = np.asarray(load_image(path).resize(size))
        (seg_prob,) = segmenter.segment([image], [""])
        try:
            if isinstance(seg_prob, Rejection):
                raise Rejected(seg_prob.cause, seg_prob.detail)
            trimap = make_trimap(seg_prob, foreground_threshold=0.9, background_threshold=0.1, margin=0.01)
        except Rejected as error:
            print(f"{path.parent.name}/{path.name}: {error}")
            continue
        if not warm:
            timed(image, trimap, "fast"), timed(image, trimap, "pymatting")
            warm = True
        fast, fast_cpu, fast_wall = timed(image, trimap, "fast")
        reference, reference_cpu, reference_wall = timed(image, trimap, "pymatting")
        difference = np.abs(fast - reference) * 255
        unknown = (trimap > 0) & (trimap < 1)
        rows.append(
            (reference_cpu, fast_cpu, reference_wall, fast_wall, difference.mean(), np.percentile(difference, 99.9),
             difference.max(), difference[unknown].mean())
        )  # fmt: skip
        times = f"{reference_cpu:>13.3f}{fast_cpu:>9.3f}{reference_cpu / fast_cpu:>7.1f}"
        errors = f"{difference.mean():>10.4f}{rows[-1][5]:>8.3f}{difference.max():>8.2f}"
        print(f"{path.parent.name + '/' + path.name:<28}{unknown_share(trimap):>8.1%}{times}{errors}", flush=True)
    table = np.array(rows)
    ratios = table[:, 0] / table[:, 1]
    print(f"\n{len(table)} photographs at {arguments.size_px} px, one thread; |d| in steps of 1/255")
    for label, column in (("CPU", 0), ("wall", 2)):
        reference, fast = np.median(table[:, column]), np.median(table[:, column + 1])
        print(f"{label} s, median: pymatting {reference:.3f}, fast {fast:.3f}, ratio of medians {reference / fast:.2f}")
    print(
        f"ratio of each pair: median {np.median(ratios):.2f}, smallest {ratios.min():.2f}, largest {ratios.max():.2f}"
    )
    print(
        f"mean |d|: over all {table[:, 4].mean():.4f}, worst photograph {table[:, 4].max():.4f} (limit 0.5); ", end=""
    )
    print(f"over unknown pixels alone {table[:, 7].mean():.4f}")
    within = int(((table[:, 4] <= 0.5) & (table[:, 5] <= 2)).sum())
    print(f"99.9-percentile of |d|: median {np.median(table[:, 5]):.4f}, worst {table[:, 5].max():.3f} (limit 2)")
    print(f"within both limits: {within} of {len(table)}")


if __name__ == "__main__":
    main()
