"""Fixtures for all tests: repository paths, real photographs where they are at hand, one thread a process."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# before anything imports them: tests are offline, quiet and single-threaded
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Numbers recorded from the reference implementations."""
    return REPOSITORY / "tests" / "goldens"


@pytest.fixture(scope="session")
def dreambench() -> Path:
    """Real photographs of real subjects, one folder a subject; the test is skipped where they are absent."""
    folder = REPOSITORY.parent / "shared" / "dreambench"
    if not folder.is_dir():
        pytest.skip("the DreamBench photographs are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """``models/`` and ``data/`` of ``tiny``: what whole runs of a few seconds need."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_models(folder / "models")
    tiny.write_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def chaos():
    """``scripts/chaos.py`` as a module: it compares two runs bit for bit."""
    spec = importlib.util.spec_from_file_location("chaos", REPOSITORY / "scripts" / "chaos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module
