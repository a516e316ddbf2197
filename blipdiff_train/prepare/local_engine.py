"""``engine=local``: worker processes on this machine's cores and, beside them, one process for each accelerator."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from blipdiff_train.prepare.models import ModelProcess, RemoteModels, outcome, value_of
from blipdiff_train.prepare.settings import Settings

# spawn: a fork would copy the threads' locks of torch, numba and OpenCV in whatever state they are
SPAWN = multiprocessing.get_context("spawn")

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
        devices: of torch; each gets a process with models, which the workers ask.

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
    servers: list[ModelProcess] = []
    pool: list[_Worker] = []
    try:
        for device in devices:
            servers.append(ModelProcess(settings, device))
        models = [server.models() for server in servers]
        waiting = deque((task, 0) for task in tasks)
        for number in range(workers):
            pool.append(_Worker(make, settings, models[number % len(models)] if models else None))
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
                    result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    if deaths:
                        raise RuntimeError(WORKER_DIED) from None
                    waiting.appendleft((task, deaths + 1))
                    pool[pool.index(worker)] = worker.again()
                else:
                    worker.task = None
                    yield value_of(*result)
    finally:
        for each in (*pool, *servers):
            each.close()


class _Worker:
    """One worker process, the pipe to it, and the task it has with the number of processes that died of it."""

    def __init__(self, make: Callable[..., Any], settings: Settings, models: RemoteModels | None) -> None:
        self._arguments = (make, settings, models)
        self.pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the process's death is the end of the pipe
        self.task: Any = None
        self.deaths = 0

    def give(self, task: Any, deaths: int) -> None:
        self.task, self.deaths = task, deaths
        # a process that is dead already shows as the end of its pipe
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def again(self) -> _Worker:
        self._process.join()
        return _Worker(*self._arguments)

    def close(self) -> None:
        """End the process: by closing its pipe, so that it cleans up, but at once if it is busy."""
        self.pipe.close()
        if self.task is None:
            self._process.join(timeout=10)
        self._process.terminate()
        self._process.join()


# ---- what runs in the processes --------------------------------------------------------------------------------------


def _work(pipe: Connection, make: Callable[..., Any], settings: Settings, models: RemoteModels | None) -> None:
    _end_with_parent()
    do: Callable[[Any], Any] | None = None

    def work(task: Any) -> Any:
        nonlocal do
        do = do or make(settings, models=models)
        return do(task)

    with contextlib.suppress(EOFError, BrokenPipeError):  # the job is over
        while True:
            pipe.send(outcome(work, pipe.recv()))


def _end_with_parent() -> None:
    """End this process with the one that started it, however that ended; leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
