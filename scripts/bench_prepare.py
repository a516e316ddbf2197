"""What preparing photographs costs: processor time of each step, whether it grows in proportion, and what many cost.

    python scripts/bench_prepare.py ../shared/dreambench [--count 12] [--photographs 292000]

One process, one thread, GrabCut, on ``count`` photographs spread over a folder, on two and on four copies of each. Time
is the processor's, so that other load on the machine does not count. CLIPSeg is measured beside it at its real size
(ViT-B/16 at 352 px, random weights: they cost what trained ones do), and its arithmetic is counted, which is what an
estimate for a GPU can start from.
"""

# ruff: noqa: E402 (the thread counts must be set before NumPy and numba are imported)
from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from blipdiff_train.prepare import job
from blipdiff_train.prepare.records import PHOTOGRAPHS, list_records
from blipdiff_train.prepare.settings import make_settings
from blipdiff_train.prepare.work import ACCOUNTS, Hasher

STEPS = ("read", "segment", "trimap", "matte", "foreground", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="photographs, in sub-folders or not")
    parser.add_argument("--count", type=int, default=12, help="photographs of the smallest job")
    parser.add_argument("--photographs", type=int, default=292_000, help="of the job whose cost is asked for")
    parser.add_argument("--clipseg-batches", type=int, default=2, help="of 8 photographs; 0 leaves CLIPSeg out")
    arguments = parser.parse_args()
    # the accounts of a job are kept in this clock
    time.perf_counter = time.process_time
    paths = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in PHOTOGRAPHS)
    paths = [paths[number * len(paths) // arguments.count] for number in range(arguments.count)]
    with tempfile.TemporaryDirectory() as scratch:
        measure(paths, 2, Path(scratch))  # compiles
        costs = {}
        for times in (1, 2, 4):
            costs[times] = measure(paths, times * arguments.count, Path(scratch))
    print("processor ms a photograph")
    heading = "".join(f"{step:>12}" for step in STEPS)
    print(f"{'photographs':<14}{heading}{'hashing':>12}{'all':>12}")
    for times, (seconds, hashing, whole) in costs.items():
        count = times * arguments.count
        row = "".join(f"{1000 * seconds[step] / count:>12.1f}" for step in STEPS)
        print(f"{count:<14}{row}{1000 * hashing / count:>12.1f}{1000 * whole / count:>12.1f}")
    first, last = costs[1][2] / arguments.count, costs[4][2] / (4 * arguments.count)
    print(f"a photograph of four times as many costs {last / first:.2f} times as much")
    print(f"{arguments.photographs:,} photographs: {arguments.photographs * last / 3600:.1f} CPU-hours with GrabCut")
    if arguments.clipseg_batches:
        clipseg(arguments, last, costs[4][0]["segment"] / (4 * arguments.count))


def measure(paths: list[Path], count: int, scratch: Path) -> tuple[Counter[str], float, float]:
    """Seconds of each step, of hashing, and of all without a report."""
    folder, output = scratch / f"photographs-{count}", scratch / f"shards-{count}"
    folder.mkdir()
    for number in range(count):
        path = paths[number % len(paths)]
        shutil.copy(path, folder / f"{number:05d}{path.suffix}")
    values = {"input": str(folder), "output": str(output), "categories": "subject", "report": {"enabled": False}}
    # copies are duplicates, which is not the question here: hashing is timed by itself
    values["filters"] = {"duplicate_distance": None, "blur": None, "area": None}
    before = time.process_time()
    summary = job.run(**values, workers=1, progress=False)
    whole = time.process_time() - before
    if summary.rejected:
        print(summary)
    seconds: Counter[str] = Counter()
    for path in (output / ACCOUNTS).glob("unit-*.json"):
        seconds.update(json.loads(path.read_text())["seconds"])
    before = time.process_time()
    Hasher(make_settings(values))((0, list_records(folder, categories="subject")))
    hashing = time.process_time() - before
    return seconds, hashing, whole + hashing


def clipseg(arguments: argparse.Namespace, photograph_seconds: float, grabcut_seconds: float) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    torch.set_num_threads(1)
    # the sizes of CIDAS/clipseg-rd64-refined
    config = CLIPSegConfig(
        vision_config={"image_size": 352, "patch_size": 16}, reduce_dim=64, use_complex_transposed_convolution=True
    )
    model = CLIPSegForImageSegmentation(config).eval()
    embeds = torch.randn(8, config.projection_dim)
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3, 352, 352)).astype(np.float32))
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=pixels, conditional_embeddings=embeds)
        before = time.process_time()
        for _ in range(arguments.clipseg_batches):
            model(pixel_values=pixels, conditional_embeddings=embeds)
        seconds = (time.process_time() - before) / (8 * arguments.clipseg_batches)
    gflop = counter.get_total_flops() / 8 / 1e9
    print(f"CLIPSeg at 352 px on one thread: {1000 * seconds:.0f} ms and {gflop:.0f} GFLOP a photograph")
    rest = photograph_seconds - grabcut_seconds
    whole = arguments.photographs * (rest + seconds) / 3600
    print(f"{arguments.photographs:,} photographs: {whole:.1f} CPU-hours with CLIPSeg on the CPU")
    print(f"{arguments.photographs:,} photographs: {arguments.photographs * rest / 3600:.1f} CPU-hours beside a GPU")
    print(f"{arguments.photographs:,} photographs: {arguments.photographs * gflop / 1e6:.2f} PFLOP for the GPU")


if __name__ == "__main__":
    main()
