"""Before a run takes GPUs: what it would meet, as a table and an exit code."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipdiff_train import build
from blipdiff_train.config import Stage1Config, Stage2Config

if TYPE_CHECKING:
    from blipdiff_train.models.parts import ModelParts

PACKAGES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "diffusers",
    "hydra-core",
    "webdataset",
    "pymatting",
)
SAMPLES_PER_SHARD = 4
"""Decoded with depth=sample."""


@dataclass
class Finding:
    """One line of the table. ``state``: ok, warn or fail."""

    state: str
    name: str
    words: str


def run(config: Any) -> int:
    """Look at everything, print the table; 0 when a run can start, 1 when it cannot."""
    findings: list[Finding] = [_versions()]
    data = None
    try:
        data = build.data_sources(config, lambda line: None)
    except (ValueError, FileNotFoundError) as error:
        findings.append(Finding("fail", "data", str(error)))
    if data is not None:
        for name, shards in (("training shards", data.shards), ("validation shards", data.val_shards)):
            findings += check_shards(config, shards, name, full=config.depth == "full")
        if config.stage == 2:
            findings += check_backgrounds(data.backgrounds)
    parts = None
    try:
        parts = build.parts(config, lambda line: None)
        module = build.module(config, parts)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        findings.append(Finding("ok", "models", f"{trainable:,} weights train, {frozen:,} are frozen"))
        findings += [check_room(config, trainable), estimate_memory(config, trainable, frozen)]
    except (ValueError, FileNotFoundError) as error:
        findings.append(Finding("fail", "models", str(error)))
    findings.append(check_batches(config, data, parts))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:>4}  {finding.name:<{width}}  {finding.words}")
    failed = sum(finding.state == "fail" for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else "a run can start")
    return 1 if failed else 0


def _versions() -> Finding:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Finding("fail", "versions", f"{package} is not installed")
    return Finding("ok", "versions", ", ".join(found))


def check_shards(config: Any, shards: Any, name: str, *, full: bool) -> list[Finding]:
    """Whether tars can be indexed, and samples decoded to what the stage needs; and what is in them."""
    from blipdiff_train.data.shards import SampleError, ShardSet
    from blipdiff_train.data.transforms import Stage1Transform, Stage2Transform

    if shards is None:
        return [Finding("warn", name, "none")]
    sources = [
        part["shards"] if isinstance(part, dict) else part
        for part in ([shards] if isinstance(shards, str) else shards)
    ]
    if config.stage == 1:
        transform = Stage1Transform(image_size=32, seed=0, train=False)
    else:
        transform = Stage2Transform(image_size=32, target_size=32, seed=0, train=False)
    total = decoded = 0
    causes: Counter[str] = Counter()
    first: dict[str, str] = {}
    words: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for source in sources:
        try:
            opened = ShardSet(source)
        except (ValueError, OSError) as error:
            return [Finding("fail", name, str(error))]
        total += len(opened)
        start = 0
        for size in opened.sizes:
            for index in range(start, start + (int(size) if full else min(int(size), SAMPLES_PER_SHARD))):
                keys[opened.key(index)] += 1
                decoded += 1
                try:
                    sample = transform(opened.read(index, transform.suffixes), index)
                except SampleError as error:
                    causes[error.cause] += 1
                    first.setdefault(error.cause, str(error))
                else:
                    words[sample.caption if config.stage == 1 else sample.subject_text] += 1
            start += int(size)
    if not total:
        return [Finding("fail", name, "no samples in them")]
    findings = [Finding("ok", name, f"{total:,} samples; {decoded:,} decoded")]
    share = sum(causes.values()) / max(1, decoded)
    for cause, count in causes.most_common():
        state = "fail" if share > config.data.max_bad_fraction else "warn"
        findings.append(Finding(state, name, f"{count} of {decoded} bad: {cause}, e.g. {first[cause]}"))
    repeated = sum(count - 1 for count in keys.values())
    if repeated:
        findings.append(Finding("warn", name, f"{repeated} of {decoded} keys occur more than once"))
    kind = "captions" if config.stage == 1 else "categories"
    common = ", ".join(f"{word!r} {count}" for word, count in words.most_common(3))
    findings.append(Finding("ok", name, f"{len(words)} different {kind}; most frequent: {common}"))
    return findings


def check_backgrounds(backgrounds: Any) -> list[Finding]:
    """Whether there are photographs to put subjects on."""
    from blipdiff_train.data.shards import ShardSet

    if backgrounds is None:
        return [
            Finding(
                "warn",
                "backgrounds",
                "data.backgrounds is null: backgrounds are drawn; photographs are better",
            )
        ]
    try:
        count = len(ShardSet(backgrounds))
    except (ValueError, OSError) as error:
        return [Finding("fail", "backgrounds", str(error))]
    return [Finding("ok" if count else "fail", "backgrounds", f"{count:,} photographs")]


def check_batches(config: Stage1Config | Stage2Config, data: Any, parts: ModelParts | None) -> Finding:
    """Batch arithmetic, and how often the run sees its data."""
    words = f"{build.batch_plan(config)}; {config.total_steps:,} steps"
    if data is None or parts is None:
        return Finding("ok", "batches", words)
    try:
        count = build.datamodule(config, parts, data).num_samples
    except (ValueError, OSError) as error:
        return Finding("fail", "batches", str(error))
    epochs = config.total_steps * config.global_batch_size / count
    return Finding("ok", "batches", f"{words} of {count:,} samples are {epochs:.1f} epochs")


def checkpoint_bytes(config: Any, trainable: int) -> int:
    """Size of a training checkpoint: weights, two moments, and the average where one is kept; fp32."""
    return trainable * 4 * (3 + (config.optim.ema_decay is not None))


def check_room(config: Any, trainable: int) -> Finding:
    """Whether the run's folder can be written and holds the checkpoints that are kept, and one being written."""
    folder = Path(config.run_dir)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("fail", "run folder", f"{existing} cannot be written: {error.strerror}")
    needed = checkpoint_bytes(config, trainable) * (config.keep_checkpoints + 1)
    free = shutil.disk_usage(existing).free
    words = (
        f"{folder}: {needed / 1e9:.2f} GB for {config.keep_checkpoints} checkpoints, {free / 1e9:.1f} GB free"
    )
    return Finding("ok" if free > needed else "fail", "run folder", words)


def estimate_memory(config: Any, trainable: int, frozen: int) -> Finding:
    """Memory a device needs before activations: weights, gradients, moments, average; frozen weights in theirs."""
    import torch

    frozen_size = {"32": 4, "bf16": 2, "16": 2}[config.trainer.frozen_precision]
    needed = trainable * 4 * (4 + (config.optim.ema_decay is not None)) + frozen * frozen_size
    words = f"{needed / 1e9:.2f} GB a device before activations"
    if not torch.cuda.is_available() or config.trainer.accelerator == "cpu":
        return Finding("ok", "memory", words)
    there = torch.cuda.get_device_properties(0).total_memory
    state = "ok" if needed < 0.8 * there else "warn" if needed < there else "fail"
    return Finding(state, "memory", f"{words} of {there / 1e9:.1f} GB")
