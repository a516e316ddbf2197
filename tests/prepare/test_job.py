"""From a folder to shards: what comes out, that it never depends on workers or interruptions, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from blipdiff_train.common.files import sha256_file
from blipdiff_train.common.images import decode_image
from blipdiff_train.data.shards import ShardSet
from blipdiff_train.prepare.job import run

SMALL = {"photographs_per_shard": 5, "workers": 1, "progress": False, "filters": {"blur": 1.0}}


def bytes_of(folder: Path) -> dict[str, str]:
    """Hash of everything that must be reproducible; the report holds times and is not among it."""
    names = [*folder.glob("shard-*"), folder / "rejected.jsonl"]
    return {path.name: sha256_file(path) for path in names}


def test_a_folder_becomes_shards_and_every_photograph_is_accounted_for(photographs, tmp_path, capsys):
    output = tmp_path / "shards"
    summary = run(input=str(photographs), output=str(output), **SMALL | {"progress": True})
    bar = capsys.readouterr().err
    assert "prepare: 100%" in bar
    assert "18/18 [" in bar
    assert "photographs/s" in bar or "s/ photographs" in bar
    causes = {"unreadable": 2, "too_few_pixels": 1, "blurred": 1, "duplicate": 1, "no_category": 1}
    assert summary.rejected == causes
    assert (summary.num_photographs, summary.num_samples) == (18, 12)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {entry["source"]: entry["cause"] for entry in rejected} == {
        "cup/broken.jpg": "unreadable",
        "cup/cut.jpg": "unreadable",
        "cup/flat.png": "blurred",
        "cup/tiny.png": "too_few_pixels",
        "nowhere.png": "no_category",
        "red_ball/same.jpg": "duplicate",
    }
    shards = ShardSet(str(output))
    assert len(shards) == 12
    for index in range(len(shards)):
        sample = shards.read(index)
        facts = json.loads(sample["json"])
        image = np.asarray(decode_image(sample["jpg"], name="image"))
        matte = np.asarray(decode_image(sample["alpha.png"], name="matte", mode="L"))
        foreground = np.asarray(decode_image(sample["fg.jpg"], name="foreground"))
        assert matte.shape == image.shape[:2] == (facts["height"], facts["width"])
        assert foreground.shape == image.shape
        assert matte.min() == 0
        assert matte.max() == 255
        assert facts["subject"] in ("red ball", "cup")
        assert facts["provenance"]["segmenter"]["name"] == "grabcut"
        assert facts["provenance"]["foreground_threshold"] == 0.7
        if facts["source"] == "cup/06.png":
            assert (facts["caption"], facts["caption_source"]) == ("my cup on the table", "given")
        else:
            assert facts["caption"] == f"a photo of a {facts['subject']}"
        if facts["source"] == "cup/turned.jpg":
            assert image.shape == (128, 64, 3)
    report = (output / "report.html").read_text()
    # photograph, matte and composite of 12 samples, and the four rejected photographs that can be read
    assert report.count("data:image/jpeg;base64,") == 3 * 12 + 4
    for words in ("too_few_pixels: 1", "area of the matte: median", "unknown share: median", "ms a photograph"):
        assert words in report
    assert "http" not in report.replace("http-equiv", "")
    for threshold in ("border_contact", "foreground_threshold", "duplicate_distance"):
        assert f"&quot;{threshold}&quot;" in report


def test_a_photograph_that_the_numerics_cannot_bear_is_a_rejection_and_not_the_end(photographs, tmp_path, monkeypatch):
    from blipdiff_train.context import generator

    whole = generator.estimate_alpha

    def fails_on_the_turned_one(image, trimap, **keywords):
        if image.shape == (128, 64, 3):
            raise np.linalg.LinAlgError("no convergence")
        return whole(image, trimap, **keywords)

    monkeypatch.setattr(generator, "estimate_alpha", fails_on_the_turned_one)
    summary = run(input=str(photographs), output=str(tmp_path / "o"), **SMALL)
    assert summary.rejected["matting_failed"] == 1
    assert summary.num_samples == 11
    listed = (tmp_path / "o/rejected.jsonl").read_text()
    assert "LinAlgError: no convergence; drop the sample" in listed


def test_one_or_two_processes_give_the_same_bytes_and_a_second_run_does_nothing(photographs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(input=str(photographs), output=str(one), **SMALL)
    run(input=str(photographs), output=str(two), **SMALL | {"workers": 2})
    assert bytes_of(one) == bytes_of(two)
    times = {path: path.stat().st_mtime_ns for path in one.glob("shard-*")}
    again = run(input=str(photographs), output=str(one), **SMALL | {"workers": 2})
    assert again.num_units_reused == again.num_shards
    assert {path: path.stat().st_mtime_ns for path in one.glob("shard-*")} == times


def test_a_killed_job_continues_to_the_same_bytes(photographs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = SMALL | {"photographs_per_shard": 2}
    run(input=str(photographs), output=str(whole), **settings)
    arguments = settings | {"input": str(photographs), "output": str(killed)}
    code = f"from blipdiff_train.prepare.job import run; run(**{arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not list(killed.glob("shard-*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list((killed / ".job").glob("unit-*.json")))
    assert finished < 9, "the job was over before it could be killed"
    # what a crash can leave: a half-written unit, and a shard whose account was never written
    (killed / ".job/unit-000007.1234.tmp").mkdir(exist_ok=True)
    (killed / ".job/unit-000007.1234.tmp/shard-000000.tar").write_bytes(b"half")
    run(input=str(photographs), output=str(killed), **settings)
    assert bytes_of(killed) == bytes_of(whole)
    assert not list((killed / ".job").glob("*.tmp"))


def test_a_lost_shard_is_made_again(photographs, tmp_path):
    output = tmp_path / "shards"
    run(input=str(photographs), output=str(output), **SMALL)
    before = bytes_of(output)
    (output / "shard-000001.tar").unlink()
    run(input=str(photographs), output=str(output), **SMALL)
    assert bytes_of(output) == before


def test_another_job_in_the_output_is_refused_with_the_difference(photographs, tmp_path):
    output = str(tmp_path / "shards")
    run(input=str(photographs), output=output, **SMALL | {"limit": 5})
    with pytest.raises(ValueError, match=r"limit was 5 and is 4; 5 photographs then, 4 now.*overwrite=true"):
        run(input=str(photographs), output=output, **SMALL | {"limit": 4})
    assert run(input=str(photographs), output=output, overwrite=True, **SMALL | {"limit": 4}).num_photographs == 4


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match="prepare cannot start") as caught:
        run(input="x", output="y", workers=0, kind="subject", filters={"arae": [0, 1]}, image={"format": "gif"})
    assert "filters.arae is not a setting; did you mean filters.area?" in str(caught.value)
    with pytest.raises(ValueError, match="prepare cannot start") as caught:
        run(input="x", output="y", workers=0, kind="subject", image={"format": "gif"}, segmenter={"name": "clipseg"})
    for words in (
        "workers=0",
        "kind='subject', expected one of subjects, backgrounds",
        "format='gif'",
        "segmenter.model=",
    ):
        assert words in str(caught.value)


def test_backgrounds_are_photographs_only(photographs, tmp_path):
    summary = run(input=str(photographs), output=str(tmp_path / "b"), kind="backgrounds", **SMALL)
    assert summary.num_samples == 13  # the one without category is good enough here
    assert ShardSet(str(tmp_path / "b")).suffixes(0) == ["jpg", "json"]
