"""Processes beside each other: the bytes of one, none left over, one death forgiven, and no more work than asked."""

from __future__ import annotations

import getpass
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import psutil
import pytest
from image_to_text import write_blip
from pictures import draw
from PIL import Image
from test_job import bytes_of

import blipdiff_train
from blipdiff_train.context import generator
from blipdiff_train.context.segmentation import GrabCutSegmenter
from blipdiff_train.data.toybox.write import write_photograph_folder
from blipdiff_train.prepare import job, local_engine, work
from blipdiff_train.prepare.settings import make_settings

REPOSITORY = Path(__file__).parents[2]
CLIPSEG = Path(blipdiff_train.__file__).parent / "assets" / "toy_foundation" / "clipseg"
TOY = {"progress": False, "photographs_per_shard": 4, "image": {"shortest_side_px": 16, "format": "png"}}
TOY |= {"filters": {"blur": None, "duplicate_distance": None, "unknown_share": None, "border_contact": None}}


def toy_job(folder: Path, output: Path, **more) -> dict:
    models = {"segmenter": {"name": "clipseg", "model": str(CLIPSEG), "batch_size": 3}}
    models["captioner"] = {"model": str(folder / "blip"), "max_new_tokens": 4, "replace": True}
    return TOY | models | {"input": str(folder / "photos"), "output": str(output)} | more


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with toy photographs, a captioner, and the job's result when one process does everything."""
    folder = tmp_path_factory.mktemp("toy")
    write_photograph_folder(folder / "photos", 14, size=64)
    write_blip(folder / "blip")
    assert job.run(**toy_job(folder, folder / "one", workers=1)).num_samples > 10
    return folder


class Watched(work.Worker):
    """Notes in the output in which process it is, and how many processes the job has."""

    def __call__(self, unit):
        family = psutil.Process(os.getppid()).children()
        names = [" ".join(child.cmdline()) for child in family]
        count = sum("spawn_main" in name or "import serve" in name for name in names)
        Path(self.settings.output, f"seen-{os.getpid()}-{count}").touch()
        return super().__call__(unit)


@pytest.mark.slow
def test_two_devices_and_two_workers_give_the_bytes_of_one_process(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "Worker", Watched)
    output = tmp_path / "four"
    job.run(**toy_job(toy, output, workers=2, accelerator="cpu", devices=2))
    assert bytes_of(output) == bytes_of(toy / "one")
    seen = [path.name.split("-") for path in output.glob("seen-*")]
    assert len({pid for _, pid, _ in seen}) == 2
    assert {count for *_, count in seen} == {"4"}
    assert "wait for a model" in (output / "report.html").read_text()
    assert not multiprocessing.active_children()


