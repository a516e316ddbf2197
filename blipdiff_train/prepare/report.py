"""One HTML file to judge a job by: counts, limits and what they reject, mattes, rejections, categories, time."""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from blipdiff_train.common.files import configs_folder, write_text
from blipdiff_train.common.images import ImageError, decode_image
from blipdiff_train.common.progress import clock
from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.context.composite import blend, blend_on_background
from blipdiff_train.data.shards import ShardSet
from blipdiff_train.prepare.advice import CAUSES, next_command, why_nothing
from blipdiff_train.prepare.records import Record
from blipdiff_train.prepare.settings import FilterSettings, Settings
from blipdiff_train.prepare.work import THUMBNAIL_PX, encode, mattes_path, small

REJECTED_SHOWN = 8
NEAREST_SHOWN = 6
LISTED = 200

CAPTION_SOURCES = {
    "given": "came with the photograph",
    "model": "the captioner",
    "template": "a photo of a ⟨category⟩",
}

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #222; --soft: #5a5a5a; --box: #f4f5f7; --line: #ddd;
  --kept: #4c78a8; --gone: #e08a3c; --limit: #c22; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e6e6e6; --soft: #a5a8ad; --box: #24272c;
  --line: #3a3e45; --kept: #6f9fd8; --gone: #e9a05c; --limit: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 1.5rem auto;
  max-width: 1024px; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 48rem; } p.soft, figcaption { color: var(--soft); }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.numbers div { background: var(--box); border-radius: 8px; padding: .6rem 1rem; }
