"""Before a run takes GPUs: what it would meet, as a table and an exit code.

Exit codes: 0, a run can start (there may be warnings); 1, at least one check failed; 2, the arguments are wrong.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from blipdiff_train import build
from blipdiff_train.config import Stage1Config, Stage2Config, TrainConfig, resolve_devices
from blipdiff_train.data.check import Finding, Level

if TYPE_CHECKING:
    from torch import nn

    from blipdiff_train.config import DataSettings
    from blipdiff_train.data.datamodule import ShardDataModule
    from blipdiff_train.models.parts import ModelParts

PROJECT = "blipdiff-train"
SHOWN = ("torch", "pytorch-lightning", "transformers", "diffusers", "hydra-core", "webdataset", "pymatting")
"""Packages whose versions stand in the table; all that the project requires are compared with what it requires."""

WORDS: dict[Level, str] = {"ok": "ok", "warning": "warn", "error": "FAIL"}

FITS = 0.8
"""Share of a device's memory that the estimate may take without a warning.

The peak of live tensors in whole steps of the toy models is 10 to 13 % above the estimate (gradients of activations
come and go), and allocators keep pieces.
"""

FALLIBLE = (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""What checks of foreign data and models may raise: a line of the table, not a traceback."""


def run(config: TrainConfig) -> int:
    """Look at everything, print the table; 0 when a run can start, 1 when it cannot."""
    findings: list[Finding] = []

    def show(found: Sequence[Finding]) -> None:
        # line by line, because some checks take minutes
        findings.extend(found)
        for finding in found:
            print(f"{WORDS[finding.level]:>4}  {finding.subject:<17}  {finding.text}", flush=True)
            for line in finding.details:
                print(f"{'':25}{line}", flush=True)

    show([check_versions(), check_devices(config)])
    data = attempt(show, "data", lambda: build.data_sources(config, _say))
    if data is not None:
        show(check_data(config, data))
    parts = attempt(show, "models", lambda: build.parts(config, _say))
    module = attempt(show, "models", lambda: build.module(config, parts)) if parts is not None else None
    if module is not None:
        build.lower_frozen(config, parts, keep=False)
    datamodule = None
    if data is not None and parts is not None:
        datamodule = attempt(show, "batches", lambda: _opened(config, parts, data))
    show(check_batches(config, data, datamodule))
    if module is not None:
        trainable, frozen = count_parameters(module)
        show([Finding("models", "ok", f"{trainable:,} weights train, {frozen:,} are frozen")])
        show([check_room(config, trainable, frozen)])
        show([check_memory(config, module, datamodule)])
    counts = {level: sum(finding.level == level for finding in findings) for level in WORDS}
    warnings = f"{counts['warning']} warning{'s' if counts['warning'] != 1 else ''}" if counts["warning"] else ""
    if counts["error"]:
        print(f"a run cannot start: {counts['error']} of {len(findings)} checks failed{warnings and f', {warnings}'}")
        return 1
    print(f"a run can start{warnings and f' ({warnings})'}")
    return 0


def attempt(show: Callable[[Sequence[Finding]], None], subject: str, function: Callable[[], Any]) -> Any:
    """What ``function`` returns, or None and a failed line."""
    try:
        return function()
    except FALLIBLE as error:
        if os.environ.get("BLIPDIFF_DEBUG"):
            raise
        first, *more = (str(error) or type(error).__name__).splitlines()
        show([Finding(subject, "error", first, tuple(line.strip() for line in more))])
        return None


def _say(line: str) -> None:
    print(f"      {line}", flush=True)


# ---- machine -------------------------------------------------------------------------------------------------------


def check_versions() -> Finding:
    """Whether every package that the project requires is there in a version that it allows."""
    try:
        wanted = [Requirement(line) for line in requires(PROJECT) or ()]
    except PackageNotFoundError:  # run from a checkout that was never installed
        wanted = [Requirement(name) for name in SHOWN]
    problems = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed, needed is {requirement}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}, needed is {requirement}")
    if problems:
        return Finding("versions", "error", f"{len(problems)} packages do not fit", tuple(problems))
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return Finding("versions", "ok", f"python {platform.python_version()}, {shown}")


