"""Cached latents as typed, in two processes: made once, by both, whatever kills the run, with one process's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from runs import fit

SAMPLES = 96
NO_DROPOUT = "model.qformer.dropout=0"  # its numbers depend on how many processes there are


def entries(store: Path) -> dict[str, Path]:
    """Finished ones, by their place in the store."""
    return {str(path.relative_to(store)): path for path in store.rglob("[0-9]*.entry")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_make_latents_once_through_two_kills(world, tmp_path, chaos):
    tiny.write_data(tmp_path / "data", samples=SAMPLES)
    total = SAMPLES + 6  # and the validation's

    def folder(name: str) -> Path:
        return tmp_path / "runs" / "stage2" / name

    def store(name: str) -> Path:
        return tmp_path / f"store of {name}"

    def words(name: str) -> list[str]:
        common = tiny.overrides(world / "models", tmp_path / "data", tmp_path / "runs", 2)
        cache = ["data.cache_latents=true", f"data.store=\"{store(name)}\"", f"name={name}"]
        return [*common, *cache, NO_DROPOUT, "data.workers=1", "trainer.devices=2"]

    tiny.run(*words("quiet"))
    again = words("killed")
    tiny.run_killed(*again, reached=lambda: len(entries(store("killed"))) >= 12, log=tmp_path / "encoding")
    before = {name: path.stat().st_mtime_ns for name, path in entries(store("killed")).items()}
    assert 12 <= len(before) < total
    tiny.run_killed(*again, reached=lambda: chaos.last_step(folder("killed")) >= 3, log=tmp_path / "training")
    assert f"latents: {total - len(before)} of {total} photographs" in (tmp_path / "training").read_text()
    made = {name: path.stat().st_mtime_ns for name, path in entries(store("killed")).items()}
    assert len(made) == total
    assert {name: made[name] for name in before} == before
    assert "latents: all are there" in tiny.run(*again).stdout
    assert {name: path.stat().st_mtime_ns for name, path in entries(store("killed")).items()} == made
    assert chaos.differences(folder("quiet"), folder("killed")) == []

    here = [NO_DROPOUT, f"data.shards={tmp_path}/data/stage2", f"data.val_shards={tmp_path}/data/val2"]
    fit(world, tmp_path / "alone", 2, *here, "data.cache_latents=true", f"data.store={tmp_path}/alone/store")
    of_one = {name: path.read_bytes() for name, path in entries(tmp_path / "alone" / "store").items()}
    for name in ("quiet", "killed"):
        assert {entry: path.read_bytes() for entry, path in entries(store(name)).items()} == of_one
    plain = fit(world, tmp_path / "plain", 2, *here)
    for file in ("metrics.csv", "validation.csv"):
        pairs = list(zip(chaos.rows(plain / file), chaos.rows(folder("quiet") / file), strict=True))
        assert pairs
        for row, other in pairs:
            losses = [name for name in row if "loss" in name or name.startswith("grad")]
            assert losses
            assert [float(other[name]) for name in losses] == pytest.approx(
                [float(row[name]) for name in losses], rel=1e-4, abs=1e-7
            )
