"""From a folder to shards: what comes out, that it never depends on workers or interruptions, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import blipdiff_train
from blipdiff_train.__main__ import compose, quote_stage
from blipdiff_train.common.files import sha256_file
from blipdiff_train.common.images import decode_image
from blipdiff_train.data.shards import ShardSet
from blipdiff_train.prepare.advice import CAUSES, next_command
from blipdiff_train.prepare.job import hold_output, run
from blipdiff_train.prepare.settings import make_settings

SMALL = {"photographs_per_shard": 5, "workers": 1, "progress": False, "filters": {"blur": 1.0}}


def bytes_of(folder: Path) -> dict[str, str]:
    """Hash of everything that must be reproducible; the report holds times and is not among it."""
    names = [*folder.glob("shard-*"), folder / "rejected.jsonl"]
    return {path.name: sha256_file(path) for path in names}


def test_a_folder_becomes_shards_and_every_photograph_is_accounted_for(photographs, tmp_path, capsys):
    output = tmp_path / "shards"
    summary = run(input=str(photographs), output=str(output), **SMALL | {"progress": True})
    bar = capsys.readouterr().err
    assert "18 photographs of 2 categories, segmented by grabcut, 1 process\n" in bar
    assert "prepare: 18 of 18 photographs in " in bar
    assert "\r" not in bar
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
    assert (output / "report.html").is_file()


def test_a_second_cut_rejects_bad_mattes_and_changes_nothing_else(dreambench, tmp_path):
    """A dog of which the muzzle is found and a bowl of which the berries are; another dog, and a duck."""
    for name in ("dog/00", "dog/01", "berry_bowl/05", "duck_toy/00"):
        target = tmp_path / "photos" / f"{name}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((dreambench / f"{name}.jpg").read_bytes())
    found = {}
    for limit in (None, 0.7):
        output = tmp_path / f"shards-{limit}"
        filters = {"agreement": limit}
        summary = run(input=str(tmp_path / "photos"), output=str(output), workers=1, progress=False, filters=filters)
        shards = ShardSet(str(output))
        found[limit] = {sample["__key__"]: sample for sample in map(shards.read, range(len(shards)))}
        assert summary.rejected == ({"disputed": 2} if limit else {})
        assert ("agreement with a second cut</b>" in (output / "report.html").read_text()) == (limit is not None)
    rejected = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in rejected] == ["berry_bowl/05.jpg", "dog/00.jpg"]
    assert len(found[None]) == 4
    assert len(found[0.7]) == 2
    for key, sample in found[0.7].items():
        other = found[None][key]
        facts = json.loads(sample["json"])
        assert facts.pop("agreement") >= 0.7
        assert facts == json.loads(other["json"])
        assert (sample["alpha.png"], sample["fg.jpg"]) == (other["alpha.png"], other["fg.jpg"])


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
    with pytest.raises(ValueError, match=r"filters\.blur was 1\.0 and is 2\.0\. Choose"):
        run(input=str(photographs), output=output, **SMALL | {"limit": 5, "filters": {"blur": 2.0}})
    assert run(input=str(photographs), output=output, overwrite=True, **SMALL | {"limit": 4}).num_photographs == 4


def test_a_job_that_failed_before_its_first_shard_does_not_hold_its_output(photographs, tmp_path, monkeypatch):
    output = str(tmp_path / "shards")
    with monkeypatch.context() as patched:
        patched.setattr("blipdiff_train.prepare.work.write_shards", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(input=str(photographs), output=output, **SMALL | {"limit": 3})
    assert run(input=str(photographs), output=output, **SMALL | {"limit": 2}).num_photographs == 2


def test_a_second_process_in_the_same_output_is_refused_and_other_parts_are_not(photographs, tmp_path):
    same = {"input": str(photographs), "output": str(tmp_path / "shards")}
    with hold_output(tmp_path / "shards", make_settings(same)):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is preparing there now; let it finish"):
            run(**same, **SMALL)
        with pytest.raises(ValueError, match="is preparing there now"):
            run(**same, **SMALL, step="duplicates", part="0/2")
    first = same | {"step": "duplicates", "part": "0/2"}
    with hold_output(tmp_path / "shards", make_settings(first)):
        with pytest.raises(ValueError, match=r"part=0/2: process .+ is preparing there now"):
            run(**first, **SMALL)
        with pytest.raises(ValueError, match="is preparing there now"):
            run(**same, **SMALL)
        assert run(**first | {"part": "1/2"}, **SMALL).num_units_missing == 4
    assert run(**same, **SMALL).num_samples == 12


def test_the_photographs_folder_is_no_output(photographs):
    with pytest.raises(ValueError, match="is the input too"):
        run(input=str(photographs), output=str(photographs), **SMALL)
    assert not list(photographs.glob("*.tar"))


def test_photographs_without_any_category_are_refused_before_work_is_done(photographs, tmp_path):
    flat = photographs / "cup"
    with pytest.raises(ValueError, match=r"none of its \d+ photographs has a category.*categories='toy dog' for all"):
        run(input=str(flat), output=str(tmp_path / "o"), **SMALL)
    assert not (tmp_path / "o").exists()


def test_a_file_name_that_is_no_text_is_prepared_and_reported(photographs, tmp_path):
    good = photographs / "cup/07.png"
    os.rename(good, os.fsencode(photographs) + b"/cup/odd\xff.png")
    with open(os.fsencode(photographs) + b"/cup/bad\xff.png", "wb") as file:
        file.write(b"no photograph")
    summary = run(input=str(photographs), output=str(tmp_path / "o"), **SMALL)
    assert (summary.num_samples, summary.rejected["unreadable"]) == (12, 3)
    assert "cup/bad\\\\xff.png" in (tmp_path / "o/rejected.jsonl").read_text()
    assert "cup/odd\\xff.png" in (tmp_path / "o/report.html").read_text()


def test_ctrl_c_keeps_what_is_finished_and_says_that_the_same_command_continues(photographs, tmp_path):
    words = [f"input={photographs}", "output=shards", "photographs_per_shard=1", "filters.blur=1.0", "workers=2"]
    command = [sys.executable, "-m", "blipdiff_train", "prepare", *words]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("shards/.job/unit-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85, said
    assert said.endswith("stopped: finished shards are kept in shards: the same command continues\n")
    assert "Traceback" not in said
    finished = len(list((tmp_path / "shards/.job").glob("unit-*.json")))
    assert 1 <= finished < 18
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert " of 18 done before\n" in again.stderr
    assert again.stdout.endswith(
        "look at shards/report.html, then train:\n  python -m blipdiff_train stage=2 data.shards=shards\n"
    )
    assert len(ShardSet(str(tmp_path / "shards"))) == 12


FOLDERS = ["shards", "my shards", "it's (new), {a: b}", 'a "b" $HOME', "back\\slash\\", "[x]=y"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_next_command_reads_the_folder_it_names_whatever_its_name(folder):
    words = shlex.split(next_command("subjects", f"/data/{folder}"))
    assert words[:3] == ["python", "-m", "blipdiff_train"]
    assert compose("train", [quote_stage(word) for word in words[3:]])["data"]["shards"] == f"/data/{folder}"


def test_a_worker_without_models_starts_without_torch():
    code = "import sys, blipdiff_train.prepare.work; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_cause_has_its_advice():
    package = Path(blipdiff_train.__file__).parent
    code = "".join(path.read_text() for path in (*package.glob("context/*.py"), *package.glob("prepare/*.py")))
    causes = set(re.findall(r'(?:Rejection|Rejected)\(\s*"(\w+)"', code)) | {"no_foreground", "no_background"}
    assert causes == set(CAUSES)


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