def check_devices(config: TrainConfig) -> Finding:
    """What the run would compute on, and whether the loaders have processors."""
    import torch

    accelerator, devices, _ = resolve_devices(config.trainer)
    loaders, cores = devices * config.data.workers, len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name(0) if accelerator == "gpu" else f"CPU process{'es' if devices > 1 else ''}"
    words = f"{devices} × {name}{f' on each of {config.trainer.num_nodes} machines' * (config.trainer.num_nodes > 1)}"
    words += f", {loaders} loader processes, {cores} processor cores"
    if loaders > cores:
        return Finding("devices", "warning", f"{words}: lower data.workers={config.data.workers}")
    return Finding("devices", "ok", words)


def check_room(config: TrainConfig, trainable: int, frozen: int) -> Finding:
    """Whether the run's folder can be written and holds the checkpoints kept, one being written, and the model."""
    folder = Path(config.run_dir)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("run folder", "error", f"{folder}: {existing} cannot be written: {error.strerror}")
    one = checkpoint_bytes(config, trainable)
    needed = one * (config.keep_checkpoints + 1) + 4 * (trainable + frozen)
    free = shutil.disk_usage(existing).free
    words = (
        f"{folder}: {config.keep_checkpoints} + 1 checkpoints of {_size(one)} and the model take {_size(needed)}, "
        f"{_size(free)} free"
    )
    if free < needed:
        return Finding("run folder", "error", f"{words}: lower keep_checkpoints or choose another output_dir")
    return Finding("run folder", "ok", words)


def checkpoint_bytes(config: TrainConfig, trainable: int) -> int:
    """Size of a training checkpoint: weights, two moments, and the average where one is kept; fp32."""
    return trainable * 4 * (3 + (config.optim.ema_decay is not None))


# ---- data ----------------------------------------------------------------------------------------------------------


def check_data(config: Stage1Config | Stage2Config, data: DataSettings) -> list[Finding]:
    """Whether shards can be indexed and samples decoded; and what is in them."""
    from blipdiff_train.data.cache import ShardCache
    from blipdiff_train.data.check import check_shards

    cache = ShardCache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None
    online = data.context == "online"  # the photographs have no mattes yet, and their texts are read by `prepare`
    kind = "photographs" if online else f"stage{config.stage}"
    sets = [("training", part, kind) for part in _mixture(data.shards)]
    if data.val_shards is not None:
        sets.append(("validation", data.val_shards, kind))
    if config.stage == 2 and data.backgrounds is not None:
        sets.append(("backgrounds", data.backgrounds, "photographs"))
    met: dict[bytes, str] = {}
    found: list[Finding] = []
    for name, shards, kind_of_set in sets:
        found += check_shards(
            shards,
            kind=kind_of_set,
            depth=config.depth,
            name=name,
            cache=cache,
            max_bad_fraction=data.max_bad_fraction,
            met=met if name != "backgrounds" else None,
        )
    if online:
        words = f"mattes are made by {data.annotation.segmenter.name} in the run; only the photographs are checked here"
        found.append(Finding("mattes", "warning", words))
    if data.val_shards is None:
        found.append(Finding("validation", "warning", "no data.val_shards: the run is never validated"))
    if config.stage == 2 and data.backgrounds is None:
        words = "no data.backgrounds: plain ones are drawn; photographs are better"
        found.append(Finding("backgrounds", "warning", words))
    return found


def _mixture(shards: Any) -> list[Any]:
    if isinstance(shards, str) or not any(isinstance(part, dict) for part in shards):
        return [shards]
    return [part["shards"] for part in shards]


def _opened(config: TrainConfig, parts: ModelParts, data: DataSettings) -> ShardDataModule:
    """The run's loader, in this process, without its list of bad samples: looking leaves no trace in the run folder."""
    datamodule = build.datamodule(config, parts, replace(data, workers=0, cache_latents=False))
    datamodule.quarantine = None
    datamodule.setup("fit")
    return datamodule


