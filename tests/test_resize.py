"""A run that goes on with another number of processes: the same global batches, the same schedule, the same losses.

Equal to a tolerance: the order of additions differs. Dropout is switched off, because its masks are drawn for each
process; captions have one length, because the captioning loss is a mean over each process's tokens (as in LAVIS).
Run as a program, this file is the run under test: processes are forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

PARTS = [(1, 2), (2, 2), (1, None)]
"""Processes, and the steps after which the start is stopped; the run has six."""


def write_data(folder: Path) -> None:
    """24 photographs of which one is broken; captions of seven tokens, all different."""
    from itertools import product

    from blipdiff_train.data import toybox
    from blipdiff_train.data.samples import stage1_record, stage2_record
    from blipdiff_train.data.shards import write_shards

    words = product(("red", "blue"), ("dog", "cat", "boat"), ("beach", "snow"), ("red", "blue"))
    captions = [f"{colour} {subject} on {scene} with {other} spots" for colour, subject, scene, other in words]
    drawn = [toybox.sample(number, split="train", size=16) for number in range(24)]
    broken = b"\x89PNG\r\n\x1a\n broken"
    records1 = (
        stage1_record(f"{n:05d}", broken if n == 5 else sample.image, caption)
        for n, (sample, caption) in enumerate(zip(drawn, captions, strict=True))
    )
    records2 = (
        stage2_record(f"{n:05d}", broken if n == 5 else s.image, s.alpha, subject=s.subject, caption=caption)
        for n, (s, caption) in enumerate(zip(drawn, captions, strict=True))
    )
    write_shards(records1, folder / "stage1", samples_per_shard=10)
    write_shards(records2, folder / "stage2", samples_per_shard=10)


def settings(world: Path, data: Path, output: Path, stage: int) -> list[str]:
    words = tiny.overrides(world / "models", data, output, stage)
    words += ["data.val_shards=null", "every.validation=null", "every.checkpoint=100", "data.max_bad_fraction=1.0"]
    return [*words, "model.qformer.dropout=0.0", "optim.ema_decay=0.9"]


def main(world: Path, output: Path) -> None:
    """For each stage the run without a stop, and the run in parts."""
    sys.path.insert(0, str(tiny.REPOSITORY / "scripts"))
    import chaos
    import torch
    from runs import StopAfter

    import blipdiff_train.build
    import blipdiff_train.stages.resume
    import blipdiff_train.stages.stage1
    import blipdiff_train.stages.stage2
    import blipdiff_train.train
    from blipdiff_train.stages import callbacks

    torch.nn.Dropout.forward = lambda self, states: states  # the projection's is no setting

    def note_batch(self, trainer, module, batch, batch_idx) -> None:
        self._keys.append(list(batch.keys))
        with (output / f"{stage}-{part}.jsonl").open("a") as file:  # short lines do not mix
            file.write(json.dumps([batch.positions.tolist(), batch.keys]) + "\n")

    callbacks.FiniteCheck.on_train_batch_start = note_batch
    starts = [("straight", 0, 1, None)] + [("parts", number, *start) for number, start in enumerate(PARTS)]
    for stage in (1, 2):
        for name, number, processes, stop in starts:
            part = f"{name}-{number}"
            callbacks.StopSignals = lambda stop=stop: StopAfter(stop)
            words = [*settings(world, output / "data", output / name, stage), f"trainer.devices={processes}"]
            log = output / f"{stage}-{part}.log"
            codes = chaos.wait(chaos.start(words, output / name, processes, log), lambda: False, "end")
            expected = 0 if stop is None else blipdiff_train.train.EXIT_INTERRUPTED
            if codes[0] != expected:
                raise SystemExit(f"stage {stage}, {part}: exit codes {codes}\n{log.read_text()}")


def batches(output: Path, pattern: str) -> dict[int, str]:
    """position → key of the sample, over all processes and starts."""
    found: dict[int, str] = {}
    for file in output.glob(pattern):
        for line in file.read_text().splitlines():
            positions, keys = json.loads(line)
            assert not found.keys() & set(positions)
            found |= dict(zip(positions, keys, strict=True))
    return found


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resize")
    write_data(folder / "data")
    done = subprocess.run(
        [sys.executable, __file__, str(world), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tiny.REPOSITORY), *sys.path])},
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_another_number_of_processes_gives_the_same_run(finished, chaos, stage):
    import torch

    from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint

    assert batches(finished, f"{stage}-straight-*.jsonl") == batches(finished, f"{stage}-parts-*.jsonl")
    assert sorted(batches(finished, f"{stage}-parts-*.jsonl")) == list(range(24))
    assert "2 processes × micro-batch 2" in (finished / f"{stage}-parts-1.log").read_text()
    assert "continuing after step 4 of 6" in (finished / f"{stage}-parts-2.log").read_text()

    folders = [finished / name / f"stage{stage}" / "default" for name in ("straight", "parts")]
    straight, parts = (chaos.rows(folder / "metrics.csv") for folder in folders)
    assert [row["step"] for row in parts] == list("123456")
    assert [row["lr"] for row in parts] == [row["lr"] for row in straight]
    assert [row["data/bad/not an image"] for row in parts] == [row["data/bad/not an image"] for row in straight]
    for one, other in zip(straight, parts, strict=True):
        assert {n: float(v or 0) for n, v in other.items()} == pytest.approx(
            {n: float(v or 0) for n, v in one.items()}, rel=1e-5, abs=1e-7
        )
    states = [read_checkpoint(checkpoint_path(folder / "checkpoints", 6)) for folder in folders]
    assert states[0]["faults"] == states[1]["faults"] == {"not an image": 1}
    for kind in ("weights", "average"):
        pairs = [(states[0][kind][name].float(), states[1][kind][name].float()) for name in states[0][kind]]
        distance = torch.cat([(one - other).abs().flatten() for one, other in pairs])
        assert distance.mean() < 1e-6
        assert distance.max() < 1e-3  # one step of Adam: where a gradient is all rounding, so is its sign


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
