"""Cached latents as typed, in two processes: made once, by both, whatever kills the run, with one process's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from runs import check_close, fit

SAMPLES = 96


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

    def words(name: str, *more: str) -> list[str]:
        common = tiny.overrides(world / "models", tmp_path / "data", tmp_path / "runs", 2)
        return [*common, f"name={name}", "data.workers=1", "trainer.devices=2", *more]

    def cached(name: str) -> list[str]:
        return words(name, "data.cache_latents=true", f"data.store='{store(name)}'")

    tiny.run(*cached("quiet"))
    again = cached("killed")
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

    here = [f"data.shards={tmp_path}/data/stage2", f"data.val_shards={tmp_path}/data/val2", "total_steps=2"]
    fit(world, tmp_path / "alone", 2, *here, "data.cache_latents=true", f"data.store={tmp_path}/alone/store")
    of_one = {name: path.read_bytes() for name, path in entries(tmp_path / "alone" / "store").items()}
    for name in ("quiet", "killed"):
        assert {entry: path.read_bytes() for entry, path in entries(store(name)).items()} == of_one

    tiny.run(*words("plain"))
    check_close(folder("plain"), folder("quiet"))
