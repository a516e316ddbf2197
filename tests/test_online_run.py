"""Stage 2 from plain photographs, as typed, in two processes: the run that prepared shards give, also when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny

from blipdiff_train.data.shards import write_shards
from blipdiff_train.data.toybox.write import photographs

CLIPSEG = "embedded:toy_foundation/clipseg"
ANNOTATION = [
    "image.format=png",
    "image.shortest_side_px=16",
    "segmenter.name=clipseg",
    f"segmenter.model={CLIPSEG}",
    "segmenter.batch_size=4",
    "filters.blur=null",
    "filters.duplicate_distance=null",
    "filters.area=null",
    "filters.border_contact=null",
    "filters.unknown_share=null",
]
NAME = "runs/stage2/default"


def kill_group(process: subprocess.Popen) -> None:
    """As an out-of-memory killer or a power cut: every process at once, loaders and segmenters too."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_two_processes_train_on_photographs_as_on_prepared_shards_and_survive_kills(tmp_path, chaos):
    tiny.write_models(tmp_path / "models")
    for split, count in (("train", 24), ("heldout", 6)):
        samples = [{**sample, "__key__": f"{n:09d}"} for n, sample in enumerate(photographs(count, split=split))]
        for sample in samples:
            del sample["json"]["prompt"]  # `prepare` keeps captions only
        write_shards(samples, tmp_path / split, samples_per_shard=8)
        tiny.run(
            "prepare", f"input={tmp_path / split}", f"output={tmp_path / 'prepared' / split}",
            "photographs_per_shard=8", "workers=1", "report.enabled=false", *ANNOTATION,
        )  # fmt: skip

    def words(output: Path, data: Path, *more: str) -> list[str]:
        common = tiny.overrides(tmp_path / "models", tmp_path, output / "runs", 2)
        ours = [f"data.shards={data}/train", f"data.val_shards={data}/heldout", "data.workers=1", "total_steps=8"]
        return [*common, *ours, "trainer.devices=2", *more]

    prepared = tmp_path / "prepared"
    tiny.run(*words(prepared, prepared))

    online = [*(f"data.annotation.{word}" for word in ANNOTATION), "data.context=online"]
    command = tiny.command(*words(tmp_path / "online", tmp_path, *online))
    folder = tmp_path / "online" / NAME
    made = tmp_path / "train" / ".made"
    with (tmp_path / "log").open("w") as log:
        for moment in (lambda: any(made.rglob("*.entry")), lambda: chaos.last_step(folder) >= 3):
            process = subprocess.Popen(
                command, cwd=tiny.REPOSITORY, stdout=log, stderr=log, start_new_session=True, env=os.environ
            )
            deadline = time.monotonic() + 200
            while not moment() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            ended = process.poll()
            assert ended is None, (tmp_path / "log").read_text()
            kill_group(process)
    tiny.run(*words(tmp_path / "online", tmp_path, *online))
    assert chaos.differences(prepared / NAME, folder) == []
    assert len(list(made.rglob("*.entry"))) == 24
