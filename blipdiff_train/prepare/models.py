"""The models that a job can put on a device, CLIPSeg and a captioner: in this process, or in one of their own.

Workers of a job and loaders of a training run are many, and may be forks of a process that has used a GPU, so that they
cannot use it themselves. They squeeze their photographs into squares, ask the process that has the models, and go on
from its answers. Squares that arrive together share a forward; the bits of an answer do not depend on that, see
:meth:`CLIPSegSegmenter.probabilities`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import CLIPSegSegmenter, to_photograph, to_square
from blipdiff_train.prepare.settings import Settings

if TYPE_CHECKING:
    from blipdiff_train.prepare.captioning import Captioner

MODELS_DIED = (
    "the process with the segmenter or captioner died, perhaps for want of memory; lower segmenter.batch_size or "
    "captioner.batch_size. What is finished is kept: run the same command again to resume"
)


class Models:
    """What the settings ask for, loaded onto ``device`` (of torch). It is a segmenter too, if there is a CLIPSeg.

    Raises:
        ValueError: a model cannot be loaded; the key is named.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        if device == "cpu":
            import torch

            # as in every process of a job: sums are made in one order, and processes do not fight over cores
            torch.set_num_threads(1)
        self.clipseg: CLIPSegSegmenter | None = None
        self.captioner: Captioner | None = None
        segmenter, captioner = settings.segmenter, settings.captioner
        if segmenter.name == "clipseg":
            self.clipseg = _load(
                f"segmenter.model={segmenter.model}",
                device,
                lambda: CLIPSegSegmenter(segmenter.model, device=device, batch_size=segmenter.batch_size),
            )
        if captioner.model is not None:
            from blipdiff_train.prepare.captioning import Captioner

            self.captioner = _load(
                f"captioner.model={captioner.model}",
                device,
                lambda: Captioner(
                    captioner.model,
                    device=device,
                    dtype=captioner.dtype,
                    batch_size=captioner.batch_size,
                    max_new_tokens=captioner.max_new_tokens,
                ),
            )

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        """See :class:`blipdiff_train.context.segmentation.Segmenter`."""
        return self.clipseg.segment(images, subject_texts)

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """See :meth:`Captioner.caption`."""
        return self.captioner.caption(images)

    def describe(self) -> dict[str, Any]:
        """Provenance of the segmenter."""
        return self.clipseg.describe()

    def describe_captioner(self) -> dict[str, Any]:
        """Provenance of the captioner."""
        return self.captioner.describe()


class RemoteModels:
    """:class:`Models` elsewhere; ``waited_seconds`` is what the last answer took beyond the device's time for it.

    Args:
        ask: gives what :meth:`ModelServer.answer` gives there.
        facts: :meth:`ModelServer.facts` there.
    """

    def __init__(self, ask: Callable[..., tuple[Any, float]], facts: dict[str, Any]) -> None:
        self._ask, self._facts = ask, facts
        self.waited_seconds = 0.0

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        squares = [to_square(image, self._facts["size_px"]) for image in images]
        answers = self._timed("segment", squares, list(subject_texts))
        return [to_photograph(answer, image) for answer, image in zip(answers, images, strict=True)]

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        return self._timed("caption", images)

    def describe(self) -> dict[str, Any]:
        return self._facts["segmenter"]

    def describe_captioner(self) -> dict[str, Any]:
        return self._facts["captioner"]

    def _timed(self, *question: Any) -> Any:
        started = time.perf_counter()
        answer, device_seconds = self._ask(*question)
        self.waited_seconds = max(0.0, time.perf_counter() - started - device_seconds)
        return answer


@dataclass
class _Square:
    pixels: np.ndarray  # S S 3 uint8
    subject_text: str
    answer: np.ndarray | Exception | None = None  # s s float32 in [0, 1]
    device_seconds: float = 0.0


