"""Does a second cut tell which mattes are wrong? `filters.agreement` on DreamBench, judged by eye, and on toybox.

    python scripts/bench_agreement.py ../shared/dreambench [--count 512]

Photographs of one subject are not independent: intervals draw whole subjects, and the limits that are judged here are
chosen on the other subjects. Time is the processor's.
"""

# ruff: noqa: E402 (the thread counts must be set before NumPy and numba are imported)
from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import blipdiff_train
from blipdiff_train.context.generator import AnnotatedSample, ContextGenerator
from blipdiff_train.context.segmentation import CLIPSegSegmenter, GrabCutSegmenter, Segmenter
from blipdiff_train.data import toybox
from blipdiff_train.prepare.filters import check_matte, measure_agreement, measure_matte
from blipdiff_train.prepare.records import Record
from blipdiff_train.prepare.settings import make_settings
from blipdiff_train.prepare.work import limit_threads, make_generator, read_photograph

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9)
# GrabCut's mattes at 512 px, judged before anything was measured: G the whole subject and nothing else, P a piece
# missing or extra, B bad; in the order of the files
LABELS = {
    "backpack": "PPPBPG", "bear_plushie": "PGPGP", "berry_bowl": "BBBBBB", "can": "GGPPPP", "cat": "BPPPG",
    "clock": "PPBBPB", "dog": "BGGGB", "dog2": "PPBGGP", "duck_toy": "GGGG", "fancy_boot": "PPGGGG",
    "monster_toy": "PPPPP", "rc_car": "PPPPP", "shiny_sneaker": "GGGGPG", "teapot": "BPPBB", "vase": "PPGBGB",
}  # fmt: skip
# the same by a kinder eye: flaws that one has to look for are none, and half a subject is a piece missing
KINDER = {
    "backpack": "PPGBPG", "bear_plushie": "GGPGP", "berry_bowl": "BPBBBB", "can": "GGGPPP", "cat": "BGGGG",
    "clock": "PPBBGB", "dog": "BGGGB", "dog2": "GPBGGG", "duck_toy": "GGGG", "fancy_boot": "GGGGGG",
    "monster_toy": "PPPPP", "rc_car": "PPPPP", "shiny_sneaker": "GGGGPG", "teapot": "BGPBP", "vase": "GPGPGP",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="DreamBench's photographs, a sub-folder for each subject")
    parser.add_argument("--count", type=int, default=512, help="held-out toybox samples")
    arguments = parser.parse_args()
    limit_threads()
    photographs(arguments.folder)
    clipseg = Path(blipdiff_train.__file__).parent / "assets/toy_foundation/clipseg"
    for name, segmenter in (("GrabCut", GrabCutSegmenter()), ("CLIPSeg", CLIPSegSegmenter(clipseg, batch_size=32))):
        drawings(name, segmenter, arguments.count)


def photographs(folder: Path) -> None:
    """What the filter would reject of the mattes that the other filters let pass, for both judgements."""
    settings = make_settings({"input": str(folder), "output": "unused"})
    generator = make_generator(settings, None)
    found: dict[str, float] = {}
    seconds = {"cut": 0.0, "second cut": 0.0}
    for subject, labels in LABELS.items():
        for number in range(len(labels)):
            path = folder / subject / f"{number:02d}.jpg"
            image, _ = read_photograph(path.read_bytes(), Record(str(path), str(path)), settings)
            start = time.process_time()
            (probability,) = generator.segmenter.segment([image], [subject])
            seconds["cut"] += time.process_time() - start
            sample = generator.cut_out(image, probability, subject)
            if check_matte(measure_matte(sample.alpha_matte), settings.filters) is not None:
                print(f"{subject}/{number:02d} ({labels[number]}) is rejected by another filter")
                continue
            start = time.process_time()
            found[f"{subject}/{number:02d}"] = measure_agreement(image, sample.alpha_matte)
            seconds["second cut"] += time.process_time() - start
    print(", ".join(f"{step} {1000 * value / len(found):.0f} ms a photograph" for step, value in seconds.items()))
    subjects = np.array([name.split("/")[0] for name in found])
    values = np.array(list(found.values()))
    for title, judged in (("strict", LABELS), ("kinder", KINDER)):
        labels = np.array([judged[subject][int(number)] for subject, number in (name.split("/") for name in found)])
        groups = {"bad": labels == "B", "piece": labels == "P", "good": labels == "G"}
        print(f"\n{title}: " + ", ".join(f"{group.sum()} {name}" for name, group in groups.items()))
        for name, positive in (("bad against the others", groups["bad"]), ("not good against good", ~groups["good"])):
            low, high = interval(values, positive, subjects)
            print(f"  AUC, {name}: {auc(values, positive):.2f} ({low:.2f} to {high:.2f})")
        for limit in LIMITS:
            print(f"  limit {limit}: rejected {counts(values < limit, groups)}")
        for cost in (0.05, 0.1):
            rejected = np.zeros(len(values), bool)
            for subject in LABELS:
                held_out = subjects == subject
                good = np.sort(values[groups["good"] & ~held_out])
                rejected[held_out] = values[held_out] < good[int(cost * len(good))]
            print(f"  limit from the other subjects, at most {cost:.0%} of their good: {counts(rejected, groups)}")


def drawings(name: str, segmenter: Segmenter, count: int) -> None:
    """The same where the matte's error is known: IoU at 0.5 with the exact one."""
    samples = [toybox.sample(number, split="heldout") for number in range(count)]
    generator = ContextGenerator(segmenter, foreground_colours=False)
    results = generator.annotate([sample.image for sample in samples], [sample.subject for sample in samples])
    pairs = []
    for sample, result in zip(samples, results, strict=True):
        if isinstance(result, AnnotatedSample):
            matte, truth = result.alpha_matte >= 128, sample.alpha >= 128
            iou = np.count_nonzero(matte & truth) / max(1, np.count_nonzero(matte | truth))
            pairs.append((measure_agreement(result.image, result.alpha_matte), iou))
    values, ious = np.array(pairs).T
    groups = {"IoU < 0.5": ious < 0.5, "0.5 to 0.9": (ious >= 0.5) & (ious < 0.9), "IoU ≥ 0.9": ious >= 0.9}
    print(f"\ntoybox, {name}: {len(pairs)} mattes, mean IoU {ious.mean():.3f}")
    print(f"  rank correlation {np.corrcoef(ranks(values), ranks(ious))[0, 1]:.2f}, ", end="")
    print(f"AUC, IoU < 0.5 against the others: {auc(values, groups['IoU < 0.5']):.2f}")
    for limit in LIMITS:
        kept = ious[values >= limit]
        print(f"  limit {limit}: rejected {counts(values < limit, groups)}; mean IoU of the others {kept.mean():.3f}")


def counts(rejected: np.ndarray, groups: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{(rejected & group).sum()} of {group.sum()} {name}" for name, group in groups.items())


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """How probable it is that a positive has the smaller value; equal values count half."""
    low, high = values[positive][:, None], values[~positive][None]
    return float(((low < high) + 0.5 * (low == high)).mean()) if low.size and high.size else float("nan")


def interval(values: np.ndarray, positive: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`auc` over subjects."""
    generator, names = np.random.default_rng(0), np.unique(subjects)
    found = []
    for _ in range(1000):
        drawn = np.concatenate([np.flatnonzero(subjects == name) for name in generator.choice(names, len(names))])
        found.append(auc(values[drawn], positive[drawn]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing their mean."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]


if __name__ == "__main__":
    main()
