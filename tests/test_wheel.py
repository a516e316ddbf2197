"""Installed from a wheel, far from any checkout, the same commands run."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The ``bin`` of a new environment with the wheel in it, and this environment's packages within its reach."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, check=True, cwd=tiny.REPOSITORY, capture_output=True, timeout=500)
    [wheel] = (folder / "dist").glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=500)
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


@pytest.mark.slow
def test_a_wheel_has_all_it_needs(installed, tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(installed / words[0]), *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run("python", "-c", "import blipdiff_train; print(blipdiff_train.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "python -m blipdiff_train stage=2 trainer.devices=8" in run("blipdiff", "--help")
    assert "2 jobs over optim.lr" in run("blipdiff", "-m", "stage=2", "optim.lr=1e-4,3e-4", "--cfg")
    assert "segmenter:\n" in run("blipdiff", "prepare", "--cfg")
    # configurations, recipes, embedded models: a run of the toy world
    words = ["stage=1", "experiment=smoke", "total_steps=1", "trainer.accelerator=cpu", "every.validation=null"]
    out = run("python", "-m", "blipdiff_train", *words, "data.toybox.train_samples=8", "data.toybox.val_samples=1")
    assert "finished: the model is in outputs/stage1/smoke/model" in out
    assert (tmp_path / "outputs" / "stage1" / "smoke" / "model" / "qformer").is_dir()
