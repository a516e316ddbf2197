"""The report as a reader's browser gets it: whole, safe, fair, bounded, and true to the job's numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pictures import draw
from PIL import Image

from blipdiff_train.prepare.job import run
from blipdiff_train.prepare.report import MEASURES, spread, threshold_reasons
from blipdiff_train.prepare.settings import FilterSettings

EVIL = '<b>&"x'
SMALL = {"photographs_per_shard": 5, "workers": 1, "progress": False, "filters": {"blur": 1.0, "area": [0.06, 0.9]}}


class Page(HTMLParser):
    """Pictures, text by section, bars of the histograms and tags of a report."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images, self.tags, self.section, self.text = [], set(), "", {}
        self._heading = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "h2":
            self._heading, self.section = True, ""
        if tag == "img":
            self.images.append((self.section, dict(attributes)))

    def handle_endtag(self, tag):
        if tag == "h2":
            self._heading = False

    def handle_data(self, data):
        if self._heading:
            self.section += data
        self.text[self.section] = self.text.get(self.section, "") + data + "\n"


@pytest.fixture
def report(photographs, tmp_path) -> tuple[Page, Path]:
    """Of a job that keeps some, and rejects a few for each of six causes."""
    folder = photographs / EVIL
    folder.mkdir()
    for number in range(3):
        Image.fromarray(draw(40 + number, (90, 100))).save(folder / f"{number}.png")
    speck = np.random.default_rng(0).integers(60, 90, (120, 120, 3)).astype(np.uint8)
    speck[50:66, 50:66] = (255, 0, 0)
    Image.fromarray(speck).save(folder / "speck.png")
    summary = run(input=str(photographs), output=str(tmp_path / "out"), **SMALL)
    assert summary.rejected["too_small"] >= 1
    return Page(tmp_path / "out/report.html"), tmp_path / "out"


def test_the_file_is_whole_and_names_cannot_break_out_of_it(report):
    page, output = report
    text = (output / "report.html").read_text("utf-8")
    assert not page.tags & {"script", "link", "iframe", "object", "b>&"}
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[\w+/=]+", "", text))
    assert all(image["src"].startswith("data:image/jpeg;base64,") for _, image in page.images)
    assert all(image["alt"] and image["width"] and image["height"] for _, image in page.images)
    assert "<b>&\"x" not in text
    assert EVIL in page.text["Categories"]
    assert f"{EVIL}/speck.png" in page.text["Rejected, by cause"]


def test_it_has_what_a_decision_needs(report):
    page, output = report
    assert f"python -m blipdiff_train stage=2 data.shards={output}" in page.text[""]
    assert "lower the first number of filters.area" in page.text["Why photographs were rejected"]
    assert "≥ 6 %" in page.text["Measures and limits"]
    assert "default [0.02, 0.9]: below, 70 × 70 px" in page.text["Settings and thresholds"]
    assert "smallest area of the matte (limit 6 %" in page.text["Kept, nearest to a limit"]
    assert "ms a photograph" in page.text["Time of each step"]
    shown = [image["alt"] for section, image in page.images if section == "Rejected, by cause"]
    assert shown.count("what would have been cut out") >= 1  # of the speck, which had a matte
    assert shown.count("the one that was kept") == 1  # beside the duplicate


def test_the_histograms_hold_every_sample_and_every_value_that_was_rejected(report):
    _, output = report
    text = (output / "report.html").read_text("utf-8")
    accounts = [json.loads(path.read_text()) for path in (output / ".job").glob("unit-*.json")]
    num_kept = sum(len(account["samples"]) for account in accounts)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    measures = [measure for measure in MEASURES if measure.key != "agreement"]  # not measured unless asked for
    for measure, chart in zip(measures, charts, strict=True):
        bars = re.findall(r": (\d+) (kept|rejected)</title>", chart)
        assert sum(int(count) for count, kind in bars if kind == "kept") == num_kept
        values = [entry["value"] for entry in rejected if entry["cause"] in measure.causes]
        assert sum(int(count) for count, kind in bars if kind == "rejected") == len(values)
        limits = [limit for limit in measure.limits(FilterSettings()) if limit is not None]
        assert chart.count('class="limit"') == len(limits)


def test_the_nearest_to_a_limit_come_first(report):
    page, output = report
    accounts = [json.loads(path.read_text()) for path in (output / ".job").glob("unit-*.json")]
    samples = [sample for account in accounts for sample in account["samples"]]
    first = min(samples, key=lambda sample: sample["area"])
    words = page.text["Kept, nearest to a limit"].split("smallest area of the matte")[1]
    assert words.index(first["source"]) < words.index("\n", words.index("·"))


def test_a_large_job_has_a_small_report(report):
    page, output = report
    assert sum(section == "Kept, drawn at random" for section, _ in page.images) > 9
    photographs = str(output.parent / "photos")
    run(input=photographs, output=str(output), report={"num_thumbnails": 3}, **SMALL)
    again = Page(output / "report.html")
    assert sum(section == "Kept, drawn at random" for section, _ in again.images) == 3 * 3


def test_the_draw_is_fair_distinct_and_repeatable():
    for count, total in ((8, 10), (48, 77), (48, 5000), (5, 5), (9, 4), (0, 3), (3, 0)):
        drawn = spread(count, total, 0, "test")
        assert drawn == spread(count, total, 0, "test")
        assert len(set(drawn)) == min(count, total)
        for place, index in enumerate(drawn):
            assert place * total // len(drawn) <= index < (place + 1) * total // len(drawn)
    hits = np.bincount(np.concatenate([spread(3, 10, seed, "test") for seed in range(1000)]), minlength=10)
    assert hits.min() > 200


def test_every_limit_has_its_reason_where_the_yaml_has_it():
    reasons = threshold_reasons()
    assert {measure.setting for measure in MEASURES} <= set(reasons)
    assert reasons["trimap.foreground_threshold"] == reasons["trimap.background_threshold"] != ""
    assert "trimap" not in reasons["trimap.margin"]
    assert reasons["image.shortest_side_px"] == "below this an object has no texture left to learn"


def test_a_job_that_rejects_everything_has_a_report_that_says_what_to_change(photographs, tmp_path):
    summary = run(input=str(photographs), output=str(tmp_path / "o"), **SMALL | {"filters": {"area": [0.9, 0.95]}})
    assert summary.num_samples == 0
    page = Page(tmp_path / "o/report.html")
    assert "nothing is left to train on: " in page.text[""]
    assert "filters.area" in page.text[""]
    assert {section for section, _ in page.images} == {"Rejected, by cause"}


def test_backgrounds_are_shown_without_mattes(photographs, tmp_path):
    run(input=str(photographs), output=str(tmp_path / "b"), kind="backgrounds", **SMALL)
    page = Page(tmp_path / "b/report.html")
    assert f"stage=2 data.shards=SUBJECTS data.backgrounds={tmp_path / 'b'}" in page.text[""]
    drawn = [image["alt"] for section, image in page.images if section == "Kept, drawn at random"]
    assert drawn == ["photograph"] * 13
    assert "Categories" not in page.text
