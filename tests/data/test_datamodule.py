"""Batches are a function of the position alone: not of workers, ranks, interruptions or other samples' faults."""

from __future__ import annotations

import json
import os
from collections import Counter
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from shard_makers import annotated, disc, picture

from blipdiff_train.data.datamodule import ShardDataModule
from blipdiff_train.data.faults import NoGoodSample, Quarantine, TooManyBadSamples, check_share, read_quarantine
from blipdiff_train.data.samples import stage2_record
from blipdiff_train.data.shards import write_shards


def module(shards, *, stage=2, **changes):
    options = {
        "stage": stage,
        "shards": shards if isinstance(shards, list) else str(shards),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "total_steps": 5,
        "seed": 0,
        "image_size": 16,
        "target_size": 32,
        "shuffle_window": 2,
    }
    return ShardDataModule(**{**options, **changes})


def by_position(loader):
    """position → everything about the sample, comparable."""
    found = {}
    for batch in loader:
        for row, position in enumerate(batch.positions.tolist()):
            tensors = (
                [batch.subject_image[row], batch.target_image[row]] if hasattr(batch, "prompt") else [batch.image[row]]
            )
            texts = (batch.keys[row], batch.caption[row])
            dropped = bool(batch.subject_dropped[row]) if hasattr(batch, "prompt") else None
            found[position] = (*texts, dropped, *(tensor.numpy().tobytes() for tensor in tensors))
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_batches_do_not_depend_on_workers(shards, backgrounds, stage):
    reference = by_position(module(shards, stage=stage, backgrounds=str(backgrounds)).train_dataloader())
    assert sorted(reference) == list(range(40))
    for num_workers in (1, 3, 4):
        data = module(shards, stage=stage, backgrounds=str(backgrounds), num_workers=num_workers)
        assert by_position(data.train_dataloader()) == reference


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_batches_do_not_depend_on_ranks_and_micro_batches(shards, monkeypatch, world_size, micro):
    reference = by_position(module(shards).train_dataloader())
    found = {}
    for rank in range(world_size):
        data = module(shards, micro_batch_size=micro)
        monkeypatch.setattr("blipdiff_train.common.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("blipdiff_train.common.distributed.world_size", lambda: world_size)
        part = by_position(data.train_dataloader())
        assert not part.keys() & found.keys()
        found |= part
    assert found == reference


def test_a_resumed_loader_goes_on_where_the_steps_ended(shards, backgrounds):
    reference = by_position(module(shards, backgrounds=str(backgrounds)).train_dataloader())
    for steps in range(6):
        first = module(shards, backgrounds=str(backgrounds), num_workers=2)
        loader = iter(first.train_dataloader())
        for _ in range(2 * steps):
            next(loader)  # the workers are ahead of this by now
        first.set_position(8 * steps)
        second = module(shards, backgrounds=str(backgrounds), micro_batch_size=2)
        second.set_position(first.position)
        rest = by_position(second.train_dataloader())
        assert rest == {position: value for position, value in reference.items() if position >= 8 * steps}


def test_exchanged_data_has_another_fingerprint(shards, tmp_path):
    write_shards([annotated(0)], tmp_path)
    mixed = [[{"shards": str(shards), "weight": w}, {"shards": str(tmp_path), "weight": 1}] for w in (1, 2)]
    found = [module(data).fingerprint() for data in (shards, tmp_path, *mixed)]
    assert len(set(found)) == 4
    assert module(shards, seed=1).fingerprint() == found[0]


def test_seeds_and_epochs_differ_but_content_belongs_to_the_position(shards):
    one, other = (by_position(module(shards, seed=seed).train_dataloader()) for seed in (0, 1))
    assert [value[0] for value in one.values()] != [value[0] for value in other.values()]
    first_epoch, second_epoch = ([one[p][0] for p in range(start, start + 17)] for start in (0, 23))
    assert first_epoch != second_epoch
    assert len({one[position][0] for position in range(23)}) == 23


def test_fewer_samples_than_a_batch(tmp_path):
    write_shards([annotated(0)], tmp_path)
    found = by_position(module(tmp_path).train_dataloader())
    assert {value[0] for value in found.values()} == {"photo0000"}
    assert len({value[3] for value in found.values()}) > 30  # each time on another background


def test_the_subject_is_dropped_at_the_asked_rate(shards):
    for probability in (0.0, 0.15, 1.0):
        dataset = module(shards, drop_subject_prob=probability).train_dataset()
        rate = np.mean([dataset[position].subject_dropped for position in range(300)])
        assert abs(rate - probability) <= 0.06
    with pytest.raises(ValueError, match=r"drop_subject_prob=1\.5"):
        module(shards, drop_subject_prob=1.5)


def test_validation_is_the_same_every_time_and_never_random(shards):
    data = module(shards, val_shards=str(shards), val_batch_size=5, drop_subject_prob=1.0, num_workers=2)
    loader = data.val_dataloader()
    first, second = by_position(loader), by_position(loader)
    assert first == second == by_position(module(shards, val_shards=str(shards), val_batch_size=3).val_dataloader())
    assert [value[0] for _, value in sorted(first.items())] == [f"photo{number:04d}" for number in range(23)]
    assert not any(value[2] for value in first.values())
    limited = module(shards, val_shards=str(shards), val_samples=7)
    assert len(by_position(limited.val_dataloader())) == 7
    assert module(shards).val_dataloader() == []


def test_data_sets_are_mixed_by_weight(shards, tmp_path):
    write_shards([annotated(100 + number) for number in range(4)], tmp_path)
    parts = [{"shards": str(shards), "weight": 3}, {"shards": str(tmp_path), "weight": 1}]
    order = module(parts).train_dataset().order
    places = [order(position).dataset for position in range(4096)]
    assert abs(np.mean(places) - 0.25) < 0.01
    with pytest.raises(ValueError, match="weight"):
        module([{"shards": "x"}])


# ------------------------------------------------------------------------------------------------------------ faults


def damaged(number):
    sample = annotated(number)
    kind = {3: "truncated", 7: "json", 11: "matte missing", 15: "matte empty", 19: "matte size"}.get(number)
    if kind == "truncated":
        sample["png"] = sample["png"][: len(sample["png"]) // 2]
    elif kind == "json":
        sample["json"] = '{"caption": '
    elif kind == "matte missing":
        del sample["alpha.png"]
    elif kind == "matte empty":
        sample = stage2_record(sample["__key__"], picture(number), disc() * 0, subject="dog", caption="a dog")
    elif kind == "matte size":
        sample = stage2_record(sample["__key__"], picture(number), disc(40, 60), subject="dog", caption="a dog")
    return sample


BAD = {f"photo{number:04d}" for number in (3, 7, 11, 15, 19)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_replaced_and_nobody_else_notices(shards, backgrounds, tmp_path, num_workers):
    write_shards((damaged(number) for number in range(23)), tmp_path / "shards", samples_per_shard=5)
    good = by_position(module(shards, backgrounds=str(backgrounds)).train_dataloader())
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    options = {"backgrounds": str(backgrounds), "quarantine": quarantine, "num_workers": num_workers}
    data = module(tmp_path / "shards", **options)
    batches = list(data.train_dataloader())
    found = by_position(batches)
    order = data.train_dataset().order
    for position in range(40):
        if good[position][0] not in BAD:
            assert found[position] == good[position]
        else:
            keys = [f"photo{order(position + step).index:04d}" for step in range(30)]
            assert found[position][0] == next(key for key in keys if key not in BAD)
    counts = sum((Counter(batch.faults) for batch in batches), Counter())
    assert counts.total() == len([position for position in range(40) if good[position][0] in BAD])
    assert set(counts) == {"undecodable image", "bad json", "missing member", "empty matte", "matte size"}
    listed = read_quarantine(quarantine)
    assert sorted(entry["key"] for entry in listed) == sorted(BAD)
    assert len(quarantine.read_text().splitlines()) == len(BAD)
    assert all(entry["shard"].endswith(".tar") and entry["message"] for entry in listed)


def test_the_share_of_bad_samples_is_judged_with_the_list(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    for number in range(30):
        quarantine.add(cause="bad json", message=f"a.tar: k{number} is bad", shard="a.tar", key=f"k{number}")
    limit = {"max_bad_fraction": 0.1, "quarantine": path}
    check_share({"bad json": 9}, 9, **limit)  # too few for a verdict
    check_share({"bad json": 8, "cut off": 2}, 100, **limit)
    with pytest.raises(TooManyBadSamples) as error:
        check_share({"cut off": 2, "bad json": 9}, 100, **limit)
    words = str(error.value)
    assert words.startswith("11 of 100 samples were bad (9 × bad json, 2 × cut off), more than max_bad_fraction=0.1")
    assert "a.tar: k19 is bad\n  and 10 more" in words
    assert str(path) in words


def test_nothing_but_bad_samples_is_an_error_not_a_search(tmp_path):
    sample = annotated(0)
    sample["json"] = "[]"
    write_shards([sample], tmp_path)
    with pytest.raises(NoGoodSample, match=r"none of 64 samples from position 0 on is good.*photo0000"):
        module(tmp_path).train_dataset()[0]


def test_bad_backgrounds_are_replaced_and_listed(shards, tmp_path):
    records = [{"__key__": f"b{number}", "jpg": b"\xff\xd8\xff broken"} for number in range(3)]
    write_shards([*records, {**annotated(1), "__key__": "good"}], tmp_path / "b")
    quarantine = tmp_path / "quarantine.jsonl"
    data = module(shards, backgrounds=str(tmp_path / "b"), quarantine=quarantine)
    assert len(by_position(data.train_dataloader())) == 40
    assert {entry["key"] for entry in read_quarantine(quarantine)} == {"b0", "b1", "b2"}
    assert all(entry["cause"].startswith("background: ") for entry in read_quarantine(quarantine))


def test_the_quarantine_names_each_sample_once_over_all_starts_and_a_line_cut_by_a_crash_takes_no_other(tmp_path):
    path = tmp_path / "quarantine.jsonl"

    def add(quarantine, key):
        quarantine.add(cause="bad json", message="x", shard="a.tar", key=key)

    first = Quarantine(path)
    for key in ("k1", "k1", "k2"):
        add(first, key)
    with path.open("a") as file:
        file.write('{"cause": "cut", "shard": "a.t')
    second = Quarantine(path)
    for key in ("k1", "k3"):
        add(second, key)
    add(first, "k3")
    assert [entry["key"] for entry in read_quarantine(path)] == ["k1", "k2", "k3"]
    assert [line[:10] for line in path.read_text().splitlines()] == ['{"cause": '] * 4
    assert read_quarantine(tmp_path / "none") == []


def _fill(path, start):
    quarantine = Quarantine(path)
    for number in range(150):
        quarantine.add(cause="bad json", message="x", shard="a.tar", key=f"k{(start + number) % 150}")


def test_the_quarantine_names_each_sample_once_with_many_writers(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with get_context("fork").Pool(4) as pool:
        pool.starmap(_fill, [(path, start) for start in (0, 0, 75, 140)])
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert sorted(keys) == sorted(f"k{number}" for number in range(150))


def test_settings_that_contradict_each_other(shards):
    with pytest.raises(ValueError, match="stage=3"):
        module(shards, stage=3)
    with pytest.raises(ValueError, match="not a multiple"):
        module(shards, micro_batch_size=3).train_dataloader()
    with pytest.raises(ValueError, match="position=-1"):
        module(shards).set_position(-1)


# ------------------------------------------------------------------------------------------------------ real processes


def _rank(rank, world_size, shards, backgrounds, folder, port):
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    # without workers: a spawned process spawns its workers too, and each would import everything once more
    data = module(shards, backgrounds=backgrounds, micro_batch_size=2)
    torch.save(by_position(data.train_dataloader()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_get_the_batches_of_one(shards, backgrounds, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(_rank, (2, str(shards), str(backgrounds), str(tmp_path), port), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert ranks[0] | ranks[1] == by_position(module(shards, backgrounds=str(backgrounds)).train_dataloader())


def test_a_folder_for_temporary_files_with_too_long_a_name_is_refused_where_loaders_would_hang(shards, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/" + 75 * "x")
    module(shards)
    with pytest.raises(ValueError, match=r"TMPDIR=/x* is too long .*76 bytes, at most 75"):
        module(shards, num_workers=1)
