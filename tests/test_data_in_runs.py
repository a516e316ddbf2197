"""Whole runs on data that are mixed, scarce, bad, remote, or gone in mid-run."""

from __future__ import annotations

import functools
import http.server
import json
import math
import multiprocessing
import threading
from pathlib import Path

import pytest
from runs import Meanwhile, configure, fit

from blipdiff_train import train
from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint, steps_in
from blipdiff_train.data import toybox
from blipdiff_train.data.faults import read_quarantine
from blipdiff_train.data.samples import stage1_record, stage2_record
from blipdiff_train.data.shards import write_shards
from blipdiff_train.stages import callbacks

NO_VALIDATION = ("every.validation=null", "every.checkpoint=3")


def write(folder: Path, numbers, *, bad=(), samples_per_shard: int = 3, stage: int = 1, prefix: str = "shard") -> Path:
    """Shards of toybox samples; those of ``bad`` are no images."""

    def record(number: int):
        sample = toybox.sample(number, split="train", size=16)
        image = b"\x89PNG\r\n\x1a\n broken" if number in bad else sample.image
        if stage == 1:
            return stage1_record(f"{number:05d}", image, sample.caption)
        return stage2_record(
            f"{number:05d}", image, sample.alpha, subject=sample.subject, caption=sample.caption, prompt=sample.prompt
        )

    write_shards(map(record, numbers), folder, samples_per_shard=samples_per_shard, prefix=prefix)
    return folder


# ------------------------------------------------------------------------------------------------------------- faults


def stopped_by_bad_samples(world, output, capsys, *more, stops=()) -> tuple[str, Path]:
    words = (*NO_VALIDATION, "total_steps=40", "data.max_bad_fraction=0.2", *more)
    for stop in stops:
        fit(world, output, 1, *words, stop_after=stop)
    config, plain = configure(world, output, 1, *words)
    capsys.readouterr()
    assert train.run(config, plain) == train.EXIT_FAILED
    out = capsys.readouterr().out
    verdict = out.split("stopped: ")[1]
    assert "more than max_bad_fraction=0.2. Repair the shards" in verdict
    assert "Traceback" not in verdict
    return verdict.split(" (")[0], Path(config.run_dir)


def test_too_many_bad_samples_stop_a_run_at_the_same_step_whoever_loads_and_however_often_it_was_stopped(
    world, tmp_path, capsys
):
    # the first epoch has few bad ones, so that the share grows slowly over the limit
    shards = f"data.shards={write(tmp_path / 'shards', range(20), bad={1, 4, 8, 12, 13, 18})}"
    runs = [
        stopped_by_bad_samples(world, tmp_path / "a", capsys, shards),
        stopped_by_bad_samples(world, tmp_path / "b", capsys, shards, "data.workers=2"),
        stopped_by_bad_samples(world, tmp_path / "c", capsys, shards, "trainer.max_micro_batch=1", stops=(2, 3)),
    ]
    verdict = runs[0][0]
    assert [found for found, _ in runs] == [verdict] * 3
    num_bad, num_seen = int(verdict.split()[0]), int(verdict.split()[2])
    assert num_bad >= 10
    assert num_seen % 4 == 0
    for _, folder in runs:
        steps = steps_in(folder / "checkpoints")
        assert steps[-1] == num_seen // 4 - 1  # every step before the verdict is kept
        state = read_checkpoint(checkpoint_path(folder / "checkpoints", steps[-1]))
        assert set(state["faults"]) == {"not an image"}
        assert num_bad - 4 <= state["faults"]["not an image"] < num_bad
        listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        keys = [entry["key"] for entry in listed]
        assert len(keys) == len(set(keys))  # once each, over loaders and starts
        assert set(keys) <= {f"{number:05d}" for number in (1, 4, 8, 12, 13, 18)}
        assert all(entry["cause"] == "not an image" and entry["shard"].endswith(".tar") for entry in listed)
    # with a higher limit the same command goes on from there
    config, plain = configure(world, tmp_path / "a", 1, *NO_VALIDATION, shards, "data.max_bad_fraction=1.0")
    assert train.run(config, plain) == 0


def test_bad_samples_below_the_limit_are_counted_in_the_log_and_leave_no_trace_of_a_stop(world, tmp_path, chaos):
    shards = write(tmp_path / "shards", range(20), bad={3, 7})
    more = (*NO_VALIDATION, f"data.shards={shards}", "total_steps=8")
    quiet = fit(world, tmp_path / "quiet", 1, *more)
    fit(world, tmp_path / "parts", 1, *more, "data.workers=1", stop_after=4)
    folder = fit(world, tmp_path / "parts", 1, *more)
    assert chaos.differences(quiet, folder) == []
    rows = chaos.rows(folder / "metrics.csv")
    assert float(rows[-1]["data/bad/not an image"]) == read_checkpoint(
        checkpoint_path(folder / "checkpoints", 8)
    )["faults"]["not an image"]
    assert {entry["key"] for entry in read_quarantine(folder / "quarantine.jsonl")} == {"00003", "00007"}


def test_a_validation_of_bad_samples_is_no_validation(world, tmp_path, capsys):
    val = write(tmp_path / "val", range(24), bad=range(2, 24, 2))
    config, plain = configure(world, tmp_path, 1, f"data.val_shards={val}", "total_steps=3", "every.checkpoint=9")
    assert train.run(config, plain) == train.EXIT_FAILED
    assert "11 of 24 samples were bad" in capsys.readouterr().out
    folder = Path(config.run_dir)
    assert read_checkpoint(checkpoint_path(folder / "checkpoints", 3))["validation_due"]
    assert not (folder / "validation.csv").exists()


