"""Is this data fit for a run? Everything that would stop or spoil it later, found before a GPU is taken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from blipdiff_train.common.images import MAX_PIXELS
from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.data.cache import ShardCache
from blipdiff_train.data.order import accumulation
from blipdiff_train.data.shards import SampleError, ShardSet
from blipdiff_train.data.tar_index import ShardError
from blipdiff_train.data.transforms import (
    FOREGROUND_SUFFIXES,
    decode_alpha,
    decode_photo,
    read_info,
    text_field,
)

Level = Literal["ok", "warning", "error"]
Depth = Literal["sample", "full"]

SAMPLED = 64
"""Samples that depth "sample" decodes, spread over the whole data set."""

_EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, how it stands, and (not for "ok") what to do is part of the text."""

    subject: str
    level: Level
    text: str


def check_shards(
    shards: str | Sequence[str],
    *,
    kind: Literal["stage1", "stage2", "backgrounds"],
    depth: Depth = "sample",
    name: str = "shards",
    cache: ShardCache | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad_fraction: float = 0.01,
) -> list[Finding]:
    """Open, count and decode shards.

    Args:
        shards: see :func:`~blipdiff_train.data.shards.expand`.
        kind: what the samples must have: a caption (stage 1), also a category and a matte (stage 2), a photograph only.
        depth: "sample" decodes a fixed choice of 64 samples, "full" every one.
        name: what to call them in the table.
        cache: for remote shards.
        max_pixels, max_bad_fraction: as in training.
    """
    try:
        opened = ShardSet(shards, cache=cache)
    except (ShardError, OSError) as error:
        return [Finding(name, "error", str(error))]
    findings = [Finding(name, "ok", f"{len(opened.shards)} shards, readable and contiguous, {len(opened)} samples")]
    if len(opened) == 0:
        return [Finding(name, "error", f"{len(opened.shards)} shards hold no samples")]
    empty = [shard.name for shard in opened.shards if shard.num_samples == 0]
    if empty:
        findings.append(Finding(name, "warning", f"{len(empty)} empty shards: {_some(empty)}"))
    findings += _check_keys(opened, name)
    indices: Sequence[int] = range(len(opened))
    if depth == "sample" and len(opened) > SAMPLED:
        indices = sorted(numpy_generator(0, "check.sample").choice(len(opened), SAMPLED, replace=False).tolist())
    return findings + list(_check_samples(opened, indices, kind, name, max_pixels, max_bad_fraction))


def _check_keys(shards: ShardSet, name: str) -> list[Finding]:
    """Keys that occur in several shards; inside one the index refuses them."""
    seen: dict[bytes, int] = {}
    twice = []
    for index in range(len(shards)):
        key = shards.key(index)
        digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
        if seen.setdefault(digest, index) != index:
            twice.append(key)
    if twice:
        return [
            Finding(name, "warning", f"{len(twice)} keys occur in several shards: {_some(twice)}; are they copies?")
        ]
    return [Finding(name, "ok", "every key occurs once")]


def _check_samples(
    shards: ShardSet, indices: Sequence[int], kind: str, name: str, max_pixels: int, max_bad_fraction: float
) -> Iterator[Finding]:
    bad: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    contents: Counter[bytes] = Counter()
    sizes, shares, categories = [], [], Counter()
    for index in indices:
        try:
            record = shards.read(index)
            image, _ = decode_photo(record, max_pixels=max_pixels)
            contents[hashlib.blake2b(image.tobytes(), digest_size=12).digest()] += 1
            sizes.append(min(image.shape[:2]))
            if kind != "backgrounds":
                info = read_info(record)
                text_field(record, info, "caption" if kind == "stage1" or "prompt" not in info else "prompt")
            if kind == "stage2":
                categories[text_field(record, info, "subject")] += 1
                alpha_matte = decode_alpha(record, max_pixels=max_pixels)
                _same_size(record, alpha_matte.shape, image.shape[:2])
                if any(suffix in record for suffix in FOREGROUND_SUFFIXES):
                    foreground, _ = decode_photo(record, FOREGROUND_SUFFIXES, max_pixels=max_pixels)
                    _same_size(record, foreground.shape[:2], image.shape[:2])
                shares.append(float(alpha_matte.mean()) / 255)
        except (SampleError, OSError) as error:
            cause = error.cause if isinstance(error, SampleError) else "unreadable"
            bad[cause] += 1
            examples.setdefault(cause, []).append(str(error))
    checked = f"{len(indices)} of {len(shards)} samples decoded"
    too_many = sum(bad.values()) > max_bad_fraction * len(indices)
    for cause, count in bad.most_common():
        text = f"{count} × {cause}: {_some(examples[cause])}"
        yield Finding(name, "error" if too_many else "warning", text)
    if not bad:
        yield Finding(name, "ok", f"{checked}, all good")
    elif too_many:
        share = sum(bad.values()) / len(indices)
        text = f"{checked}, {share:.1%} bad, more than max_bad_fraction={max_bad_fraction:g}: a run would stop"
        yield Finding(name, "error", text)
    else:
        yield Finding(name, "ok", f"{checked}, {sum(bad.values())} bad; a run would replace them")
    if sizes:
        yield Finding(name, "ok", f"shorter sides {min(sizes)} to {max(sizes)} px, median {int(np.median(sizes))}")
    copies = sum(count - 1 for count in contents.values())
    if copies:
        yield Finding(name, "warning", f"{copies} of {len(indices)} photographs have the same pixels as another")
    if shares:
        yield from _check_mattes(shares, categories, name)


def _check_mattes(shares: list[float], categories: Counter, name: str) -> Iterator[Finding]:
    tiny, full = sum(share < 0.01 for share in shares), sum(share > 0.95 for share in shares)
    text = f"subjects cover {min(shares):.0%} to {max(shares):.0%} of their photographs, median {np.median(shares):.0%}"
    odd = [
        f"{tiny} below 1 %" if tiny else "",
        f"{full} above 95 % (is the background cut away at all?)" if full else "",
    ]
    yield Finding(name, "warning" if tiny or full else "ok", "; ".join([text, *filter(None, odd)]))
    most = ", ".join(f"{category} {count}" for category, count in categories.most_common(_EXAMPLES))
    yield Finding(name, "ok", f"{len(categories)} categories: {most}" + (", …" if len(categories) > _EXAMPLES else ""))


def check_batches(
    *, num_samples: int, global_batch_size: int, micro_batch_size: int, world_size: int, total_steps: int
) -> list[Finding]:
    """Does the global batch divide, and how many epochs is the run?"""
    try:
        micro_batches = accumulation(global_batch_size, micro_batch_size, world_size)
    except ValueError as error:
        return [Finding("batches", "error", str(error))]
    text = f"{global_batch_size} = {world_size} processes × {micro_batch_size} × {micro_batches} micro-batches"
    findings = [Finding("batches", "ok", text)]
    if num_samples:
        epochs = total_steps * global_batch_size / num_samples
        text = f"{total_steps} steps × {global_batch_size} samples = {epochs:.3g} epochs of {num_samples}"
        findings.append(Finding("batches", "ok", text))
        if num_samples < global_batch_size:
            text = (
                f"{num_samples} samples are fewer than a global batch of {global_batch_size}: samples repeat inside it"
            )
            findings.append(Finding("batches", "warning", text))
    return findings


def _same_size(record, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        message = f"{record['__shard__']}: {record['__key__']}: {found}, photograph {expected}; expected equal sizes"
        raise SampleError("matte size", message)


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:_EXAMPLES]) + (f"; and {len(items) - _EXAMPLES} more" if len(items) > _EXAMPLES else "")
