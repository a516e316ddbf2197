"""Is this data fit for a run? Everything that would stop or spoil it later, found before a GPU is taken."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from blipdiff_train.common.images import MAX_PIXELS
from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.data.cache import ShardCache
from blipdiff_train.data.shards import SampleError, ShardSet
from blipdiff_train.data.tar_index import ShardError
from blipdiff_train.data.transforms import (
    ALPHA_SUFFIX,
    FOREGROUND_SUFFIXES,
    PHOTO_SUFFIXES,
    decode_alpha,
    decode_photo,
    image_number,
    read_info,
    stage2_texts,
    text_field,
)

Level = Literal["ok", "warning", "error"]
Depth = Literal["sample", "full"]
Kind = Literal["stage1", "stage2", "photographs"]

SAMPLED = 64
"""Samples that depth "sample" decodes, spread over the whole data set."""

LISTED = 20
"""Bad samples that are named one by one for each cause."""

_CATEGORIES = 5
_READ: dict[str, tuple[str, ...]] = {
    "stage1": (*PHOTO_SUFFIXES, "json", "txt"),
    "stage2": (*PHOTO_SUFFIXES, *FOREGROUND_SUFFIXES, ALPHA_SUFFIX, "json", "txt"),
    "photographs": PHOTO_SUFFIXES,
}


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, how it stands, what was found; ``details`` name the places."""

    subject: str
    level: Level
    text: str
    details: tuple[str, ...] = ()


def check_shards(
    shards: str | Sequence[str],
    *,
    kind: Kind,
    depth: Depth = "sample",
    name: str = "shards",
    cache: ShardCache | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bad_fraction: float = 0.01,
    met: dict[bytes, str] | None = None,
) -> list[Finding]:
    """Open, count and decode shards.

    Every depth indexes all shards and looks at the keys and members of all samples. A sample that a run would replace
    is a warning, and an error when there are more of them than ``max_bad_fraction``: then a run would stop.

    Args:
        shards: see :func:`~blipdiff_train.data.shards.expand`.
        kind: what the samples must have: a caption (stage 1), also a category and a matte (stage 2), a photograph only.
        depth: "sample" decodes a fixed choice of 64 samples, "full" every one.
        name: what to call them in the table.
        cache: for remote shards.
        max_pixels, max_bad_fraction: as in training.
        met: photographs of other sets, content → where; copies of them are reported. The ones decoded here are added.
    """
    try:
        opened = ShardSet(shards, cache=cache)
    except (ShardError, OSError) as error:
        first, *more = str(error).splitlines()
        return [Finding(name, "error", first, tuple(line.strip() for line in more))]
    empty = [shard.name for shard in opened.shards if shard.num_samples == 0]
    if len(opened) == 0:
        return [Finding(name, "error", f"{len(opened.shards)} shards hold no samples", _listed(empty))]
    findings = [Finding(name, "ok", f"{len(opened.shards)} shards, readable and contiguous, {len(opened)} samples")]
    if empty:
        findings.append(Finding(name, "warning", f"{len(empty)} empty shards", _listed(empty)))
    findings.append(_check_keys(opened, name))
    incomplete = _incomplete(opened, kind)
    indices: Sequence[int] = range(len(opened))
    if depth == "sample" and len(opened) > SAMPLED:
        indices = sorted(numpy_generator(0, "check.sample").choice(len(opened), SAMPLED, replace=False).tolist())
    contents = _decode(opened, [index for index in indices if index not in incomplete], kind, max_pixels)
    findings += _bad_samples(contents, incomplete, len(indices), len(opened), name, max_bad_fraction)
    findings += _check_photographs(contents, kind, name, met if met is not None else {})
    if kind != "photographs" and contents.texts:
        findings.append(_check_texts(contents.texts, name))
    if contents.mattes:
        findings += _check_mattes(contents, name)
    return findings


# --------------------------------------------------------------------------------------------- keys and members of all


def _check_keys(shards: ShardSet, name: str) -> Finding:
    """Keys that occur in several shards; inside one the index refuses them."""
    seen: dict[bytes, int] = {}
    twice = []
    for index in range(len(shards)):
        key = shards.key(index)
        first = seen.setdefault(hashlib.blake2b(key.encode(), digest_size=12).digest(), index)
        if first != index:
            twice.append(f"{_place(shards, first)} and {_place(shards, index)}")
    if twice:
        return Finding(name, "warning", f"{len(twice)} keys occur in several shards: copies?", _listed(twice))
    return Finding(name, "ok", "every key occurs once")


