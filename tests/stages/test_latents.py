"""Cached latents change nothing but the time: same losses, made once, never another VAE's."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from runs import StopAfter, fit

from blipdiff_train.data.shards import ShardSet, write_shards
from blipdiff_train.stages import callbacks
from blipdiff_train.stages.latents import LatentCache


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.write_models(folder / "models")
    tiny.write_data(folder / "data")
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    import csv

    found = []
    for name in ("metrics.csv", "validation.csv"):
        with (folder / name).open() as file:
            rows = list(csv.DictReader(file))
        found += [{k: float(v) for k, v in row.items() if "loss" in k or k.startswith("grad")} for row in rows]
    assert found
    assert all(found)
    return found


def cached(world: Path, output: Path, *more: str, **options) -> Path:
    return fit(world, output, 2, "data.cache_latents=true", f"data.store={output}/store", *more, **options)


def entries(output: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted((output / "store").rglob("*.entry"))}


def test_losses_with_and_without_are_the_same_and_latents_are_made_once(world, tmp_path, capsys):
    plain = losses(fit(world, tmp_path / "plain", 2))
    first = losses(cached(world, tmp_path, "name=first"))
    assert len(first) == len(plain) == 8
    for one, other in zip(first, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)
    assert "latents: 30 of 30 photographs to encode" in capsys.readouterr().out
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
    for one, other in zip(losses(with_cache), losses(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7)
    listed = [json.loads((folder / "quarantine.jsonl").read_text().splitlines()[0]) for folder in (plain, with_cache)]
    assert listed[0] == listed[1]
    assert listed[0]["key"] == samples[4]["__key__"]


def test_ranks_share_the_work_and_together_leave_nothing(world, tmp_path):
    """Two ranks one after the other, each with a store that the other has begun to fill."""
    from blipdiff_train.data.datamodule import ShardDataModule
    from blipdiff_train.data.store import SampleStore

    store = SampleStore("latents", {"of": "nothing"}, tmp_path)
    data = ShardDataModule(
        stage=2, shards=str(world / "data" / "stage2"), global_batch_size=2, micro_batch_size=1, total_steps=1, seed=0,
        image_size=16, target_size=16, latents=store,
    )  # fmt: skip
    seen: list[list[int]] = []

    class Module:
        device = "cpu"

        class denoiser:
            @staticmethod
            def encode_moments(images):
                assert images.shape == (1, 3, 16, 16)
                assert images.min() >= -1
                return images.new_full((1, 8, 8, 8), len(seen))

    shards = data.train_dataset().shard_sets[0]
    for rank in range(2):
        missing = store.missing(shards, range(rank, len(shards), 2))
        seen.append(missing)
        cache = LatentCache(data, callbacks.StopSignals(), print)
        assert len(list(cache._encode(Module, [(data.train_dataset(), shards, missing)]))) == 12
    assert sorted(seen[0] + seen[1]) == list(range(24))
    assert store.missing(shards, range(24)) == []
    moments = np.load(io.BytesIO(store.read(shards, 23)["latent.npy"]), allow_pickle=False)
    assert moments.dtype == np.float32
    assert (moments == 2).all()
