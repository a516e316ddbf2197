"""Before a run takes GPUs: what it would meet, as a table and an exit code."""

from __future__ import annotations

import platform
import shutil
import tempfile
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
STATES = {"ok": "ok", "warning": "warn", "error": "fail"}
"""Words of ``data.check`` → words of the table."""


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
            findings += check_shards(config, shards, name, f"stage{config.stage}")
        if config.stage == 2:
            findings += check_shards(config, data.backgrounds, "backgrounds", "backgrounds")
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


def check_shards(config: Any, shards: Any, name: str, kind: str) -> list[Finding]:
    """Whether tars can be indexed and samples decoded; and what is in them."""
    from blipdiff_train.data import check
    from blipdiff_train.data.cache import ShardCache

    if shards is None:
        advice = "; backgrounds are drawn, photographs are better" if kind == "backgrounds" else ""
        return [Finding("warn", name, f"none{advice}")]
    listed = (
        [shards] if isinstance(shards, str) or not any(isinstance(part, dict) for part in shards) else shards
    )
    data, found = config.data, []
    for part in listed:
        found += check.check_shards(
            part["shards"] if isinstance(part, dict) else part,
            kind=kind,
            depth=config.depth,
            name=name,
            cache=ShardCache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None,
            max_bad_fraction=data.max_bad_fraction,
        )
    return [Finding(STATES[finding.level], finding.subject, finding.text) for finding in found]


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
