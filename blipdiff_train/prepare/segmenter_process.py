"""CLIPSeg in a process of its own, on the rank's device, for the rank's loaders to ask.

Loaders are forks of a process that may have used a GPU, so they cannot use it themselves; and a model in each of them
would be many. They squeeze their photographs into squares, send these over a local socket, and go on from the answers.
Questions that arrive together are answered in one forward. The bits of an answer do not depend on that, see
:meth:`CLIPSegSegmenter.probabilities`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from blipdiff_train.context.rejection import Rejection
from blipdiff_train.context.segmentation import CLIPSegSegmenter, to_photograph, to_square

_MAX_REQUEST_BYTES = 1 << 30


class SegmenterProcess:
    """CLIPSeg as a :class:`~blipdiff_train.context.segmentation.Segmenter` that computes elsewhere.

    May be copied into other processes by forking or pickling; each copy opens its own connection when it first asks.

    Args:
        model: folder or hub id.
        device: of torch; on the CPU it takes one thread.
        batch_size: squares a forward.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, model: str, *, device: str, batch_size: int) -> None:
        folder = tempfile.mkdtemp(prefix="blipdiff-")
        self._address = str(Path(folder) / "segmenter")
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
        )
        # its input stays open as long as this process lives: its end is how the other learns of ours
        self._close = weakref.finalize(self, _end, self._process, folder, os.getpid())
        asked = {"model": model, "device": device, "batch_size": batch_size, "address": self._address}
        answer = b""
        with suppress(OSError):
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        found = json.loads(answer) if answer else {"error": "its process ended at once; the reason stands above"}
        if "error" in found:
            self.close()
            raise ValueError(f"the segmenter {model} cannot be used on {device}: {found['error']}")
        self.size_px: int = found["size_px"]
        self._description: dict[str, Any] = found["description"]
        self._connection: tuple[int, Connection] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_process", "_close")} | {"_connection": None}

    def describe(self) -> dict[str, Any]:
        return self._description

    def segment(self, images: Sequence[np.ndarray], subject_texts: Sequence[str]) -> list[np.ndarray | Rejection]:
        """See :class:`~blipdiff_train.context.segmentation.Segmenter`.

        Raises:
            RuntimeError: the process failed or ended.
        """
        squares = np.stack([to_square(image, self.size_px) for image in images])  # N S S 3
        try:
            connection = self._connect()
            connection.send_bytes(json.dumps(list(subject_texts)).encode())
            connection.send_bytes(squares.tobytes())
            head = json.loads(connection.recv_bytes())
            if "error" in head:
                raise RuntimeError(f"the segmenter failed: {head['error']}")
            answers = np.frombuffer(connection.recv_bytes(), np.float32).reshape(head["shape"])
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"the segmenter's process ended ({error or 'no answer'}); out of memory? Start the same command again: "
                "mattes that are finished are kept"
            ) from error
        return [to_photograph(answer, image) for answer, image in zip(answers, images, strict=True)]

    def close(self) -> None:
        """End the process; only the one that started it does."""
        self._close()

    def _connect(self) -> Connection:
        if self._connection is None or self._connection[0] != os.getpid():
            line = socket.socket(socket.AF_UNIX)
            line.connect(self._address)
            self._connection = os.getpid(), Connection(line.detach())
        return self._connection[1]


def _end(process: subprocess.Popen, folder: str, owner: int) -> None:
    if os.getpid() != owner:
        return
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    try:
        process.wait(timeout=5)  # a forked loader may still hold the pipe
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- the other process


def serve(segmenter: CLIPSegSegmenter, listener: socket.socket, lifeline: Any) -> None:
    """Answer until ``lifeline`` ends."""
    clients: list[Connection] = []
    while True:
        ready = wait([lifeline, listener, *clients])
        if lifeline in ready:
            return
        asked: list[tuple[Connection, list[str], np.ndarray]] = []
        for client in ready:
            if client is listener:
                clients.append(Connection(listener.accept()[0].detach()))
                continue
            try:
                texts = json.loads(client.recv_bytes(_MAX_REQUEST_BYTES))
                squares = np.frombuffer(client.recv_bytes(_MAX_REQUEST_BYTES), np.uint8)
                asked.append((client, texts, squares.reshape(len(texts), segmenter.size_px, segmenter.size_px, 3)))
            except (EOFError, OSError):  # the loader ended
                clients.remove(client)
                client.close()
        if asked:
            _answer(segmenter, asked, clients)


def _answer(segmenter: CLIPSegSegmenter, asked: list, clients: list[Connection]) -> None:
    """One pass over everything that was asked for together."""
    answers: list[np.ndarray] = []
    problem = None
    try:
        squares = [square for _, _, squares in asked for square in squares]
        answers = segmenter.probabilities(squares, [text for _, texts, _ in asked for text in texts])
    except Exception as error:  # the loaders say it, and the run stops with it
        problem = f"{type(error).__name__}: {error}"
    start = 0
    for client, texts, _ in asked:
        try:
            if problem is not None:
                client.send_bytes(json.dumps({"error": problem}).encode())
                continue
            rows = np.ascontiguousarray(np.stack(answers[start : start + len(texts)]), np.float32)
            start += len(texts)
            client.send_bytes(json.dumps({"shape": rows.shape}).encode())
            client.send_bytes(rows.tobytes())
        except OSError:  # it was killed meanwhile
            clients.remove(client)
            client.close()


def main() -> None:
    """Read what to load from the input, say what was loaded, and serve."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job; the trainer decides, and ends this one
    reply = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    asked = json.loads(sys.stdin.buffer.raw.readline())
    try:
        import torch

        torch.set_num_threads(1)  # as in a preparation job, whose bits these must be
        segmenter = CLIPSegSegmenter(asked["model"], device=asked["device"], batch_size=asked["batch_size"])
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(asked["address"])
        listener.listen(128)
        found = {"size_px": segmenter.size_px, "description": segmenter.describe()}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    reply.write(json.dumps(found).encode() + b"\n")
    reply.close()
    if "error" not in found:
        serve(segmenter, listener, sys.stdin.buffer.raw)
    sys.stderr.flush()
    os._exit(0)  # without the seconds that torch takes to leave


if __name__ == "__main__":
    main()