# --------------------------------------------------------------------------------------------------- shards come and go


def test_a_run_whose_shard_disappears_stops_and_continues_when_it_is_back(world, tmp_path, chaos, monkeypatch, capsys):
    shards = write(tmp_path / "shards", range(24))
    more = (*NO_VALIDATION, f"data.shards={shards}", "data.window_shards=1", "data.workers=1")
    quiet = fit(world, tmp_path / "quiet", 1, *more)

    def hide():
        for path in shards.glob("*.tar"):
            path.rename(path.with_suffix(".away"))

    monkeypatch.setattr(callbacks, "StopSignals", lambda: Meanwhile(1, hide))
    config, plain = configure(world, tmp_path / "run", 1, *more)
    assert train.run(config, plain) == train.EXIT_FAILED
    out = capsys.readouterr().out
    assert ".tar could be read at the start and cannot be read now" in out
    assert "Traceback" not in out.split("stopped:")[1]
    assert not multiprocessing.active_children()  # they ignore SIGTERM: Python would wait for them at its end
    saved = steps_in(Path(config.run_dir) / "checkpoints")[-1]
    assert f"step {saved} is saved" in out
    assert 1 <= saved < 6

    monkeypatch.undo()
    for path in shards.glob("*.away"):
        path.rename(path.with_suffix(".tar"))
    folder = fit(world, tmp_path / "run", 1, *more)
    assert chaos.differences(quiet, folder) == []


def test_exchanged_shards_are_noticed(world, tmp_path):
    shards = write(tmp_path / "shards", range(12))
    more = (*NO_VALIDATION, f"data.shards={shards}")
    fit(world, tmp_path, 1, *more, stop_after=2)
    write(shards, range(20, 24), prefix="new")
    with pytest.warns(UserWarning, match="are not those of the checkpoint: the run goes on at position 8"):
        fit(world, tmp_path, 1, *more)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("samples", "empty"), [(1, False), (3, True)])
def test_one_sample_fewer_than_a_batch_and_an_empty_shard(world, tmp_path, chaos, stage, samples, empty):
    shards = write(tmp_path / "shards", range(samples), stage=stage, prefix="z")
    if empty:
        (shards / "a.tar").write_bytes(bytes(10240))
    more = (*NO_VALIDATION, f"data.shards={shards}", "total_steps=3", "optim.warmup_steps=1", "data.val_shards=null")
    rows = chaos.rows(fit(world, tmp_path, stage, *more) / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)


def test_nothing_but_empty_shards_is_an_error(world, tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    config, plain = configure(world, tmp_path, 1, *NO_VALIDATION, f"data.shards={tmp_path}")
    assert train.run(config, plain) == train.EXIT_FAILED
    assert "1 shards hold no samples: there is nothing to train on" in capsys.readouterr().out


def test_several_data_sets_mixed_by_weight_go_on_where_they_were(world, tmp_path, chaos, monkeypatch):
    parts = [write(tmp_path / name, numbers) for name, numbers in (("a", range(9)), ("b", range(100, 103)))]
    mixture = f"data.shards=[{{shards: {parts[0]}, weight: 3}}, {{shards: {parts[1]}, weight: 1}}]"
    keys: list[str] = []
    monkeypatch.setattr(callbacks.FiniteCheck, "on_before_backward", lambda *rest: None)
    monkeypatch.setattr(callbacks.FiniteCheck, "on_before_optimizer_step", lambda *rest: None)
    monkeypatch.setattr(
        callbacks.FiniteCheck, "on_train_batch_start", lambda self, t, m, batch, n: keys.extend(batch.keys)
    )
    more = (*NO_VALIDATION, mixture, "total_steps=8")
    quiet = fit(world, tmp_path / "quiet", 1, *more)
    straight, keys[:] = list(keys), []
    fit(world, tmp_path / "run", 1, *more, stop_after=3)
    folder = fit(world, tmp_path / "run", 1, *more)
    assert keys == straight
    assert chaos.differences(quiet, folder) == []
    assert 4 <= sum(key >= "00100" for key in keys) <= 12  # 8 of 32 on average


# -------------------------------------------------------------------------------------------------------------- remote


def test_a_run_on_remote_shards_is_the_run_on_local_ones_with_a_cache_smaller_than_the_data(world, tmp_path, chaos):
    pytest.importorskip("aiohttp")
    local = write(tmp_path / "served", range(24))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        cache = tmp_path / "cache"
        limit = 2.5 * max(path.stat().st_size for path in local.glob("*.tar"))
        url = f'data.shards="http://127.0.0.1:{server.server_port}/shard-{{000000..000007}}.tar"'
        remote = (*NO_VALIDATION, url, f"data.cache={cache}", f"data.cache_gb={limit / 1e9}", "data.workers=2")
        fit(world, tmp_path / "remote", 1, *remote, stop_after=2)
        folder = fit(world, tmp_path / "remote", 1, *remote)
    finally:
        server.shutdown()
        server.server_close()
    held = [path.stat().st_size for path in cache.glob("*.shard")]
    assert held
    assert sum(held) <= limit < sum(path.stat().st_size for path in local.glob("*.tar"))
    quiet = fit(world, tmp_path / "local", 1, *NO_VALIDATION, f"data.shards={local}")
    assert chaos.differences(quiet, folder) == []


def test_a_remote_shard_without_a_cache_names_the_key(world, tmp_path, capsys):
    config, plain = configure(world, tmp_path, 1, *NO_VALIDATION, "data.shards=memory://nowhere/x.tar")
    assert train.run(config, plain) == train.EXIT_FAILED
    assert "remote shards need a cache folder (data.cache)" in capsys.readouterr().out