class ModelServer:
    """:class:`Models` that many may ask at once, each in a thread of its own; a single thread has the device.

    Squares that are waiting when the device is free fill its next forward, whoever asked. A captioner's question stays
    by itself: its words may depend on what else is in the batch.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self._device = ThreadPoolExecutor(1)
        self._models = self._device.submit(Models, settings, device).result()
        self._waiting: deque[_Square] = deque()

    def facts(self) -> dict[str, Any]:
        """What :class:`RemoteModels` must know."""
        clipseg, captioner = self._models.clipseg, self._models.captioner
        return {
            "size_px": clipseg and clipseg.size_px,
            "segmenter": clipseg and clipseg.describe(),
            "captioner": captioner and captioner.describe(),
        }

    def answer(self, step: str, *arguments: Any) -> tuple[Any, float]:
        """The answer to ``("segment", squares, subject_texts)`` (list of S S 3 uint8 to list of s s float32) or
        ``("caption", images)``, and its share of the device's time in seconds."""
        return {"segment": self._segment, "caption": self._caption}[step](*arguments)

    def _segment(self, squares: Sequence[np.ndarray], subject_texts: Sequence[str]) -> tuple[list[np.ndarray], float]:
        asked = [_Square(*pair) for pair in zip(squares, subject_texts, strict=True)]
        self._waiting.extend(asked)
        self._device.submit(self._answer_all, asked).result()
        for square in asked:
            if isinstance(square.answer, Exception):
                raise square.answer
        return [square.answer for square in asked], sum(square.device_seconds for square in asked)

    def _answer_all(self, asked: list[_Square]) -> None:
        clipseg = self._models.clipseg
        while any(square.answer is None for square in asked):
            part = [self._waiting.popleft() for _ in range(min(clipseg.batch_size, len(self._waiting)))]
            started = time.perf_counter()
            try:
                answers = clipseg.probabilities([s.pixels for s in part], [s.subject_text for s in part])
            except Exception as error:  # for all who asked
                answers = [error] * len(part)
            seconds = (time.perf_counter() - started) / len(part)
            for square, square.answer in zip(part, answers, strict=True):
                square.device_seconds = seconds

    def _caption(self, images: Sequence[np.ndarray]) -> tuple[list[str], float]:
        def caption() -> tuple[list[str], float]:
            started = time.perf_counter()
            return self._models.caption(images), time.perf_counter() - started

        return self._device.submit(caption).result()


class ModelProcess:
    """A process of its own with a :class:`ModelServer`; its end is :meth:`close`, or that of this object or process.

    Args:
        settings: of the job.
        device: of torch.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self._door, theirs = Pipe()
        number, root = theirs.fileno(), str(Path(__file__).resolve().parents[2])
        # schedulers and Ctrl-C signal every process of a job; the one that started this one decides, and ends it
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({number})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[number],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
            theirs.close()
        self.close = weakref.finalize(self, _end, self._process, self._door, os.getpid())
        with suppress(OSError):  # it died; its answer is missing, too
            self._door.send((settings, device))

    def models(self) -> RemoteModels:
        """The way to ask, once all is loaded; for this process, its forks, and processes that it spawns.

        Raises:
            ValueError: a model cannot be loaded; the key is named.
            RuntimeError: the process died.
        """
        try:
            loaded = self._door.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(MODELS_DIED) from error
        return RemoteModels(_Line(self._door), value_of(*loaded))


class _Line:
    """A connection to a process with models, for each process that has a copy of this; opened when it first asks.

    The way in is no address but ``door``, which only copies of this have: what comes through it may be unpickled, and
    the last copy's end, however it came about, is the end of the process with the models.
    """

    def __init__(self, door: Connection) -> None:
        self._door = door
        self._own: tuple[int, Connection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_door": self._door, "_own": None}

    def __call__(self, *question: Any) -> tuple[Any, float]:
        try:
            if self._own is None or self._own[0] != os.getpid():
                ours, theirs = Pipe()
                with theirs:
                    send_handle(self._door, theirs.fileno(), None)
                self._own = os.getpid(), ours
            self._own[1].send(question)
            answer = self._own[1].recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(MODELS_DIED) from error
        return value_of(*answer)


def _end(process: subprocess.Popen, door: Connection, owner: int) -> None:
    if os.getpid() != owner:
        return
    door.close()
    try:
        process.wait(timeout=5)  # a forked loader may still hold the door
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """What a call gave, to be sent to another process: (True, result), or (False, exception)."""
    try:
        return True, function(*arguments)
    except Exception as error:
        # an exception that cannot cross whole is replaced by one that says the same
        kinds = (ValueError, RuntimeError, OSError)
        whole = type(error) in kinds
        return False, type(error)(*error.args) if whole else RuntimeError(f"{type(error).__name__}: {error}")


def value_of(good: bool, value: Any) -> Any:
    """The result of an :func:`outcome`, or its exception raised."""
    if good:
        return value
    raise value


def _load(setting: str, device: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{setting}: cannot be loaded onto {device}: {first}") from error


# ---- what runs in the process with the models ------------------------------------------------------------------------


def serve(number: int) -> None:
    """Load what is asked for, say so, and let those in who come, until nobody is left who could: see :class:`_Line`.

    Args:
        number: file descriptor of this side of the door.
    """
    door = Connection(number)
    with suppress(EOFError, OSError):
        # beside this thread, which has to notice the end of the others while a large model is still being read
        loading = ThreadPoolExecutor(1).submit(ModelServer, *door.recv())
        loading.add_done_callback(lambda done: door.send(outcome(lambda: done.result().facts())))
        while True:
            client = Connection(recv_handle(door))
            # a thread for each: one unpacks its photographs while another's are on the device
            Thread(target=_answer, args=(client, loading.result()), daemon=True).start()
    sys.stderr.flush()
    os._exit(0)  # without the seconds that torch takes to leave


def _answer(client: Connection, server: ModelServer) -> None:
    with suppress(EOFError, OSError), client:
        while True:
            client.send(outcome(server.answer, *client.recv()))