.numbers b { display: block; font-size: 1.5rem; }
.grid { display: flex; flex-wrap: wrap; gap: 14px 24px; } figure { margin: 0; max-width: 100%; }
.pictures { display: flex; gap: 5px; align-items: flex-start; } .of3 { width: 490px; } .of2 { width: 325px; }
.of1 { width: 160px; } .pictures div { flex: 0 1 160px; min-width: 0; }
figure img { display: block; border-radius: 4px; max-width: 100%; height: auto; }
figcaption { font-size: 12px; line-height: 1.35; margin-top: 3px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
tr + tr td { border-top: 1px solid var(--line); } code, pre { font-size: 13px; }
td:last-child:not(.n) { overflow-wrap: anywhere; min-width: 10rem; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--box); border-radius: 8px; padding: .6rem 1rem; overflow-x: auto; white-space: pre-wrap; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem 1.6rem; } svg { display: block; max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--ink); } .kept { fill: var(--kept); } .gone { fill: var(--gone); }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.limitword { fill: var(--limit); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; vertical-align: -.05em; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 500px) { td, th { font-size: 12.5px; padding-right: .5rem; } }
"""


@dataclass(frozen=True)
class Measure:
    """One thing that a filter looks at: where kept samples have it, which causes reject by it, and its limits.

    ``limits`` gives (smallest or None, largest or None) of the settings; ``edges`` are those of the histogram's bars,
    drawn equally wide, with a tick of (edge, word) here and there.
    """

    key: str
    name: str
    setting: str
    causes: tuple[str, ...]
    limits: Callable[[FilterSettings], tuple[float | None, float | None]]
    edges: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]
    word: Callable[[float], str]


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


_SHARES = tuple(i / 40 for i in range(41))
_SHARE_TICKS = ((0.0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %"))
_POWERS = tuple(10 ** (i / 8) for i in range(33))

MEASURES = (
    Measure(
        "area",
        "area of the matte",
        "filters.area",
        ("too_small", "too_large"),
        lambda filters: filters.area or (None, None),
        _SHARES,
        _SHARE_TICKS,
        _share,
    ),
    Measure(
        "unknown_share",
        "unknown share of the trimap",
        "filters.unknown_share",
        ("too_uncertain",),
        lambda filters: (None, filters.unknown_share),
        _SHARES,
        _SHARE_TICKS,
        _share,
    ),
    Measure(
        "border_contact",
        "border contact",
        "filters.border_contact",
        ("cut_off",),
        lambda filters: (None, filters.border_contact),
        _SHARES,
        _SHARE_TICKS,
        _share,
    ),
    Measure(
        "num_components",
        "separate parts of the matte",
        "filters.num_components",
        ("in_pieces",),
        # drawn after the bar of the largest number allowed
        lambda filters: (None, filters.num_components),
        tuple(i + 0.5 for i in range(21)),
        ((1.0, "1"), (5.0, "5"), (10.0, "10"), (15.0, "15"), (20.0, "20+")),
        lambda value: f"{value:g}",
    ),
    Measure(
        "agreement",
        "agreement with a second cut",
        "filters.agreement",
        ("disputed",),
        lambda filters: (filters.agreement, None),
        _SHARES,
        _SHARE_TICKS,
        _share,
    ),
    Measure(
        "sharpness",
        "sharpness, variance of the Laplacian",
        "filters.blur",
        ("blurred",),
        lambda filters: (filters.blur, None),
        _POWERS,
        ((1.0, "≤ 1"), (10.0, "10"), (100.0, "100"), (1000.0, "1,000"), (10000.0, "10,000+")),
        lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
    ),
)


def write_report(
    path: Path,
    settings: Settings,
    records: Sequence[Record],
    accounts: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report of a finished job to ``path``, self-contained: every picture is inside the file.

    Args:
        settings: of the job.
        records: all photographs, by number.
        accounts: of all units, in order; their samples have the measures, their seconds the time of each step.
        rejected: entries as in ``rejected.jsonl``.
    """
    samples = [sample for account in accounts for sample in account["samples"]]
    num_shards = sum(account["shard"] is not None for account in accounts)
    causes = Counter(entry["cause"] for entry in rejected)
    parts = [
        f"<h1>Prepared {html.escape(settings.kind)}</h1>",
        f"<p>from <code>{html.escape(settings.input)}</code>"
        + (f", segmented by <code>{html.escape(settings.segmenter.name)}</code>" if _has_mattes(settings) else "")
        + "</p>",
        '<div class="numbers">'
        + _number(len(records), "photographs")
        + _number(len(samples), f"kept ({len(samples) / max(1, len(records)):.0%})")
        + _number(len(rejected), "rejected")
        + _number(num_shards, "shard" if num_shards == 1 else "shards")
        + "</div>",
        _next(settings, causes, bool(samples)),
    ]
    if causes:
        parts += ["<h2>Why photographs were rejected</h2>", _causes(causes, len(records))]
    parts += ["<h2>Measures and limits</h2>", _charts(settings, samples, rejected)]
    shards = ShardSet(settings.output) if samples else None
    if shards is not None:
        parts += ["<h2>Kept, drawn at random</h2>", _kept(settings, shards, samples)]
        parts += ["<h2>Kept, nearest to a limit</h2>", _nearest(settings, shards, samples)]
    if causes:
        parts += ["<h2>Rejected, by cause</h2>", _rejections(settings, records, accounts, rejected, causes)]
    if _has_mattes(settings):
        parts += ["<h2>Categories</h2>", _categories(samples, rejected)]
    captions = Counter(sample["caption_source"] for sample in samples if "caption_source" in sample)
    if captions:
        rows = [(CAPTION_SOURCES[source], count) for source, count in captions.most_common()]
        parts += ["<h2>Where the captions are from</h2>", _table(rows, ("source", "samples"))]
    parts += ["<h2>Time of each step</h2>", _times(accounts, len(records))]
    parts += ["<h2>Settings and thresholds</h2>", _thresholds(settings)]
    page = "\n".join(parts)
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Preparation report: {html.escape(Path(settings.output).name)}</title><style>{_STYLE}</style></head>"
        f"<body>\n{page}\n</body></html>\n",
    )


def _has_mattes(settings: Settings) -> bool:
    return settings.kind == "subjects"


