"""The online mode makes, bit for bit, what `prepare` writes; once; and says what goes wrong."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import draw

from blipdiff_train.data.datamodule import ShardDataModule
from blipdiff_train.data.faults import read_quarantine
from blipdiff_train.data.shards import SampleError, ShardSet, write_shards
from blipdiff_train.data.toybox.write import photographs as toy_photographs
from blipdiff_train.prepare.job import run
from blipdiff_train.prepare.models import ModelProcess
from blipdiff_train.prepare.online import OnlineContext
from blipdiff_train.prepare.settings import Settings, make_settings
from blipdiff_train.prepare.work import Worker, encode

ROOT = Path(__file__).resolve().parents[2]
CLIPSEG = str(ROOT / "blipdiff_train/assets/toy_foundation/clipseg")
GRABCUT = {"image": {"longest_side_px": 96}, "filters": {"blur": 1.0, "duplicate_distance": None}}
# drawings are flat and small on purpose
TOY = {
    "image": {"format": "png", "shortest_side_px": 16},
    "segmenter": {"name": "clipseg", "model": CLIPSEG, "batch_size": 4},
    "filters": {"blur": None, "duplicate_distance": None, "unknown_share": None, "border_contact": None, "area": None},
}


@pytest.fixture(scope="module")
def clipseg():
    process = ModelProcess(settings_of(TOY), "cpu")
    yield process.models()
    process.close()


def settings_of(settings: dict) -> Settings:
    return make_settings({"input": "i", "output": "o", **settings})


def online(settings: dict, folder: Path | None = None, models=None) -> OnlineContext:
    return OnlineContext(settings_of(settings), None if folder is None else str(folder), models)


def prepare(source: Path, output: Path, settings: dict) -> dict[str, int]:
    quiet = {"workers": 1, "progress": False, "report": {"enabled": False}, "photographs_per_shard": 6}
    return run(input=str(source), output=str(output), **quiet, **settings).rejected


def difficult_photographs() -> list[dict[str, object]]:
    """JPEG and PNG, larger than the limit, captions of all kinds, and four that must be rejected or are bad."""
    samples = []
    for number in range(12):
        image = draw(number, (80 + 3 * number, 97 - number))
        if number == 5:
            image = cv2.resize(image, (301, 200))
        kind = "jpg" if number % 3 else "png"
        facts = {"subject": "red ball"} | ({"caption": f"ball  {number}"} if number % 2 else {})
        samples.append({"__key__": f"{number:09d}", kind: encode(image, kind, 90), "json": facts})
    samples[2]["txt"] = " a ball\nin a text "
    samples[3]["json"] = {"caption": "nobody says what it is"}
    samples[6]["png"] = encode(np.full((90, 90, 3), 128, np.uint8), "png", 0)  # flat
    samples[7]["jpg"] = b"\xff\xd8\xff no photograph"
    samples[8]["jpg"] = encode(draw(0, (20, 30)), "jpg", 90)  # tiny
    return samples


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_shards(difficult_photographs(), folder, samples_per_shard=5)
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    samples = [{**sample, "__key__": f"{n:09d}"} for n, sample in enumerate(toy_photographs(18))]
    for sample in samples:
        del sample["json"]["prompt"]
    write_shards(samples, folder, samples_per_shard=6)
    return folder


@pytest.fixture(scope="module")
def prepared_toys(toys, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    assert prepare(toys, folder, TOY) == {}
    return folder


def _ask(context: OnlineContext, shards: ShardSet, groups: list[list[int]]) -> None:
    for group in groups:
        context.ahead([(shards, index) for index in group])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grabcut", "clipseg"])
def test_two_processes_make_the_bytes_that_prepare_writes(kind, plain, toys, prepared_toys, clipseg, tmp_path):
    """Each in other groups than `prepare`'s batches, some photographs in both."""
    if kind == "grabcut":
        source, settings, output, models = plain, GRABCUT, tmp_path / "prepared", None
        assert sum(prepare(source, output, settings).values()) == 4
    else:
        source, settings, output, models = toys, TOY, prepared_toys, clipseg
    context, shards = online(settings, tmp_path / "store", models), ShardSet(str(source))
    groups = [[[0, 1, 2, 3, 4, 4], [9], [8, 7]], [[11], [10, 9, 8], [7, 6, 5]]]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_ask, args=(context, shards, part)) for part in groups]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert context.store.missing(shards, range(12)) == []

    prepared = ShardSet(str(output))
    expected = {}
    for index in range(len(prepared)):
        sample = prepared.read(index)
        expected[json.loads(sample["json"])["source"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    lines = (output / "rejected.jsonl").read_text().splitlines()
    rejected = {entry["source"]: entry for entry in map(json.loads, lines)}
    for index in range(len(shards)):
        name = f"{Path(shards.read(index)['__shard__']).name}/{shards.key(index)}"
        wanted = next((members for source, members in expected.items() if source.startswith(name)), None)
        if wanted is not None:
            record = context.record(shards, index)
            assert {k: v for k, v in record.items() if not k.startswith("__")} == wanted
        else:
            entry = next(entry for source, entry in rejected.items() if source.startswith(name))
            with pytest.raises(SampleError) as error:
                context.record(shards, index)
            assert error.value.cause == f"rejected: {entry['cause']}"
            assert entry["detail"] in str(error.value)


def module(shards: Path, **changes) -> ShardDataModule:
    options = {"stage": 2, "shards": str(shards), "global_batch_size": 8, "micro_batch_size": 4, "total_steps": 4}
    options |= {"seed": 0, "image_size": 16, "target_size": 32, "shuffle_window": 2}
    return ShardDataModule(**options | changes)


def content(batches) -> list:
    return [
        (batch.subject_image.numpy().tobytes(), batch.target_image.numpy().tobytes(), batch.caption, batch.subject_text)
        for batch in batches
    ]


def test_batches_are_those_of_prepared_shards_and_made_once(toys, prepared_toys, clipseg, monkeypatch):
    expected = content(module(prepared_toys).train_dataloader())
    context = online(TOY, models=clipseg)
    assert content(module(toys, maker=context, num_workers=2).train_dataloader()) == expected
    made = sorted((toys / ".made").rglob("*.entry"))
    assert len(made) == 18
    monkeypatch.setattr(Worker, "samples", lambda *_: pytest.fail("made twice"))
    again = module(toys, maker=online(TOY, models=clipseg), micro_batch_size=2)
    again.set_position(16)  # a resumed run
    assert [text for batch in again.train_dataloader() for text in batch.caption] == [
        text for _, _, texts, _ in expected[4:] for text in texts
    ]


def test_a_rejected_photograph_is_replaced_by_the_same_neighbour_every_time(plain, tmp_path):
    runs = []
    for number, workers in enumerate((0, 2)):
        quarantine = tmp_path / str(number) / "quarantine.jsonl"
        store = tmp_path / str(number)
        data = module(plain, maker=online(GRABCUT, store), num_workers=workers, quarantine=quarantine)
        batches = list(data.train_dataloader())
        runs.append((content(batches), [batch.keys for batch in batches]))
        listed = {entry["key"]: entry["cause"] for entry in read_quarantine(quarantine)}
        assert listed == {
            "000000003": "rejected: no_category",
            "000000006": "rejected: blurred",
            "000000007": "rejected: unreadable",
            "000000008": "rejected: too_few_pixels",
        }
        assert sum(sum(batch.faults.values()) for batch in batches) >= 8  # 32 positions over 12 photographs
    assert runs[0] == runs[1]
    assert not {key for keys in runs[0][1] for key in keys} & listed.keys()


def test_other_thresholds_make_other_mattes(plain, tmp_path):
    shards = ShardSet(str(plain))
    one = online(GRABCUT, tmp_path)
    other = online({**GRABCUT, "trimap": {"margin": 0.03}}, tmp_path)
    assert one.record(shards, 0)["alpha.png"] != other.record(shards, 0)["alpha.png"]
    assert len(list(tmp_path.iterdir())) == 2
    assert one.record(shards, 0)["alpha.png"] == online(GRABCUT, tmp_path).record(shards, 0)["alpha.png"]


def test_a_filter_switched_on_is_another_store_and_rejects_there(plain, tmp_path):
    shards = ShardSet(str(plain))
    strict = {**GRABCUT, "filters": {**GRABCUT["filters"], "agreement": 1.0}}  # no two cuts are equal to the pixel
    made = online(GRABCUT, tmp_path).record(shards, 0)
    assert "agreement" not in json.loads(made["json"])
    with pytest.raises(SampleError, match=r"filters\.agreement"):
        online(strict, tmp_path).record(shards, 0)
    assert online(GRABCUT, tmp_path).record(shards, 0)["alpha.png"] == made["alpha.png"]
    assert len(list(tmp_path.iterdir())) == 2