def test_devices_that_are_not_there_are_counted_in_the_message(toy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"devices=2, but this machine has 0 GPUs; .* add accelerator=cpu"):
        job.run(**toy_job(toy, tmp_path / "o", devices=2))
    with pytest.raises(ValueError, match=r"this machine has 0 GPUs; use accelerator=cpu"):
        job.run(**toy_job(toy, tmp_path / "o", accelerator="gpu"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"devices=3, but this machine has 2 GPUs; allowed are 1 to 2"):
        job.run(**toy_job(toy, tmp_path / "o", devices=3))
    with pytest.raises(ValueError, match=r"devices=2, but nothing here runs on an accelerator: segmenter.name=grabcut"):
        job.run(input=str(toy / "photos"), output=str(tmp_path / "o"), devices=2)
    values = toy_job(toy, tmp_path / "o")
    del values["progress"]
    settings = make_settings(values)
    names = job.plan_devices(settings, 4, "this machine", "cuda:{}".format)
    assert names == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert not (tmp_path / "o").exists()


def test_a_model_that_cannot_be_loaded_ends_the_job_with_its_name(toy, tmp_path):
    (tmp_path / "empty").mkdir()
    settings = toy_job(toy, tmp_path / "o", captioner={"model": None}, accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match=r"segmenter.model=.*empty: cannot be loaded"):
        job.run(**settings | {"segmenter": {"name": "clipseg", "model": str(tmp_path / "empty")}})
    assert not multiprocessing.active_children()


class DieOnce:
    """A worker whose process is killed at unit 1, as by the system for want of memory, as often as files say."""

    def __init__(self, settings, *, models=None):
        self.worker, self.output = work.Worker(settings, models=models), Path(settings.output)

    def __call__(self, unit):
        left = sorted(self.output.glob("die-*"))
        if unit.index == 1 and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker(unit)


def test_a_worker_that_dies_is_replaced_once(photographs, tmp_path, monkeypatch):
    settings = {"photographs_per_shard": 5, "progress": False, "filters": {"blur": 1.0, "duplicate_distance": None}}
    job.run(input=str(photographs), output=str(tmp_path / "whole"), workers=1, **settings)
    monkeypatch.setattr(job, "Worker", DieOnce)
    dying = tmp_path / "dying"
    dying.mkdir()
    for name in ("die-0", "die-1"):
        (dying / name).touch()
    with pytest.raises(RuntimeError, match="died twice at the same task"):
        job.run(input=str(photographs), output=str(dying), workers=2, **settings)
    assert not multiprocessing.active_children()
    (dying / "die-2").touch()
    # with one unit left there would be no process but this one to die
    (dying / ".job/unit-000000.json").unlink(missing_ok=True)
    job.run(input=str(photographs), output=str(dying), workers=2, **settings)
    assert bytes_of(dying) == bytes_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill -9", "Ctrl-C"])
def test_a_job_that_is_ended_takes_its_processes_with_it_and_goes_on(end, photographs, tmp_path):
    settings = {"photographs_per_shard": 1, "progress": False, "filters": {"blur": 1.0, "duplicate_distance": None}}
    settings |= {"segmenter": {"name": "clipseg", "model": str(CLIPSEG), "batch_size": 2}, "accelerator": "cpu"}
    arguments = settings | {"input": str(photographs), "output": str(tmp_path / "ended"), "workers": 2, "devices": 2}
    code = f"from blipdiff_train.prepare.job import run\nif __name__ == '__main__': run(**{arguments!r})"
    (tmp_path / "job.py").write_text(code)
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")],
        cwd=REPOSITORY,
        env=environment() | {"TMPDIR": str(tmp_path / "scratch")},
        start_new_session=True,
    )
    wait_for(lambda: list((tmp_path / "ended").glob("shard-*.tar")) or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    if end == "kill -9":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.wait()
    assert len(children) >= 4
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert {path.name for path in (tmp_path / "scratch").iterdir()} <= {f"torchinductor_{getpass.getuser()}"}
    assert len(list((tmp_path / "ended/.job").glob("unit-*.json"))) < 18, "the job was over before it could be ended"
    here = arguments | {"workers": 1, "devices": None}
    job.run(**here)
    job.run(**here | {"output": str(tmp_path / "whole")})
    assert bytes_of(tmp_path / "ended") == bytes_of(tmp_path / "whole")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY)}


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


class CountTogether:
    """A task that leaves a file while it runs; returns how many were running."""

    def __init__(self, settings, *, models=None):
        self.folder = Path(settings.output)

    def __call__(self, task):
        mark = self.folder / str(task)
        mark.touch()
        time.sleep(0.05)
        together = len(list(self.folder.iterdir()))
        mark.unlink()
        return together


def test_no_more_tasks_are_under_way_than_workers_however_slow_their_results_are_taken(tmp_path):
    settings = make_settings({"input": "x", "output": str(tmp_path)})
    results = []
    for together in local_engine.run_all(CountTogether, settings, range(12), workers=2):
        time.sleep(0.1)
        results.append(together)
    assert len(results) == 12
    assert max(results) <= 2