def _next(settings: Settings, causes: Counter[str], is_something_left: bool) -> str:
    if not is_something_left:
        return f"<p><b>{html.escape(why_nothing(causes))}</b></p>"
    look = (
        "Look at the pictures: the limits find a matte that is too small, cut off or in pieces, not one that shows the "
        "wrong thing. "
    )
    command = html.escape(next_command(settings.kind, settings.output))
    return (
        f"<p>{look if _has_mattes(settings) else ''}To train on these shards:</p><pre>{command}</pre>"
        '<p class="soft">To change a limit, give its key to the same <code>prepare</code> command, with '
        "<code>overwrite=true</code> or another <code>output</code>.</p>"
    )


def _causes(causes: Counter[str], num_photographs: int) -> str:
    rows = [
        (cause, count, f"{count / max(1, num_photographs):.1%}", _Words(CAUSES[cause]))
        for cause, count in causes.most_common()
    ]
    return _table(rows, ("cause", "count", "of all", _Words("what it means, or what to change")))


# ---- pictures --------------------------------------------------------------------------------------------------------


def spread(count: int, total: int, seed: int, purpose: str) -> list[int]:
    """``count`` of ``total`` positions in order: one drawn at random from each of ``count`` equal stretches."""
    count = min(count, total)
    draws = numpy_generator(seed, purpose).random(count)
    edges = [place * total // count for place in range(count + 1)] if count else []
    return [low + int(draw * (high - low)) for (low, high), draw in zip(itertools.pairwise(edges), draws, strict=True)]


def _kept(settings: Settings, shards: ShardSet, samples: Sequence[Mapping[str, Any]]) -> str:
    """Photographs with their subject over a checkerboard and on another sample's photograph."""
    chosen = spread(settings.report.num_thumbnails, len(samples), settings.seed, "report")
    if not chosen:
        return "<p>none shown: report.num_thumbnails is 0</p>"
    what = ": photograph, subject over a checkerboard, subject on another photograph" if _has_mattes(settings) else ""
    figures = "".join(_sample(settings, shards, samples, index, composite=True) for index in chosen)
    return f'<p class="soft">{len(chosen)} of {len(samples)}{what}</p><div class="grid">{figures}</div>'


def _nearest(settings: Settings, shards: ShardSet, samples: Sequence[Mapping[str, Any]]) -> str:
    """For each limit the kept samples that it nearly rejected: what raising or lowering it would take away first."""
    parts = []
    for measure in MEASURES:
        smallest, largest = measure.limits(settings.filters)
        for limit, sign in ((smallest, 1), (largest, -1)):
            if limit is None or not settings.report.num_thumbnails:
                continue
            measured = [index for index, sample in enumerate(samples) if measure.key in sample]
            # the other end of the scale is not near: nothing touches the border, everything is in one piece
            floor = {"border_contact": 0, "num_components": 1}.get(measure.key, -1)
            measured = [index for index in measured if sign > 0 or samples[index][measure.key] > floor]
            nearest = sorted(measured, key=lambda index: (sign * samples[index][measure.key], index))[:NEAREST_SHOWN]
            if nearest:
                words = f"{'smallest' if sign > 0 else 'largest'} {measure.name} (limit {measure.word(limit)}, "
                figures = "".join(
                    _sample(settings, shards, samples, index, first=f"{measure.word(samples[index][measure.key])} · ")
                    for index in nearest
                )
                parts.append(
                    f"<h3>{html.escape(words)}<code>{measure.setting}</code>)</h3>"
                    f'<div class="grid">{figures}</div>'
                )
    return "".join(parts) or "<p>no sample is near a limit</p>"


def _sample(
    settings: Settings,
    shards: ShardSet,
    samples: Sequence[Mapping[str, Any]],
    index: int,
    *,
    composite: bool = False,
    first: str = "",
) -> str:
    sample = shards.read(index)
    facts = json.loads(sample["json"])
    image = _pixels(sample[settings.image.format])
    pictures = [(small(image), "photograph")]
    if not _has_mattes(settings):
        return _figure(pictures, f"{first}{facts['source']}")
    matte = np.asarray(decode_image(sample["alpha.png"], name=sample["__key__"], mode="L"))
    foreground = _pixels(sample["fg.jpg"]) if "fg.jpg" in sample else image
    pictures.append((on_checkerboard(foreground, matte), "subject over a checkerboard"))
    if composite:
        other = shards.read((index + len(shards) // 2) % len(shards), [settings.image.format])
        blended, _ = blend_on_background(
            foreground,
            matte,
            _pixels(other[settings.image.format]),
            size_px=THUMBNAIL_PX,
            generator=numpy_generator(settings.seed, "report", index),
        )
        pictures.append((blended, "subject on another photograph"))
    measures = f"area {_share(facts['area'])}, unknown {_share(facts['unknown_share'])} · " if composite else ""
    caption = f"{first}{facts['source']} · {facts['subject']} · {measures}“{facts['caption']}”"
    return _figure(pictures, caption)


def _rejections(
    settings: Settings,
    records: Sequence[Record],
    accounts: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    causes: Counter[str],
) -> str:
    by_cause: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in rejected:
        by_cause[entry["cause"]].append(entry)
    unit_of = {entry["number"]: account["unit"] for account in accounts for entry in account["rejected"]}
    record_of = {record.name: record for record in records}
    parts = []
    for cause, count in causes.most_common():
        entries = by_cause[cause]
        figures = []
        for place in spread(REJECTED_SHOWN, count, settings.seed, f"report {cause}"):
            entry = entries[place]
            photograph = _thumbnail(records[entry["number"]], settings)
            pictures = _with_name(photograph, "photograph")
            matte = _rejected_matte(Path(settings.output), unit_of[entry["number"]], entry["number"])
            if photograph is not None and matte is not None:
                matte = cv2.resize(matte, photograph.shape[1::-1])  # of another rounding
                pictures.append((on_checkerboard(photograph, matte), "what would have been cut out"))
            if "repeats" in entry:
                pictures += _with_name(_thumbnail(record_of[entry["repeats"]], settings), "the one that was kept")
            detail = entry["detail"].removeprefix(f"{entry['source']}: ")
            figures.append(_figure(pictures, f"{entry['source']}: {detail}"))
        parts.append(f'<h3>{html.escape(cause)}: {count}</h3><div class="grid">{"".join(figures)}</div>')
        if count > len(figures):
            listed = "".join(f"<li>{html.escape(entry['source'])}</li>" for entry in entries[:LISTED])
            more = f"<li>… {count - LISTED} more in rejected.jsonl</li>" if count > LISTED else ""
            parts.append(f"<details><summary>all {count}</summary><ul>{listed}{more}</ul></details>")
    return "".join(parts)


def _with_name(picture: np.ndarray | None, name: str) -> list[tuple[np.ndarray, str]]:
    return [] if picture is None else [(picture, name)]


def _thumbnail(record: Record, settings: Settings) -> np.ndarray | None:
    try:
        picture = decode_image(record.read(), name=record.name, max_pixels=settings.image.max_pixels)
    except (ImageError, OSError):
        return None
    return small(np.asarray(picture))


def _rejected_matte(output: Path, unit: int, number: int) -> np.ndarray | None:
    try:
        jpeg = base64.b64decode(json.loads(mattes_path(output, unit).read_text("utf-8"))[str(number)])
    except (OSError, ValueError, KeyError):
        return None  # rejected before there was a matte, or one of many in its unit
    return np.asarray(decode_image(jpeg, name="matte", mode="L"))


def checkerboard(rows: int, columns: int, tile_px: int = 8) -> np.ndarray:
    """Light grey and white squares, rows columns 3 uint8: shows transparency as every picture editor does."""
    y, x = np.mgrid[:rows, :columns] // tile_px
    return np.repeat(np.where((x + y) % 2, 255, 204).astype(np.uint8)[..., None], 3, axis=2)


def on_checkerboard(image: np.ndarray, alpha_matte: np.ndarray) -> np.ndarray:
    """The cut-out subject (H W 3 uint8 and H W uint8) over a checkerboard, as a thumbnail."""
    matte = small(alpha_matte)
    return blend(small(image), matte, checkerboard(*matte.shape))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _charts(
    settings: Settings, samples: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> str:
    charts = []
    for measure in MEASURES:
        kept = [sample[measure.key] for sample in samples if measure.key in sample]
        gone = [entry["value"] for entry in rejected if entry["cause"] in measure.causes and "value" in entry]
        if kept or gone:
            charts.append(_chart(measure, kept, gone, measure.limits(settings.filters)))
    legend = (
        '<p class="soft"><span class="swatch" style="background:var(--kept)"></span> kept '
        '<span class="swatch" style="background:var(--gone)"></span> rejected by this measure '
        '<span style="color:var(--limit)">┆ limit</span></p>'
    )
    return f'{legend}<div class="charts">{"".join(charts)}</div>'


def _chart(
    measure: Measure,
    kept: Sequence[float],
    gone: Sequence[float],
    limits: tuple[float | None, float | None],
) -> str:
    """Bars of kept samples, rejected photographs stacked on them, and the limits, as inline SVG."""
    edges = np.asarray(measure.edges)
    bins = len(edges) - 1
    counts = [
        np.bincount(np.clip(np.searchsorted(edges, values, side="right") - 1, 0, bins - 1), minlength=bins)
        if values
        else np.zeros(bins, int)
        for values in (kept, gone)
    ]
    top, height, width = 26, 110, 308
    highest = max(1, int((counts[0] + counts[1]).max()))
    bar, base = width / bins, top + height

    def across(value: float) -> float:
        return float(np.interp(value, edges, np.arange(bins + 1))) * bar

    shapes = []
    for i in range(bins):
        floor = base
        for kind, word, count in (("kept", "kept", counts[0][i]), ("gone", "rejected", counts[1][i])):
            if count:
                tall = max(1.5, height * count / highest)  # one of a hundred thousand shows too
                floor -= tall
                between = f"{measure.word(edges[i])} to {measure.word(edges[i + 1])}"
                shapes.append(
                    f'<rect class="{kind}" x="{i * bar + 0.5:.1f}" y="{floor:.1f}" width="{bar - 1:.1f}" '
                    f'height="{tall:.1f}"><title>{between}: {count} {word}</title></rect>'
                )
    shapes.append(f'<path d="M0 {base}H{width}" stroke="currentColor" stroke-width=".7"/>')
    for value, word in measure.ticks:
        x = across(value)
        anchor = "start" if x < 12 else "end" if x > width - 12 else "middle"
        shapes.append(f'<text x="{x:.1f}" y="{base + 14}" text-anchor="{anchor}">{html.escape(word)}</text>')
    for limit, is_largest in zip(limits, (False, True), strict=True):
        if limit is None:
            continue
        x = across(limit + 0.5 if measure.key == "num_components" else limit)
        anchor = "start" if x < width / 2 else "end"
        word = html.escape(f"{'≤' if is_largest else '≥'} {measure.word(limit)}")
        shapes.append(f'<path class="limit" d="M{x:.1f} 14V{base}"/>')
        shapes.append(f'<text class="limitword" x="{x:.1f}" y="11" text-anchor="{anchor}">{word}</text>')
    median = f"median of the kept {measure.word(float(np.median(kept)))}, " if kept else ""
    unlimited = "" if any(limit is not None for limit in limits) else ", no limit"
    name = html.escape(measure.name)
    words = f"{median}{sum(counts[1])} rejected, highest bar {highest}{unlimited}"
    return (
        f'<figure style="width:{width}px"><b>{name}</b>'
        f'<svg viewBox="0 0 {width} {base + 18}" width="{width}" height="{base + 18}" role="img" '
        f'aria-label="histogram, {name}: {html.escape(words)}">{"".join(shapes)}</svg>'
        f"<figcaption>{html.escape(words)} · <code>{measure.setting}</code></figcaption></figure>"
    )


def _categories(samples: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]) -> str:
    """The categories with the smallest share kept come first: there a segmenter or a limit does not fit."""
    kept = Counter(sample["subject"] for sample in samples)
    gone: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in rejected:
        if "subject" in entry:
            gone[entry["subject"]][entry["cause"]] += 1
    rows = []
    for category in kept.keys() | gone.keys():
        count, causes = kept[category], gone[category]
        total = count + causes.total()
        words = ", ".join(f"{cause} {number}" for cause, number in causes.most_common())
        rows.append((category, count, causes.total(), f"{count / total:.0%}", _Words(words), count / total, total))
    rows.sort(key=lambda row: (row[5], -row[6], row[0]))
    shown = [row[:5] for row in rows[:LISTED]]
    table = _table(shown, ("category", "kept", "rejected", "share kept", _Words("rejected for")))
    more = f"<p>… {len(rows) - LISTED} more, with larger shares kept</p>" if len(rows) > LISTED else ""
    words = f'<p class="soft">{len(rows)} in all, the smallest share kept first</p>'
    if len(shown) <= 30:
        return words + table + more
    return f"{words}<details><summary>the first {len(shown)}</summary>{table}{more}</details>"


def _times(accounts: Sequence[Mapping[str, Any]], num_photographs: int) -> str:
    total: Counter[str] = Counter()
    for account in accounts:
        total.update(account["seconds"])
    rows = [
        (step, f"{value:.1f}", f"{1000 * value / max(1, num_photographs):.0f}") for step, value in total.most_common()
    ]
    rows.append(("all", f"{total.total():.1f}", f"{1000 * total.total() / max(1, num_photographs):.0f}"))
    table = _table(rows, ("step", "seconds, all processes", "ms a photograph"))
    return f'{table}<p class="soft">{clock(total.total())} in one process; the search for duplicates not counted</p>'


def _thresholds(settings: Settings) -> str:
    """Every setting that decides the result, with the reason of its default."""
    values = _flat(settings.identity())
    defaults = _flat(Settings(input="", output="").identity())
    rows = []
    reasons = threshold_reasons()
    for key, value in values.items():
        changed = "" if value == defaults[key] else f"default {_plain(defaults[key])}: " if key in reasons else "yours"
        rows.append((key, _plain(value), _Words(changed + reasons.get(key, ""))))
    return _table(rows, ("key", "value", _Words("about the default")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def threshold_reasons() -> dict[str, str]:
    """Dotted key → the comment behind it, or in the lines above it, in ``configs/commands/prepare.yaml``."""
    reasons: dict[str, str] = {}
    block, above = "", []
    for line in (configs_folder() / "commands" / "prepare.yaml").read_text("utf-8").splitlines():
        words, _, comment = (part.strip() for part in line.partition("# "))
        if not words:
            above.append(comment)
            continue
        key = words.split(":")[0]
        if line[0] != " ":
            block = key
            above = []
            dotted = key
        else:
            dotted = f"{block}.{key}"
        if comment:
            reasons[dotted], above = comment, []
        elif above:
            reasons[dotted] = " ".join(above)
    return reasons


# ---- HTML ------------------------------------------------------------------------------------------------------------


class _Words(str):
    """A cell of text, and not of a number, at another place than the first."""


def _table(rows: Sequence[Sequence[Any]], heading: Sequence[str]) -> str:
    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if place == 0 or isinstance(cell, _Words) else ' class=n'}>{html.escape(str(cell))}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(heading, "th")}</tr>{body}</table></div>'


def _number(value: int, name: str) -> str:
    return f"<div><b>{value:,}</b>{html.escape(name)}</div>"


def _figure(pictures: Sequence[tuple[np.ndarray, str]], caption: str) -> str:
    """Pictures (H W 3 uint8, each with its alternative text) beside each other, over a caption."""
    images = "".join(
        f'<div><img width="{picture.shape[1]}" height="{picture.shape[0]}" alt="{html.escape(name)}" '
        f'title="{html.escape(name)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(encode(picture, "jpg", 85)).decode()}"></div>'
        for picture, name in pictures
    )
    beside = f'<div class="pictures">{images}</div>' if images else ""
    return f'<figure class="of{max(1, len(pictures))}">{beside}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, name="sample"))
