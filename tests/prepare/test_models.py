"""Models in a process of their own: the bits of this one, whoever asks and when, and an end for every beginning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from image_to_text import write_blip
from pictures import draw

import blipdiff_train
from blipdiff_train.context.segmentation import CLIPSegSegmenter, to_square
from blipdiff_train.prepare.captioning import Captioner
from blipdiff_train.prepare.models import ModelProcess, ModelServer
from blipdiff_train.prepare.settings import Settings, make_settings

ROOT = Path(__file__).resolve().parents[2]
CLIPSEG = Path(blipdiff_train.__file__).parent / "assets" / "toy_foundation" / "clipseg"
BATCH_SIZE = 4


def settings_of(model: str | Path = CLIPSEG, **more) -> Settings:
    segmenter = {"name": "clipseg", "model": str(model), "batch_size": BATCH_SIZE}
    return make_settings({"input": "i", "output": "o", "segmenter": segmenter, **more})


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("blip")
    write_blip(folder)
    return {"model": str(folder), "max_new_tokens": 4}


class Gate:
    """Stands before a method of a model: notes the size of each batch, and keeps the first waiting."""

    def __init__(self, monkeypatch, owner: type, method: str) -> None:
        self.sizes: list[int] = []
        self.entered, self.opened = threading.Event(), threading.Event()
        original = getattr(owner, method)

        def guarded(model, batch, *arguments):
            self.sizes.append(len(batch))
            self.entered.set()
            assert self.opened.wait(60)
            return original(model, batch, *arguments)

        monkeypatch.setattr(owner, method, guarded)


def ask_together(server: ModelServer, gate: Gate, questions: list[tuple]) -> list:
    """Futures of the answers; all but the first are asked, in their order, while the first is on the device."""
    threads = ThreadPoolExecutor(len(questions))
    futures = [threads.submit(server.answer, *questions[0])]
    assert gate.entered.wait(60)
    asked, submit = threading.Semaphore(0), server._device.submit

    def noted(*arguments):
        future = submit(*arguments)
        asked.release()
        return future

    server._device.submit = noted
    for question in questions[1:]:
        futures.append(threads.submit(server.answer, *question))
        assert asked.acquire(timeout=60)
    gate.opened.set()
    threads.shutdown()
    return futures


def squares(numbers) -> tuple[list[np.ndarray], list[str]]:
    pictures = [draw(number, (60 + number, 70)) for number in numbers]
    return [to_square(picture, 64) for picture in pictures], [f"ball {number}" for number in numbers]


def test_squares_that_wait_share_forwards_and_have_the_bits_they_have_alone(monkeypatch):
    server = ModelServer(settings_of(), "cpu")
    questions = [("segment", *squares(numbers)) for numbers in ((0,), (1, 2, 3), (4,), (5, 6), (7, 8, 9, 10, 11))]
    alone = [server.answer(*question)[0] for question in questions]
    gate = Gate(monkeypatch, CLIPSegSegmenter, "probabilities")
    futures = ask_together(server, gate, questions)
    assert gate.sizes == [1, 4, 4, 3]  # not 1, 3, 1, 2, 4, 1
    for future, expected in zip(futures, alone, strict=True):
        answers, seconds = future.result()
        assert [answer.tobytes() for answer in answers] == [answer.tobytes() for answer in expected]
        assert seconds > 0


def test_a_forward_that_fails_fails_for_all_who_share_it_and_for_nobody_else(monkeypatch):
    server = ModelServer(settings_of(), "cpu")
    questions = [("segment", *squares(numbers)) for numbers in ((0,), (1, 2), (3, 4), (5,))]
    questions[1][1][1] = questions[1][1][1][:, :-1]  # not a square
    expected = server.answer(*questions[3])[0]
    gate = Gate(monkeypatch, CLIPSegSegmenter, "probabilities")
    futures = ask_together(server, gate, questions)
    assert [future.exception() is None for future in futures] == [True, False, False, True]
    assert np.array_equal(futures[3].result()[0], expected)
    assert np.array_equal(server.answer(*questions[3])[0], expected)


def test_captions_are_made_of_the_photographs_that_were_asked_about_together(captioner, monkeypatch):
    server = ModelServer(settings_of(captioner=captioner), "cpu")
    gate = Gate(monkeypatch, Captioner, "caption")
    questions = [("caption", [draw(number) for number in numbers]) for numbers in ((0, 1), (2,), (3, 4, 5))]
    futures = ask_together(server, gate, questions)
    assert sorted(gate.sizes) == [1, 2, 3]
    assert [len(future.result()[0]) for future in futures] == [2, 1, 3]


@pytest.mark.slow
def test_a_process_answers_as_the_models_here_and_says_what_they_are(captioner):
    settings = settings_of(captioner=captioner)
    process = ModelProcess(settings, "cpu")
    # at any time, before it has begun to load too: schedulers and Ctrl-C reach every process of a job
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process._process.pid, number)
    models, here = process.models(), ModelServer(settings, "cpu")._models
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process._process.pid, number)
    pictures, texts = [draw(number, (60 + number, 70)) for number in range(6)], ["ball", "cube"] * 3
    answers = models.segment(pictures, texts)
    assert [a.tobytes() for a in answers] == [a.tobytes() for a in here.segment(pictures, texts)]
    assert models.waited_seconds > 0
    assert models.caption(pictures) == here.caption(pictures)
    assert models.describe() == here.describe()
    assert models.describe_captioner() == here.describe_captioner()

    process._process.kill()
    process._process.wait()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"segmenter or captioner died, .* same command again to resume"):
            models.segment(pictures, texts)
    process.close()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_and_a_process_that_dies_while_loading_are_told_apart(tmp_path):
    process = ModelProcess(settings_of(tmp_path), "cpu")  # an empty folder
    with pytest.raises(ValueError, match=r"segmenter.model=.*: cannot be loaded onto cpu: "):
        process.models()
    process.close()
    assert process._process.returncode == 0  # it was not killed
    process = ModelProcess(settings_of(), "cpu")
    process._process.kill()
    with pytest.raises(RuntimeError, match=r"segmenter or captioner died"):
        process.models()
    process.close()


TRAINER = """
from pictures import draw
from test_models import settings_of
from torch.utils.data import DataLoader, Dataset

from blipdiff_train.prepare.models import ModelProcess


process = ModelProcess(settings_of(), "cpu")
models = process.models()


class Photographs(Dataset):
    def __len__(self):
        return 1_000_000

    def __getitem__(self, number):
        return models.segment([draw(number % 8)], ["ball"])[0]


for _ in DataLoader(Photographs(), batch_size=2, num_workers=2):
    print("step", flush=True)
"""


@pytest.fixture
def short_folder():
    """Names of sockets have 107 bytes, and pytest's folders have long names."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_process_and_no_folder(tmp_path, short_folder):
    (tmp_path / "trainer.py").write_text(TRAINER)
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(short_folder)},
    )
    assert trainer.stdout.readline() == b"step\n"
    processes = psutil.Process(trainer.pid).children(recursive=True)
    assert len(processes) >= 3, "two loaders and the models"
    trainer.kill()
    trainer.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    # torch leaves some: of a loader that is interrupted while it hands a tensor over, and of its compiler
    left = {path.name.partition("-")[0].partition("_")[0] for path in short_folder.iterdir()}
    assert left <= {"pymp", "torchinductor"}