def check_batches(config: TrainConfig, data: DataSettings | None, datamodule: ShardDataModule | None) -> list[Finding]:
    """Batch arithmetic, and how often the run sees its data."""
    plan = build.batch_plan(config)
    found = [Finding("batches", "ok", str(plan))]
    if datamodule is None:
        return found
    count, asked = datamodule.num_samples, config.total_steps * config.global_batch_size
    words = f"{config.total_steps:,} steps × {config.global_batch_size:,} samples = {asked:,}, "
    words += f"{asked / count:.3g} epochs of {count:,} samples"
    if count < config.global_batch_size:
        words += f"; fewer samples than a global batch of {config.global_batch_size}: they repeat inside it"
    found.append(Finding("steps", "warning" if count < config.global_batch_size else "ok", words))
    return found


# ---- models and memory ---------------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Trainable and frozen weights."""
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in module.parameters()) - trainable


def check_memory(config: TrainConfig, module: nn.Module, datamodule: ShardDataModule | None) -> Finding:
    """Memory of a device by :func:`estimate_memory`, compared with what there is."""
    import torch

    plan = build.batch_plan(config)
    try:
        estimate = estimate_memory(config, module, datamodule)
    except FALLIBLE as error:
        if os.environ.get("BLIPDIFF_DEBUG"):
            raise
        return Finding("memory", "error", f"no training step can be computed: {error}")
    words = f"{_size(estimate.total)} a device: {_size(estimate.weights)} weights, gradients, moments, averages"
    if estimate.a_sample:
        words += f"; {_size(estimate.activations)} activations of a micro-batch of {plan.micro_batch}"
        words += f" ({_size(estimate.a_sample)} a sample)"
    else:
        words += "; activations unknown, there is no data to try a step on"
    accelerator, _, _ = resolve_devices(config.trainer)
    if accelerator == "gpu":
        there = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        words += f", for each of {plan.world} processes" if plan.world > 1 else ""
    needed = estimate.total * (1 if accelerator == "gpu" else plan.world / config.trainer.num_nodes)
    words += f"; the {'GPU' if accelerator == 'gpu' else 'machine'} has {_size(there)}"
    if needed > there:
        advice = "lower trainer.max_micro_batch, or trainer.gradient_checkpointing=true"
        return Finding("memory", "error", f"{words}: {advice}")
    return Finding("memory", "ok" if needed < FITS * there else "warning", words)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device; ``activations`` of a micro-batch, ``a_sample`` what each sample adds to them."""

    weights: int
    activations: int
    a_sample: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def estimate_memory(config: TrainConfig, module: nn.Module, datamodule: ShardDataModule | None) -> MemoryEstimate:
    """Peak memory of a training step on one device.

    4 bytes a trainable weight for each of the weight, its gradient, AdamW's two moments, the average where one is kept,
    and DDP's gradient buckets with more than one process; the frozen weights in their own precision; and what a forward
    pass of a micro-batch keeps for the backward pass. The last is measured by running training steps forward on the CPU
    with one and two samples (two and four in stage 1, whose losses compare samples), and continued linearly: batch size
    enters every term but the contrast matrix, which is small. What comes on top is told at :data:`FITS`.
    """
    from blipdiff_train.data.samples import collate_stage1, collate_stage2

    trainable, _ = count_parameters(module)
    plan = build.batch_plan(config)
    copies = 4 + (config.optim.ema_decay is not None) + (plan.world > 1)
    frozen = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    frozen += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    weights = 4 * copies * trainable + frozen
    if datamodule is None:
        return MemoryEstimate(weights, 0, 0)
    collate = collate_stage1 if config.stage == 1 else collate_stage2
    dataset = datamodule.train_dataset()
    kept = {}
    for size in (1, 2) if config.stage == 2 else (2, 4):
        batch = collate([dataset[position] for position in range(size)], datamodule.normalisation)
        kept[size] = kept_for_backward(module, batch, config.trainer.precision)
    (small, low), (large, high) = kept.items()
    a_sample = max(0, (high - low) // (large - small))
    return MemoryEstimate(weights, max(0, low + a_sample * (plan.micro_batch - small)), a_sample)


def kept_for_backward(module: nn.Module, batch: Any, precision: str) -> int:
    """Bytes that a training step's forward pass keeps for its backward pass, without the weights themselves."""
    import warnings

    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        warnings.filterwarnings("ignore", message=".*self.log.*")
        loss = module.training_step(batch, 0)
    del loss
    return sum(kept.values())


def _size(count: float) -> str:
    """Bytes for people."""
    for unit, words in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {words}"
    return f"{count / 1e3:.3g} kB"