def test_work_grows_with_the_photographs_and_memory_does_not(tmp_path, monkeypatch):
    """1, 2 and 4 times the photographs: so many reads, cuts and mattes, and never more than a batch in memory."""
    calls: Counter[str] = Counter()
    alive = most = 0

    def counted(owner, name):
        original = getattr(owner, name)

        def wrapper(*arguments, **keywords):
            calls[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, wrapper)

    def gone():
        nonlocal alive
        alive -= 1

    def watched(*arguments, make=work.Photograph):
        nonlocal alive, most
        photograph = make(*arguments)
        weakref.finalize(photograph, gone)
        alive += 1
        most = max(most, alive)
        return photograph

    monkeypatch.setattr(work, "Photograph", watched)
    counted(GrabCutSegmenter, "_segment")
    counted(generator, "estimate_alpha")
    counted(generator, "estimate_foreground")
    counted(work, "read_photograph")
    counted(work, "perceptual_hash")
    found = {}
    for times in (1, 2, 4):
        folder = tmp_path / f"photos-{times}"
        (folder / "ball").mkdir(parents=True)
        for number in range(12 * times):
            Image.fromarray(draw(number, (48, 40))).save(folder / f"ball/{number:03d}.png")
        calls.clear()
        most = 0
        summary = job.run(
            input=str(folder), output=str(tmp_path / f"out-{times}"), workers=1, photographs_per_shard=24,
            segmenter={"batch_size": 4}, image={"shortest_side_px": 16}, progress=False, report={"enabled": False},
            filters={"duplicate_distance": 0, "blur": None},
        )  # fmt: skip
        assert summary.num_samples == 12 * times
        found[times] = dict(calls), most
    for times, (counts, held) in found.items():
        assert counts == dict.fromkeys(found[1][0], 12 * times)
        assert held <= 2 * 4  # a batch of 4, and the one before it until it is replaced
    assert len(found[1][0]) == 5


def test_the_shares_of_a_job_are_all_of_it_once():
    items = list(range(23))
    for count in (1, 2, 3, 7, 23, 40):
        shares = [job.take_share(items, (number, count)) for number in range(count)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_parts_and_steps_one_after_the_other_make_the_same_job(photographs, tmp_path):
    settings = {"photographs_per_shard": 4, "progress": False, "workers": 1, "filters": {"blur": 1.0}}
    settings |= {"input": str(photographs)}
    job.run(output=str(tmp_path / "whole"), **settings)
    shared = settings | {"output": str(tmp_path / "shared")}
    with pytest.raises(ValueError, match=r"hashes are missing; run step=duplicates"):
        job.run(**shared, step="shards", part="0/2")
    for number in (1, 0):
        job.run(**shared, step="duplicates", part=f"{number}/2")
    assert job.run(**shared, step="shards", part="1/2").num_units_missing == 3
    with pytest.raises(ValueError, match=r"3 of 5 shards are not there yet \(first: 0\)"):
        job.run(**shared, step="report")
    assert not (tmp_path / "shared/report.html").exists()
    for number in (0, 1, 1):
        job.run(**shared, step="shards", part=f"{number}/2")
    assert job.run(**shared, step="report").num_samples == 12
    assert bytes_of(tmp_path / "shared") == bytes_of(tmp_path / "whole")
    assert "Prepared subjects" in (tmp_path / "shared/report.html").read_text()
    for wrong, words in (
        ({"part": "2/2", "step": "shards"}, r"part='2/2', expected k/n with 0 ≤ k < n"),
        ({"part": "0/2"}, "step='all', expected duplicates or shards"),
        ({"part": "0/2", "step": "shards", "overwrite": True}, "overwrite=True, expected false where there is a part"),
    ):
        with pytest.raises(ValueError, match=words):
            job.run(**shared | wrong)


@pytest.mark.slow
def test_the_slurm_script_shares_a_job_among_array_tasks(photographs, tmp_path):
    script = REPOSITORY / "scripts" / "slurm" / "prepare.sbatch"
    words = [f"input={photographs}", "photographs_per_shard=4", "workers=1", "filters.blur=1.0"]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)

    def task(step: str, number: int | None) -> None:
        array = {} if number is None else {"SLURM_ARRAY_TASK_ID": str(number + 1), "SLURM_ARRAY_TASK_MIN": "1"}
        array |= {} if number is None else {"SLURM_ARRAY_TASK_MAX": "2", "SLURM_CPUS_PER_TASK": "1"}
        subprocess.run(
            ["bash", str(script), step, *words, f"output={tmp_path / 'array'}"],
            check=True,
            cwd=REPOSITORY,
            env=environment() | array | {"PATH": f"{tools}:{os.environ['PATH']}"},
        )

    for step in ("duplicates", "shards"):
        for number in (1, 0):
            task(step, number)
    task("report", None)
    settings = {"photographs_per_shard": 4, "progress": False, "workers": 1, "filters": {"blur": 1.0}}
    job.run(input=str(photographs), output=str(tmp_path / "whole"), **settings)
    assert bytes_of(tmp_path / "array") == bytes_of(tmp_path / "whole")
    assert (tmp_path / "array/report.html").is_file()
