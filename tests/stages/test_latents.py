"""Cached latents change nothing but the time: same losses, made once, never another VAE's."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch.distributed as dist
from runs import StopAfter, check_close, configure, fit, losses

from blipdiff_train import train
from blipdiff_train.common import distributed
from blipdiff_train.data.datamodule import ShardDataModule
from blipdiff_train.data.shards import ShardSet, write_shards
from blipdiff_train.data.store import SampleStore
from blipdiff_train.stages import callbacks
from blipdiff_train.stages.latents import LatentCache


def cached(world: Path, output: Path, *more: str, **options) -> Path:
    return fit(world, output, 2, "data.cache_latents=true", f"data.store={output}/store", *more, **options)


def entries(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted((output / "store").rglob("*.entry"))}


def test_losses_with_and_without_are_the_same_and_latents_are_made_once(world, tmp_path, capsys):
    plain, with_cache = fit(world, tmp_path / "plain", 2), cached(world, tmp_path, "name=first")
    check_close(plain, with_cache)
    first = losses(with_cache)
    assert len(first) == 8
    said = capsys.readouterr()
    assert "latents: 30 of 30 photographs to encode" in said.out
    assert "latents: 30 of 30 photographs in 0:0" in said.err
    made = entries(tmp_path)
    assert len(made) == 30
    # in another process's share, with loader processes: the same numbers, and nothing is made again
    second = losses(cached(world, tmp_path, "name=second", "data.workers=2"))
    assert second == first
    assert entries(tmp_path) == made
    assert "latents: all are there" in capsys.readouterr().out


def test_another_vae_or_size_makes_its_own_and_says_what_is_different(world, tmp_path, capsys):
    cached(world, tmp_path, "total_steps=2")
    made = entries(tmp_path)
    capsys.readouterr()
    cached(world, tmp_path, "total_steps=2", "name=larger", "target_px=32")
    out = capsys.readouterr().out
    assert "not used, made otherwise" in out
    assert "target_px 16, now 32" in out
    assert "vae " not in out.split("made otherwise")[1]
    models = tmp_path / "models"
    other = tiny.write_models(models)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(other / "stable_diffusion" / "vae")
    vae.quant_conv.bias.data += 1
    vae.save_pretrained(other / "stable_diffusion" / "vae")
    cached(world, tmp_path, "total_steps=2", "name=other", f"model.stable_diffusion={models}/stable_diffusion")
    assert "; vae " in capsys.readouterr().out.split("made otherwise")[1]
    assert len(entries(tmp_path)) == 3 * len(made)
    assert {k: v for k, v in entries(tmp_path).items() if k in made} == made
    settings = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("latents-*/settings.json")]
    assert len({entry["vae"] for entry in settings}) == 2
    assert sorted(entry["target_px"] for entry in settings) == [16, 16, 32]


def test_a_stop_while_they_are_made_keeps_what_is_finished(world, tmp_path, monkeypatch):
    class Stop(StopAfter):
        """A signal during the 9th photograph."""

        @property
        def received(self) -> int | None:
            return signal.SIGTERM if len(entries(tmp_path)) == 9 else None

        @received.setter
        def received(self, value: int | None) -> None:
            pass

    monkeypatch.setattr("runs.StopAfter", Stop)
    with pytest.raises(callbacks.RunInterrupted, match="while latents were cached"):
        cached(world, tmp_path)
    made = entries(tmp_path)
    assert len(made) == 9
    monkeypatch.undo()
    folder = cached(world, tmp_path)
    assert losses(folder) == losses(cached(world, tmp_path / "quiet"))
    assert {k: v for k, v in entries(tmp_path).items() if k in made} == made


def test_a_bad_photograph_is_replaced_as_without_latents(world, tmp_path):
    source = ShardSet(str(world / "data" / "stage2"))
    samples = []
    for index in range(len(source)):
        sample = source.read(index)
        samples.append({"__key__": sample["__key__"]} | {k: v for k, v in sample.items() if not k.startswith("__")})
    samples[4]["png"] = samples[4]["png"][:50]
    write_shards(samples, tmp_path / "bad", samples_per_shard=10)
    more = (f"data.shards={tmp_path}/bad", "data.max_bad_fraction=0.5", "total_steps=8")
    plain = fit(world, tmp_path / "plain", 2, *more)
    with_cache = cached(world, tmp_path, *more)
    check_close(plain, with_cache)
    listed = [json.loads((folder / "quarantine.jsonl").read_text().splitlines()[0]) for folder in (plain, with_cache)]
    assert listed[0] == listed[1]
    assert listed[0]["key"] == samples[4]["__key__"]


def test_a_damaged_entry_stops_the_run_and_is_made_anew(world, tmp_path, capsys):
    quiet = losses(cached(world, tmp_path, "name=quiet"))
    path = sorted((tmp_path / "store").rglob("shard-000001-*/000003.entry"))[0]
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    words = ("data.cache_latents=true", f"data.store={tmp_path}/store", "name=damaged")
    config, plain = configure(world, tmp_path, 2, *words)
    capsys.readouterr()
    assert train.run(config, plain) == train.EXIT_FAILED
    assert f"stopped: {path} is damaged and was removed: start the same command again" in capsys.readouterr().out
    assert losses(cached(world, tmp_path, "name=damaged")) == quiet
    assert "latents: 1 of 30 photographs to encode" in capsys.readouterr().out
    assert path.read_bytes() == good


# ------------------------------------------------------------------------------------------------------ two processes


class Module:
    """Gives every photograph the number of its rank."""

    device = "cpu"

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.denoiser = self

    def encode_moments(self, images):
        assert images.shape == (1, 3, 16, 16)
        assert images.min() >= -1
        return images.new_full((1, 8, 8, 8), self.rank)


class FullDisk(SampleStore):
    """No room for the third entry."""

    def write(self, *what):
        if len(list(self.folder.rglob("*.entry"))) == 2:
            raise OSError(errno.ENOSPC, "no room")
        super().write(*what)


def _rank(rank: int, shards: str, folder: Path, answers) -> None:
    """What a process of two sees of each case: the error, its number, the entries that are there then."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    trainer = types.SimpleNamespace(global_rank=rank, world_size=2, is_global_zero=rank == 0)
    stopped = callbacks.StopSignals()
    stopped.received = signal.SIGTERM
    cases = [  # own folder, store, signals
        ("shared", SampleStore, callbacks.StopSignals()),
        (f"of rank {rank}", SampleStore, callbacks.StopSignals()),
        (f"full on rank 1, {rank}", FullDisk if rank else SampleStore, callbacks.StopSignals()),
        ("signal to rank 1", SampleStore, stopped if rank else callbacks.StopSignals()),
    ]
    for name, store, signals in cases:
        data = ShardDataModule(
            stage=2, shards=shards, global_batch_size=2, micro_batch_size=1, total_steps=1, seed=0,
            image_size=16, target_size=16, latents=store("latents", {}, folder / name),
        )  # fmt: skip
        found = (None, None)
        try:
            LatentCache(data, signals, print).on_fit_start(trainer, Module(rank))
        except (callbacks.RunInterrupted, distributed.RankFailed) as error:
            found = (str(error), getattr(error, "errno", None))
        answers.put((rank, cases.index((name, store, signals)), *found))
    dist.destroy_process_group()


