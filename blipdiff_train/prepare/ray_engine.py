"""``engine=ray``: tasks on the CPUs of a Ray cluster that is there already, actors with the models on its accelerators.

Each node needs this package and the folders of the input and the output under the same names.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blipdiff_train.prepare.models import ModelServer, RemoteModels
from blipdiff_train.prepare.settings import Settings

MAX_RETRIES = 3
"""How often a task is given to another process after its own has died, a lost machine included."""


class Cluster:
    """A connection to a cluster; a context manager.

    Args:
        address: of the cluster's head (``host:port``); None for the one that ``RAY_ADDRESS`` or this machine names.

    Raises:
        ValueError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("engine=ray: Ray is not installed; pip install 'blipdiff_train[ray]'") from error
        self._ray = ray
        self._connected = not ray.is_initialized()
        if self._connected:
            try:
                if address is not None:
                    _knock(address)
                ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                where = f"at ray_address={address}" if address else "on this machine or in RAY_ADDRESS"
                raise ValueError(
                    f"engine=ray: no cluster {where} ({str(error).splitlines()[0]}); start one with `ray start --head`,"
                    " or use engine=local"
                ) from error
        resources = ray.cluster_resources()
        self.num_cpus, self.num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._connected:
            self._ray.shutdown()

    def run_all(
        self,
        make: Callable[..., Callable[[Any], Any]],
        settings: Settings,
        tasks: Sequence[Any],
        *,
        workers: int,
        devices: Sequence[str] = (),
    ) -> Iterator[Any]:
        """As :func:`blipdiff_train.prepare.local_engine.run_all`, with ``workers`` tasks under way in the cluster."""
        ray = self._ray
        actors = [
            ray.remote(num_cpus=1, num_gpus=int(device != "cpu"), max_concurrency=-(-workers // len(devices)))(
                ModelActor
            ).remote(settings, device)
            for device in devices
        ]
        task_of = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_work)
        ours = ray.put(settings)
        waiting, running = enumerate(tasks), set()
        try:
            facts = [self._result(actor.load.remote()) for actor in actors]
            while True:
                while len(running) < workers and (numbered := next(waiting, None)) is not None:
                    number, task = numbered
                    models = (actors[number % len(actors)], facts[number % len(actors)]) if actors else None
                    running.add(task_of.remote(make, ours, models, task))
                if not running:
                    return
                finished, _ = ray.wait(list(running), num_returns=1)
                running -= set(finished)
                yield from (self._result(reference) for reference in finished)
        finally:
            for reference in running:
                ray.cancel(reference)
            for actor in actors:
                ray.kill(actor)

    def _result(self, reference: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, (ValueError, OSError)):
                raise error.cause from error
            raise RuntimeError(f"engine=ray: a task failed: {error.cause!r}") from error
        except (RayActorError, WorkerCrashedError) as error:
            raise RuntimeError(
                f"engine=ray: {error}. What is finished is kept: run the same command again to resume"
            ) from error


def _knock(address: str) -> None:
    """Ray itself tries for minutes to reach a head that is not there.

    Raises:
        OSError: nothing listens at ``address``.
        ValueError: it is not host:port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("expected host:port")
    socket.create_connection((host, int(port)), timeout=30).close()


# ---- what runs in the cluster ----------------------------------------------------------------------------------------


class ModelActor:
    """:class:`ModelServer`, loaded in a call of its own: an error there reaches the driver as it is."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._arguments = settings, device

    def load(self) -> dict[str, Any]:
        self._server = ModelServer(*self._arguments)
        return self._server.facts()

    def answer(self, *question: Any) -> tuple[Any, float]:
        return self._server.answer(*question)


_made: dict[Any, Callable[[Any], Any]] = {}
"""What this process has built, so that a task need not build it again; the last job's only."""


def _work(make: Callable[..., Any], settings: Settings, models: tuple[Any, dict[str, Any]] | None, task: Any) -> Any:
    import ray

    actor, facts = models or (None, {})
    key = (make, repr(settings), actor._actor_id if actor is not None else None)
    if key not in _made:
        _made.clear()
        remote = RemoteModels(lambda *question: ray.get(actor.answer.remote(*question)), facts) if models else None
        _made[key] = make(settings, models=remote)
    return _made[key](task)
