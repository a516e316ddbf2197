"""How fast toybox draws: samples a second of one core, from the processor time of this process.

    python scripts/bench_toybox.py [--samples 400] [--size 64]

Aim: at least 200 a second at 64 px. Drawn alone, and drawn and written as shards: one picture a sample in stage 1,
picture, matte and foreground in stage 2.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2

from blipdiff_train.data import toybox
from blipdiff_train.data.toybox.write import write_toybox


def rate(work: Callable[[int], object], samples: int) -> float:
    began = time.process_time()
    work(samples)
    return samples / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    options = parser.parse_args()
    cv2.setNumThreads(1)

    def draw(count: int) -> None:
        for number in range(count):
            toybox.sample(number, size=options.size)

    with tempfile.TemporaryDirectory() as folder:

        def write(kind: str, count: int) -> None:
            write_toybox(f"{folder}/{kind}-{count}", kind, count, size=options.size)

        for kind in ("stage1", "stage2"):
            write(kind, 20)  # imports, tables and caches
        drawn = rate(draw, options.samples)
        written = [rate(functools.partial(write, kind), options.samples) for kind in ("stage1", "stage2")]
    print(f"{options.size} px, samples/s of one core: {drawn:.0f} drawn; drawn and written: ", end="")
    print(f"{written[0]:.0f} (stage 1), {written[1]:.0f} (stage 2)")


if __name__ == "__main__":
    main()
