"""engine=ray on a real cluster of two nodes on this machine: the bytes of one process, and errors one can act on.

Ray is an optional extra; `make test` installs it, `make test-fast` runs without.
"""

# ruff: noqa: E402 (without Ray there is nothing to import)
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if "RAY_ADDRESS" in os.environ:
    pytest.skip("RAY_ADDRESS is set: these tests start a cluster of their own", allow_module_level=True)
ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster as LocalCluster
from test_engines import REPOSITORY, environment, toy_job
from test_job import bytes_of

from blipdiff_train.data.toybox.write import write_photograph_folder
from blipdiff_train.prepare import job, ray_engine, work

pytestmark = pytest.mark.slow
MEMORY = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


class NotingNode(work.Worker):
    """Notes in the output on which node it is."""

    def __call__(self, unit):
        node = ray.get_runtime_context().get_node_id()
        Path(self.settings.output, f"node-{node}").touch()
        return super().__call__(unit)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two CPUs each; everything of it ends with the module."""
    before = dict(os.environ)
    # what a node's processes can import: this checkout, and the tests' own modules
    os.environ["PYTHONPATH"] = f"{REPOSITORY}:{Path(__file__).parent}"
    os.environ.update(RAY_worker_niceness="0")  # on a busy machine they would wait for everything else
    made = LocalCluster()
    try:
        made.add_node(num_cpus=2, **MEMORY)
        made.add_node(num_cpus=2, **MEMORY)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    from image_to_text import write_blip

    folder = tmp_path_factory.mktemp("toy")
    write_photograph_folder(folder / "photos", 14, size=64)
    write_blip(folder / "blip")
    job.run(**toy_job(folder, folder / "one", workers=1))
    return folder


def test_two_nodes_give_the_bytes_of_one_process(cluster, toy, tmp_path, monkeypatch):
    output = tmp_path / "ray"
    monkeypatch.setattr(job, "Worker", NotingNode)
    where = {"engine": "ray", "ray_address": cluster.address, "accelerator": "cpu", "devices": 1}
    summary = job.run(**toy_job(toy, output, photographs_per_shard=1, **where))
    assert summary.num_samples > 10
    assert not ray.is_initialized()
    whole = tmp_path / "whole"
    monkeypatch.undo()
    job.run(**toy_job(toy, whole, workers=1, photographs_per_shard=1))
    assert bytes_of(output) == bytes_of(whole)
    assert len(list(output.glob("node-*"))) == 2


def test_grabcut_tasks_need_no_actor_and_duplicates_are_found_in_the_cluster(cluster, photographs, tmp_path):
    settings = {"photographs_per_shard": 5, "progress": False, "filters": {"blur": 1.0}, "input": str(photographs)}
    job.run(**settings, output=str(tmp_path / "one"), workers=1)
    summary = job.run(**settings, output=str(tmp_path / "ray"), engine="ray", ray_address=cluster.address)
    assert summary.rejected["duplicate"] == 1
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "one")
    # and finished shards are recognised, whichever engine made them
    again = job.run(**settings, output=str(tmp_path / "ray"), workers=1)
    assert again.num_units_reused == again.num_shards


def test_what_the_cluster_lacks_is_said(cluster, toy, tmp_path):
    settings = toy_job(toy, tmp_path / "o", engine="ray", ray_address=cluster.address)
    with pytest.raises(ValueError, match=r"devices=2, but the cluster has 0 GPUs; .* add accelerator=cpu"):
        job.run(**settings, devices=2)
    with pytest.raises(ValueError, match=r"the cluster has 4 CPUs, and 4 processes with models leave none"):
        job.run(**settings, devices=4, accelerator="cpu")
    (tmp_path / "empty").mkdir()
    broken = settings | {"segmenter": {"name": "clipseg", "model": str(tmp_path / "empty")}}
    with pytest.raises(ValueError, match=r"segmenter.model=.*empty: cannot be loaded"):
        job.run(**broken, devices=1, accelerator="cpu")
    with pytest.raises(ValueError, match=r"segmenter.model=.*empty: cannot be loaded"):
        job.run(**broken | {"output": str(tmp_path / "p")}, accelerator="cpu")


def test_without_a_cluster_the_command_line_says_how_to_start_one(toy, tmp_path):
    words = [f"input={toy / 'photos'}", f"output={tmp_path / 'o'}", "engine=ray", "ray_address=127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-m", "blipdiff_train", "prepare", *words], capture_output=True, text=True, cwd=REPOSITORY,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "engine=ray: no cluster at ray_address=127.0.0.1:1" in done.stderr
    assert "ray start --head" in done.stderr


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'blipdiff_train\[ray\]'"):
        ray_engine.Cluster(None)
