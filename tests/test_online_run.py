"""Stage 2 from plain photographs, as typed, in two processes: the run that prepared shards give, also when killed."""

from __future__ import annotations

import pytest
import tiny

from blipdiff_train.data.shards import write_shards
from blipdiff_train.data.toybox.write import photographs
from blipdiff_train.prepare.job import run as prepare

CLIPSEG = tiny.REPOSITORY / "blipdiff_train/assets/toy_foundation/clipseg"
ANNOTATION = {
    "image": {"format": "png", "shortest_side_px": 16},
    "segmenter": {"name": "clipseg", "model": str(CLIPSEG), "batch_size": 4},
    "filters": {"blur": None, "duplicate_distance": None, "area": None, "border_contact": None, "unknown_share": None},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_train_on_photographs_as_on_prepared_shards_and_survive_a_kill(tmp_path, chaos):
    tiny.write_models(tmp_path / "models")
    samples = [{**sample, "__key__": f"{number:09d}"} for number, sample in enumerate(photographs(24))]
    for sample in samples:
        del sample["json"]["prompt"]  # `prepare` keeps captions only
    write_shards(samples, tmp_path / "plain", samples_per_shard=8)
    quiet = {"photographs_per_shard": 8, "workers": 1, "progress": False, "report": {"enabled": False}}
    prepare(input=str(tmp_path / "plain"), output=str(tmp_path / "prepared"), **quiet, **ANNOTATION)

    def words(name: str) -> list[str]:
        common = tiny.overrides(tmp_path / "models", tmp_path, tmp_path / "runs" / name, 2)
        here = [f"data.shards={tmp_path / name}", "data.val_shards=null", "data.workers=1", "trainer.devices=2"]
        return [*common, *here]

    online = ["data.context=online"]
    for block, values in ANNOTATION.items():
        for key, value in values.items():
            online.append(f"data.annotation.{block}.{key}={'null' if value is None else value}")
    expected, folder = (tmp_path / "runs" / name / "stage2" / "default" for name in ("prepared", "plain"))

    tiny.run(*words("prepared"))
    # ranks, loaders and segmenters
    tiny.run_killed(*words("plain"), *online, reached=lambda: chaos.last_step(folder) >= 3, log=tmp_path / "log")
    tiny.run(*words("plain"), *online)
    assert chaos.differences(expected, folder) == []
    assert len(list((tmp_path / "plain" / ".made").rglob("*.entry"))) == 24