def _incomplete(shards: ShardSet, kind: Kind) -> dict[int, str]:
    """Samples without a member they need, as the index tells: number → what is missing."""
    needed = {f".{' or .'.join(PHOTO_SUFFIXES)}": set(PHOTO_SUFFIXES)}
    if kind != "photographs":
        needed[".json" if kind == "stage2" else ".json or .txt"] = {"json"} if kind == "stage2" else {"json", "txt"}
    if kind == "stage2":
        needed[f".{ALPHA_SUFFIX}"] = {ALPHA_SUFFIX}
    found = {}
    for index in range(len(shards)):
        there = set(shards.suffixes(index))
        missing = [words for words, suffixes in needed.items() if not there & suffixes]
        if missing:
            found[index] = f"{_place(shards, index)} has no {' and no '.join(missing)}"
    return found


# ------------------------------------------------------------------------------------------------- decoding of samples


@dataclass
class _Contents:
    """What decoding found. ``where`` is "shard: key" of a sample."""

    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # cause → messages
    photographs: dict[bytes, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # where, number
    shorter_sides: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    categories: Counter[str] = field(default_factory=Counter)
    mattes: list[tuple[str, float, float, float]] = field(default_factory=list)  # where, and the shares of _matte


def _decode(shards: ShardSet, indices: Sequence[int], kind: Kind, max_pixels: int) -> _Contents:
    """Read what a run would read."""
    found = _Contents()
    for index in indices:
        where = _place(shards, index)
        try:
            record = shards.read(index, _READ[kind])
            image, _ = decode_photo(record, max_pixels=max_pixels)
            info = {} if kind == "photographs" else read_info(record)
            if kind == "stage1":
                text = text_field(record, info, "caption")
            elif kind == "stage2":
                subject, text, _ = stage2_texts(record, info)
                alpha_matte = decode_alpha(record, max_pixels=max_pixels)
                _same_size(record, alpha_matte.shape, image.shape[:2])
                if any(suffix in record for suffix in FOREGROUND_SUFFIXES):
                    foreground, _ = decode_photo(record, FOREGROUND_SUFFIXES, max_pixels=max_pixels)
                    _same_size(record, foreground.shape[:2], image.shape[:2])
        except SampleError as error:
            found.bad[error.cause].append(str(error))
            continue
        except OSError as error:
            found.bad["unreadable"].append(f"{where}: {error}")
            continue
        digest = hashlib.blake2b(image.tobytes(), digest_size=12).digest()
        found.photographs[digest].append((where, image_number(record, info)))
        found.shorter_sides.append(min(image.shape[:2]))
        if kind != "photographs":
            found.texts.append(text)
        if kind == "stage2":
            found.categories[subject] += 1
            found.mattes.append((where, *_matte(alpha_matte)))
    return found


def _matte(alpha_matte: np.ndarray) -> tuple[float, float, float]:
    """Shares of 1: subject in the photograph, subject along its frame, pixels that are neither subject nor background.

    The frame is its outermost pixels.
    """
    frame = np.concatenate([alpha_matte[0], alpha_matte[-1], alpha_matte[:, 0], alpha_matte[:, -1]])
    between = np.count_nonzero((alpha_matte > 25) & (alpha_matte < 230)) / alpha_matte.size
    return float(alpha_matte.mean()) / 255, float(frame.mean()) / 255, between


def _same_size(record, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        message = f"{record['__shard__']}: {record['__key__']}: {found}, photograph {expected}; expected equal sizes"
        raise SampleError("matte size", message)


# ----------------------------------------------------------------------------------------------------------- judgement


def _bad_samples(
    contents: _Contents, incomplete: dict[int, str], num_decoded: int, total: int, name: str, max_bad_fraction: float
) -> list[Finding]:
    num_bad = sum(map(len, contents.bad.values()))
    if num_decoded == total:
        share = (num_bad + len(incomplete)) / total
    else:  # members are known of all samples, contents of a few
        share = max(len(incomplete) / total, num_bad / num_decoded)
    level: Level = "error" if share > max_bad_fraction else "warning"
    findings = []
    if incomplete:
        text = f"{len(incomplete)} of {total} samples lack a member"
        findings.append(Finding(name, level, text, _listed(list(incomplete.values()))))
    for cause, messages in sorted(contents.bad.items(), key=lambda item: -len(item[1])):
        text = f"{len(messages)} of {num_decoded} samples: {cause}"
        findings.append(Finding(name, level, text, _listed(messages)))
    if level == "error":
        text = f"{share:.1%} bad, more than data.max_bad_fraction={max_bad_fraction:g}: a run would stop"
        findings.append(Finding(name, "error", text))
    elif share:
        text = f"{num_decoded} of {total} samples decoded; a run would replace the {share:.1%} that are bad"
        findings.append(Finding(name, "ok", text))
    else:
        findings.append(Finding(name, "ok", f"{num_decoded} of {total} samples decoded, all good"))
    return findings


def _check_photographs(contents: _Contents, kind: Kind, name: str, met: dict[bytes, str]) -> list[Finding]:
    sides = contents.shorter_sides
    if not sides:
        return []
    findings = [Finding(name, "ok", f"shorter sides {min(sides)} to {max(sides)} px, median {int(np.median(sides))}")]
    same = [places for places in contents.photographs.values() if len(places) > 1]
    # in stage 1 a photograph may have several captions, when image_id says so
    copies = [p for p in same if kind != "stage1" or len({number for _, number in p}) > 1]
    if copies:
        text = f"{sum(len(p) - 1 for p in copies)} of {len(sides)} photographs have the same pixels as another"
        if kind == "stage1":
            text += " and another image_id: each would be the other's wrong answer"
        findings.append(
            Finding(name, "warning", text, _listed([" and ".join(where for where, _ in p) for p in copies]))
        )
    elsewhere = [f"{p[0][0]} and {met[digest]}" for digest, p in contents.photographs.items() if digest in met]
    if elsewhere:
        text = f"{len(elsewhere)} photographs are in other shards of this run too"
        findings.append(Finding(name, "warning", text, _listed(elsewhere)))
    met.update((digest, p[0][0]) for digest, p in contents.photographs.items() if digest not in met)
    return findings


def _check_texts(texts: list[str], name: str) -> Finding:
    lengths, different = [len(text.split()) for text in texts], len(set(texts))
    words = f"texts of {min(lengths)} to {max(lengths)} words, {different} different ones in {len(texts)}"
    if different == 1 < len(texts):
        return Finding(name, "warning", f"{words}: every sample says {texts[0][:60]!r}")
    return Finding(name, "ok", words)


def _check_mattes(contents: _Contents, name: str) -> list[Finding]:
    shares = [share for _, share, _, _ in contents.mattes]
    text = f"subjects cover {min(shares):.0%} to {max(shares):.0%} of their photographs, median {np.median(shares):.0%}"
    findings = [Finding(name, "ok", text)]
    odd = {
        "cover less than 1 % of their photograph": lambda share, frame, between: share < 0.01,
        "cover more than 95 %: is the background cut away at all?": lambda share, frame, between: share > 0.95,
        "have more subject along the frame than inside: upside down, 255 must be subject?": (
            lambda share, frame, between: frame > 0.5 and frame > share and share <= 0.95
        ),
        "are neither subject nor background in more than half of their pixels": (
            lambda share, frame, between: between > 0.5
        ),
    }
    for words, is_odd in odd.items():
        places = [where for where, *shares_of_matte in contents.mattes if is_odd(*shares_of_matte)]
        if places:
            text = f"{len(places)} of {len(shares)} mattes {words}"
            findings.append(Finding(name, "warning", text, _listed(places)))
    most = ", ".join(f"{category} {count}" for category, count in contents.categories.most_common(_CATEGORIES))
    more = ", …" if len(contents.categories) > _CATEGORIES else ""
    findings.append(Finding(name, "ok", f"{len(contents.categories)} categories: {most}{more}"))
    return findings


def _place(shards: ShardSet, index: int) -> str:
    return f"{shards.shards[shards.locate(index)[0]].name}: {shards.key(index)}"


def _listed(items: Sequence[str]) -> tuple[str, ...]:
    more = (f"and {len(items) - LISTED} more",) if len(items) > LISTED else ()
    return (*items[:LISTED], *more)
