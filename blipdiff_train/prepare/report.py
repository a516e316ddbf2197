"""One HTML file to judge a job by: counts, mattes over a checkerboard, composites, rejections by cause, histograms."""

from __future__ import annotations

import base64
import html
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from blipdiff_train.common.files import write_text
from blipdiff_train.common.images import ImageError, decode_image
from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.context.composite import blend, blend_on_background
from blipdiff_train.data.shards import ShardSet
from blipdiff_train.prepare.records import Record
from blipdiff_train.prepare.settings import Settings
from blipdiff_train.prepare.work import encode

THUMBNAIL_PX = 160
REJECTED_SHOWN = 8
REJECTED_LISTED = 200

CAPTION_SOURCES = {
    "given": "came with the photograph",
    "model": "the captioner",
    "template": "a photo of a ⟨category⟩",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1024px; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.numbers div { background: #f4f5f7; border-radius: 8px; padding: .6rem 1rem; }
.numbers b { display: block; font-size: 1.5rem; }
.grid { display: flex; flex-wrap: wrap; gap: 14px 24px; } figure { margin: 0; width: 496px; }
figure.single { width: 160px; } figure img { display: inline-block; border-radius: 4px; vertical-align: top; }
figcaption { font-size: 12px; color: #555; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: 13px; }
.charts { display: flex; flex-wrap: wrap; gap: 2rem; } details { margin: .5rem 0; }
"""


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
    causes = Counter(entry["cause"] for entry in rejected)
    captions = Counter(sample["caption_source"] for sample in samples if "caption_source" in sample)
    kept_share = len(samples) / max(1, len(records))
    parts = [
        f"<h1>Prepared {html.escape(settings.kind)}</h1>",
        f"<p>from <code>{html.escape(Path(settings.input).name)}</code>, segmented by "
        f"<code>{html.escape(settings.segmenter.name)}</code></p>",
        '<div class="numbers">'
        + _number(len(records), "photographs")
        + _number(len(samples), f"samples ({kept_share:.0%})")
        + _number(len(rejected), "rejected")
        + _number(sum(account["shard"] is not None for account in accounts), "shards")
        + "</div>",
    ]
    if settings.kind == "subjects" and samples:
        parts += ["<h2>Measures of the samples kept</h2>", _histograms(samples)]
        parts += ["<h2>Photograph, subject over a checkerboard, and on another background</h2>"]
        parts += [_mattes(settings, len(samples))]
    if causes:
        parts += ["<h2>Rejected, by cause</h2>", _rejections(settings, records, rejected, causes)]
    parts += ["<h2>Time of each step</h2>", _times(accounts, len(records))]
    if settings.kind == "subjects" and samples:
        subjects = Counter(sample["subject"] for sample in samples)
        parts += ["<h2>Samples of each category</h2>", _table(subjects.most_common(100), ("category", "samples"))]
    if captions:
        rows = [(CAPTION_SOURCES[source], count) for source, count in captions.most_common()]
        parts += ["<h2>Where the captions are from</h2>", _table(rows, ("source", "samples"))]
    thresholds = json.dumps(settings.identity(), indent=2, default=list, ensure_ascii=False)
    parts += ["<h2>Settings and thresholds</h2>", f"<pre>{html.escape(thresholds)}</pre>"]
    page = "\n".join(parts)
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Preparation report</title><style>{_STYLE}</style></head><body>\n{page}\n</body></html>\n",
    )


def checkerboard(rows: int, columns: int, tile_px: int = 8) -> np.ndarray:
    """Light grey and white squares, rows columns 3 uint8: shows transparency as every picture editor does."""
    y, x = np.mgrid[:rows, :columns] // tile_px
    return np.repeat(np.where((x + y) % 2, 255, 204).astype(np.uint8)[..., None], 3, axis=2)


def on_checkerboard(image: np.ndarray, alpha_matte: np.ndarray, size_px: int = THUMBNAIL_PX) -> np.ndarray:
    """The cut-out subject (H W 3 uint8 and H W uint8) over a checkerboard, longest side ``size_px``."""
    small, matte = _small(image, size_px), _small(alpha_matte, size_px)
    return blend(small, matte, checkerboard(*matte.shape))


def _small(picture: np.ndarray, size_px: int = THUMBNAIL_PX) -> np.ndarray:
    """``picture`` (H W or H W 3) with its longest side ``size_px``."""
    factor = size_px / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _mattes(settings: Settings, num_samples: int) -> str:
    """Evenly spread samples: the photograph, its subject over a checkerboard, and on another sample's photograph."""
    count = min(settings.report.num_thumbnails, num_samples)
    if count == 0:
        return "<p>none shown: report.num_thumbnails is 0</p>"
    shards = ShardSet(settings.output)
    figures = []
    for position in range(count):
        index = position * len(shards) // count
        sample = shards.read(index)
        facts = json.loads(sample["json"])
        image = _pixels(sample[settings.image.format])
        matte = np.asarray(decode_image(sample["alpha.png"], name=sample["__key__"], mode="L"))
        foreground = _pixels(sample["fg.jpg"]) if "fg.jpg" in sample else image
        generator = numpy_generator(settings.seed, "report", index)
        other = shards.read((index + len(shards) // 2) % len(shards), [settings.image.format])
        composite, _ = blend_on_background(
            foreground, matte, _pixels(other[settings.image.format]), size_px=THUMBNAIL_PX, generator=generator
        )
        caption = (
            f"{facts['source']} · {facts['subject']} · area {facts['area']:.0%}, unknown {facts['unknown_share']:.0%}"
            f" · “{facts['caption']}”"
        )
        figures.append(_figure([_small(image), on_checkerboard(foreground, matte), composite], caption))
    return '<div class="grid">' + "".join(figures) + "</div>"


def _rejections(
    settings: Settings, records: Sequence[Record], rejected: Sequence[Mapping[str, Any]], causes: Counter[str]
) -> str:
    by_cause: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in rejected:
        by_cause[entry["cause"]].append(entry)
    parts = []
    for cause, count in causes.most_common():
        figures = []
        for entry in by_cause[cause][:REJECTED_SHOWN]:
            thumbnail = _thumbnail(records[entry["number"]], settings)
            detail = entry["detail"].removeprefix(f"{entry['source']}: ")
            figures.append(_figure([] if thumbnail is None else [thumbnail], f"{entry['source']}: {detail}", True))
        parts.append(f'<h3>{html.escape(cause)}: {count}</h3><div class="grid">{"".join(figures)}</div>')
        if count > len(figures):
            listed = "".join(f"<li>{html.escape(entry['source'])}</li>" for entry in by_cause[cause][:REJECTED_LISTED])
            more = f"<li>… {count - REJECTED_LISTED} more in rejected.jsonl</li>" if count > REJECTED_LISTED else ""
            parts.append(f"<details><summary>all {count}</summary><ul>{listed}{more}</ul></details>")
    return "".join(parts)


def _thumbnail(record: Record, settings: Settings) -> np.ndarray | None:
    try:
        picture = decode_image(record.read(), name=record.name, max_pixels=settings.image.max_pixels)
    except (ImageError, OSError):
        return None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(picture)


def _histograms(samples: Sequence[Mapping[str, Any]]) -> str:
    charts = [("area", "area of the matte"), ("unknown_share", "unknown share"), ("border_contact", "border contact")]
    if "agreement" in samples[0]:  # measured only where it is asked for
        charts.append(("agreement", "agreement with a second cut"))
    return '<div class="charts">' + "".join(_chart([s[key] for s in samples], name) for key, name in charts) + "</div>"


def _chart(values: Sequence[float], name: str, bins: int = 20) -> str:
    """Bars of the shares from 0 to 1 as inline SVG."""
    counts, _ = np.histogram(values, bins=bins, range=(0, 1))
    width, height = 320, 110
    bar = width / bins
    bars = "".join(
        f'<rect x="{i * bar + 1:.1f}" y="{height - height * c / max(1, counts.max()):.1f}" width="{bar - 2:.1f}" '
        f'height="{height * c / max(1, counts.max()):.1f}" fill="#4c78a8">'
        f"<title>{i / bins:.2f} to {(i + 1) / bins:.2f}: {c}</title></rect>"
        for i, c in enumerate(counts.tolist())
    )
    labels = "".join(
        f'<text x="{x}" y="{height + 14}" font-size="11" text-anchor="{anchor}">{text}</text>'
        for x, text, anchor in ((0, "0", "start"), (width / 2, "50 %", "middle"), (width, "100 %", "end"))
    )
    return (
        f'<figure style="width:{width}px"><svg width="{width}" height="{height + 18}" role="img">{bars}{labels}</svg>'
        f"<figcaption>{html.escape(name)}: median {np.median(values):.1%}, highest bar {counts.max()}</figcaption>"
        "</figure>"
    )


def _times(accounts: Sequence[Mapping[str, Any]], num_photographs: int) -> str:
    total: Counter[str] = Counter()
    for account in accounts:
        total.update(account["seconds"])
    rows = [
        (step, f"{value:.1f}", f"{1000 * value / max(1, num_photographs):.0f}") for step, value in total.most_common()
    ]
    return _table(rows, ("step", "seconds, all processes", "ms a photograph"))


def _table(rows: Sequence[Sequence[Any]], heading: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heading)
    body = "".join(
        f"<tr><td>{html.escape(str(row[0]))}</td>" + "".join(f'<td class="n">{v}</td>' for v in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: int, name: str) -> str:
    return f"<div><b>{value}</b>{html.escape(name)}</div>"


def _figure(images: Sequence[np.ndarray], caption: str, single: bool = False) -> str:
    pictures = " ".join(
        f'<img width="{image.shape[1]}" height="{image.shape[0]}" alt="" '
        f'src="data:image/jpeg;base64,{base64.b64encode(encode(image, "jpg", 85)).decode()}">'
        for image in images
    )
    kind = ' class="single"' if single else ""
    return f"<figure{kind}>{pictures}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, name="sample"))
