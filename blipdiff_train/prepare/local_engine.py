"""``engine=local``: worker processes on this machine's cores and, beside them, one process for each accelerator."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from blipdiff_train.prepare.models import Models, RemoteModels
from blipdiff_train.prepare.settings import Settings

# spawn: a fork would copy the threads' locks of torch, numba and OpenCV in whatever state they are
SPAWN = multiprocessing.get_context("spawn")

MODELS_DIED = (
    "the process with the segmenter or captioner died, perhaps for want of memory; lower segmenter.batch_size or "
    "captioner.batch_size. What is finished is kept: run the same command again to resume"
)
WORKER_DIED = (
    "a worker process died twice at the same task, perhaps for want of memory; use fewer workers. What is finished is "
    "kept: run the same command again to resume"
)


def run_all(
    make: Callable[..., Callable[[Any], Any]],
    settings: Settings,
    tasks: Sequence[Any],
    *,
    workers: int,
    devices: Sequence[str] = (),
) -> Iterator[Any]:
    """``make(settings, models=models)(task)`` for every task; results as they come.

    At most ``workers`` tasks are under way, and a result is handed out before the next task of its process, so that
    memory stays bounded however many tasks there are. A task whose process dies is given to a new one, once.

    Args:
        make: builds what a worker process needs, once for each. ``models`` is None without ``devices``.
        workers: processes that take tasks; 1 without devices means this process.
        devices: of torch; each gets a process with :class:`Models`, which the workers ask.

    Raises:
        RuntimeError: a process died twice at the same task, or one with the models.
        Exception: what a task or a model raised.
    """
    workers = min(workers, len(tasks))
    if not tasks:
        return
    if workers == 1 and not devices:
        do = make(settings)
        yield from (do(task) for task in tasks)
        return
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    servers: list[Any] = []
    pool: list[_Worker] = []
    try:
        addresses = []
        for device in devices:
            addresses.append(str(folder / f"models-{len(addresses)}"))
            servers.append(_start(_serve_models, settings, device, addresses[-1]))
        for _, pipe in servers:
            try:
                _received(pipe)  # loaded
            except EOFError:
                raise RuntimeError(MODELS_DIED) from None
        waiting = deque((task, 0) for task in tasks)
        for number in range(workers):
            address = addresses[number % len(addresses)] if addresses else None
            pool.append(_Worker(make, settings, address))
        while True:
            for worker in pool:
                if worker.task is None and waiting:
                    worker.give(*waiting.popleft())
            busy = {worker.pipe: worker for worker in pool if worker.task is not None}
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]
                task, deaths = worker.task, worker.deaths
                try:
                    result = _received(pipe)
                except EOFError:
                    if deaths:
                        raise RuntimeError(WORKER_DIED) from None
                    waiting.appendleft((task, deaths + 1))
                    pool[pool.index(worker)] = worker.again()
                else:
                    worker.task = None
                    yield result
    finally:
        for process, pipe, is_busy in [
            *((worker.process, worker.pipe, worker.task is not None) for worker in pool),
            *((process, pipe, False) for process, pipe in servers),
        ]:
            _end(process, pipe, is_busy)
        shutil.rmtree(folder, ignore_errors=True)


class _Worker:
    """One worker process, the pipe to it, and the task it has with the number of processes that died of it."""

    def __init__(self, make: Callable[..., Any], settings: Settings, models_address: str | None) -> None:
        self._arguments = (make, settings, models_address)
        self.process, self.pipe = _start(_work, *self._arguments)
        self.task: Any = None
        self.deaths = 0

    def give(self, task: Any, deaths: int) -> None:
        self.task, self.deaths = task, deaths
        # a process that is dead already shows as the end of its pipe
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def again(self) -> _Worker:
        self.process.join()
        return _Worker(*self._arguments)


def _start(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A process that runs ``target(pipe, *arguments)``, and the other end of its pipe."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()  # so that the process's death is the end of the pipe
    return process, ours


def _end(process: Any, pipe: Connection, is_busy: bool) -> None:
    """End a process that has nothing to do by closing its pipe, so that it cleans up; one that is busy at once."""
    pipe.close()
    if not is_busy:
        process.join(timeout=10)
    process.terminate()
    process.join()


def _received(pipe: Connection) -> Any:
    """What a process sent.

    Raises:
        EOFError: it died without a word.
        Exception: what it ended with.
    """
    try:
        good, value = pipe.recv()
    except ConnectionResetError:
        raise EOFError from None
    if good:
        return value
    raise value


# ---- what runs in the processes --------------------------------------------------------------------------------------


def _work(pipe: Connection, make: Callable[..., Any], settings: Settings, models_address: str | None) -> None:
    _end_with_parent()
    try:
        models = None
        if models_address is not None:
            connection = Client(models_address, "AF_UNIX", authkey=multiprocessing.current_process().authkey)
            models = RemoteModels(lambda *call: _asked(connection, call))
        do = make(settings, models=models)
        while True:
            task = pipe.recv()
            pipe.send((True, do(task)))
    except (EOFError, BrokenPipeError):
        return  # the job is over
    except Exception as error:
        pipe.send((False, _portable(error)))


def _asked(connection: Connection, call: tuple[Any, ...]) -> tuple[Any, float]:
    try:
        connection.send(call)
        good, value = connection.recv()
    except (EOFError, OSError) as error:
        raise RuntimeError(MODELS_DIED) from error
    if good:
        return value
    raise value


def _serve_models(pipe: Connection, settings: Settings, device: str, address: str) -> None:
    _end_with_parent()
    try:
        models = Models(settings, device)
        listener = Listener(address, "AF_UNIX", backlog=64, authkey=multiprocessing.current_process().authkey)
    except Exception as error:
        pipe.send((False, _portable(error)))
        return
    threading.Thread(target=_accept, args=(listener, models), daemon=True).start()
    pipe.send((True, device))
    with contextlib.suppress(EOFError, ConnectionResetError):
        pipe.recv()  # nothing comes: its end is the job's


def _accept(listener: Listener, models: Models) -> None:
    turn = threading.Lock()
    while True:
        # a thread a worker: one unpacks its photographs while another's are on the device
        threading.Thread(target=_answer, args=(listener.accept(), models, turn), daemon=True).start()


def _answer(connection: Connection, models: Models, turn: threading.Lock) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, *arguments = connection.recv()
            try:
                with turn:
                    answer = True, models.call(method, *arguments)
            except Exception as error:
                answer = False, _portable(error)
            connection.send(answer)


def _end_with_parent() -> None:
    """End this process with the one that started it, however that ended; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _portable(error: Exception) -> Exception:
    """The exception itself if it can cross a pipe whole, else one that says the same."""
    kinds = (ValueError, RuntimeError, OSError)
    return type(error)(*error.args) if type(error) in kinds else RuntimeError(f"{type(error).__name__}: {error}")