def test_two_ranks_share_the_work_and_one_that_fails_or_is_told_to_stop_stops_both(world, tmp_path):
    processes, shards = multiprocessing.get_context("fork"), str(world / "data" / "stage2")
    answers = processes.Queue()
    ranks = [processes.Process(target=_rank, args=(rank, shards, tmp_path, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = {}
    for _ in range(2 * 4):
        rank, case, *said = answers.get(timeout=120)
        found[case, rank] = said
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    for case in range(4):
        assert found[case, 0] == found[case, 1]

    assert found[0, 0] == [None, None]
    store, opened = SampleStore("latents", {}, tmp_path / "shared"), ShardSet(shards)
    moments = [np.load(io.BytesIO(store.read(opened, index)["latent.npy"])) for index in range(24)]
    assert all(entry.dtype == np.float32 for entry in moments)
    assert [entry.mean() for entry in moments] == [0, 1] * 12

    assert "the latents of about 12 of 24 samples are not there" in found[1, 0][0]
    assert "data.store, must be on a file system that all machines share" in found[1, 0][0]
    assert found[2, 0] == ["rank 1: [Errno 28] no room", errno.ENOSPC]
    assert len(list((tmp_path / "full on rank 1, 1").rglob("*.entry"))) == 2
    assert "stopped by a signal while latents were cached" in found[3, 0][0]
    assert 2 <= len(list((tmp_path / "signal to rank 1").rglob("*.entry"))) <= 13
