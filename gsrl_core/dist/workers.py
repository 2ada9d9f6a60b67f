"""Groups of workers behind one interface: objects in this process, or Ray actors.

A worker is any object that a picklable factory makes from its rank. What runs above does not know which kind it has.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gsrl_core.errors import GsrlError, PlacementError, WorkerError

logger = logging.getLogger(__name__)

Factory = Callable[[int], Any]

LOCAL_START_ATTEMPTS = 3


class Pending(Protocol):
    """A result that may still be computed. Given as an argument to ``submit`` it stands for its value."""

    def result(self) -> Any:
        """Wait for the value; raises what the worker raised (GsrlError) or WorkerError."""
        ...


class WorkerGroup(Protocol):
    """``size`` workers of one kind, by rank."""

    size: int

    def submit(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Start ``worker.method(*arguments)`` on one worker."""
        ...

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on all workers at once; results by rank."""
        ...

    def close(self) -> None:
        """End the workers (their ``close`` is called)."""
        ...


class LocalWorkers:
    """One worker in this process; calls are plain calls and exceptions are the worker's own."""

    size = 1

    def __init__(self, factory: Factory) -> None:
        self._worker = factory(0)

    def submit(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Call at once."""
        if rank:
            raise PlacementError(f"there is one local worker, rank 0; asked for {rank}")
        values = [argument.result() if isinstance(argument, _Done) else argument for argument in arguments]
        return _Done(getattr(self._worker, method)(*values))

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call at once."""
        return [self.submit(0, method, *arguments).result()]

    def close(self) -> None:
        """Close the worker."""
        self._worker.close()


class _Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class RayWorkers:
    """One Ray actor per entry of ``devices``, on the node that has these devices."""

    def __init__(
        self,
        name: str,
        factory: Factory,
        devices: Sequence[Sequence[int]],
        *,
        restarts: int = 0,
        on_restart: Callable[[int], None] | None = None,
    ) -> None:
        """Start the actors (and Ray, if it is not running: the cluster of RAY_ADDRESS, or a local one).

        Args:
            name: role, for messages.
            factory: makes the worker of a rank inside its actor.
            devices: for each rank the numbers of its GPUs, counted over all nodes; ignored without GPUs.
            restarts: how often each worker may die and be started again, its interrupted call repeated.
            on_restart: called with the rank of a worker that was started again, before the call is repeated.
        """
        start_ray()
        self.name, self.size = name, len(devices)
        self._factory, self._devices, self._on_restart = factory, devices, on_restart
        self._restarts_left = [restarts] * self.size
        self._actors = [self._spawn(rank) for rank in range(self.size)]
        finish([_RayCall(self, rank, "build", (), own=True) for rank in range(self.size)])

    def submit(self, rank: int, method: str, *arguments: Any) -> Pending:
        """Start a call on the actor of this rank."""
        return _RayCall(self, rank, method, arguments)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The same call on all actors at once."""
        return finish([self.submit(rank, method, *arguments) for rank in range(self.size)])

    def node_address(self, rank: int) -> str:
        """A free ``host:port`` on the node of this rank."""
        return _RayCall(self, rank, "free_address", (), own=True).result()

    def close(self) -> None:
        """End all actors; those that do not answer within ten seconds are killed."""
        import ray

        closing = [actor.run.remote("close") for actor in self._actors]
        ray.wait(closing, num_returns=len(closing), timeout=10)
        for actor in self._actors:
            ray.kill(actor)

    def remote(self, rank: int, method: str, arguments: Sequence[Any], own: bool) -> Any:
        """Ray's reference of a started call (used by pending results); ``own``: the actor's, not its worker's."""
        # Only top-level references are resolved by Ray, so the arguments are spread out.
        values = [argument.reference if isinstance(argument, _RayCall) else argument for argument in arguments]
        actor = self._actors[rank]
        return getattr(actor, method).remote(*values) if own else actor.run.remote(method, *values)

    def revive(self, rank: int, cause: Exception) -> None:
        """Start a dead worker again. Raises WorkerError when its restarts are used up."""
        if not self._restarts_left[rank]:
            raise WorkerError(
                f"{self.name} worker {rank} died ({cause}); resume from the last checkpoint. The log is in Ray's "
                "session folder, logs/worker-*.err; a process that vanishes without a message was often out of memory"
            ) from cause
        self._restarts_left[rank] -= 1
        self._actors[rank] = self._spawn(rank)
        _RayCall(self, rank, "build", (), own=True).result()
        if self._on_restart:
            self._on_restart(rank)

    def _spawn(self, rank: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        located = cluster_devices()
        options: dict[str, Any] = {"num_cpus": 0}
        visible = None
        if located:
            places = [located[device] for device in self._devices[rank]]
            if len({node for node, _ in places}) > 1:
                raise PlacementError(f"{self.name} process {rank} has devices {self._devices[rank]} on several nodes")
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(places[0][0], soft=False)
            visible = ",".join(str(index) for index in dict.fromkeys(index for _, index in places))
        return ray.remote(**options)(_Host).remote(self._factory, rank, visible)


class _RayCall:
    def __init__(
        self, group: RayWorkers, rank: int, method: str, arguments: Sequence[Any], *, own: bool = False
    ) -> None:
        self._group, self._rank, self._method, self._arguments, self._own = group, rank, method, arguments, own
        self.reference = group.remote(rank, method, arguments, own)

    def result(self) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            try:
                return ray.get(self.reference)
            except RayTaskError as error:
                raise self._cause(error) from error
            except RayActorError as error:
                self._group.revive(self._rank, error)
                self.reference = self._group.remote(self._rank, self._method, self._arguments, self._own)

    def _cause(self, error: Any) -> GsrlError:
        trace = re.sub(r"\x1b\[\d+m", "", str(error))
        text = f"{self._group.name} worker {self._rank} failed in {self._method}:\n{trace}"
        if isinstance(error.cause, GsrlError):
            # The class and the message a person can act on; the worker's traceback stays attached.
            raise error.cause from WorkerError(text)
        return WorkerError(text)


def finish(calls: Sequence[Pending]) -> list[Any]:
    """The results of all calls in their order; raises as soon as any of them fails.

    Workers that train together wait for each other: asked one after the other, a healthy one would hide the failure of
    the next until its own time-out.
    """
    waiting = {call.reference: call for call in calls if isinstance(call, _RayCall)}
    while waiting:
        import ray

        for reference in ray.wait(list(waiting), num_returns=1, fetch_local=False)[0]:
            waiting.pop(reference).result()
    return [call.result() for call in calls]


class _Host:
    """The actor: makes the worker after the devices were narrowed, and passes calls on."""

    def __init__(self, factory: Factory, rank: int, visible_devices: str | None) -> None:
        if visible_devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices
        self._factory, self._rank = factory, rank
        self._worker: Any = None

    def build(self) -> None:
        # Not in __init__: what a constructor raises reaches the caller as a dead actor, without its class.
        self._worker = self._factory(self._rank)

    def run(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)

    def free_address(self) -> str:
        import ray

        from gsrl_core.dist.collective import free_address

        return free_address(ray.util.get_node_ip_address())


def cluster_devices() -> list[tuple[str, int]]:
    """All GPUs of the Ray cluster as (node id, number on the node), in a stable order; empty without GPUs."""
    import ray

    start_ray()
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
    return [(node["NodeID"], index) for node in nodes for index in range(int(node["Resources"].get("GPU", 0)))]


def stop_ray() -> None:
    """Leave the cluster; a local one ends."""
    import ray

    ray.shutdown()


def start_ray() -> bool:
    """Join the cluster of RAY_ADDRESS, or start a local one; False if this process is already in one.

    Raises:
        WorkerError: there is no cluster at that address, or a local one does not start.
    """
    # Read when ray is first imported. Under `uv run` Ray would pack this folder and start every worker with `uv run` in
    # a copy of it; the nodes have the project installed.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    # Without it Ray hides all GPUs from actors that did not ask it for some; devices are dealt by placement here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise WorkerError(f"no Ray cluster at RAY_ADDRESS={address}: {error}; start it, or unset it") from error
        return True
    _start_local_ray()
    return True


def _start_local_ray() -> None:
    import ray

    # Ray gives its own processes a fixed 30 s to come up, which a busy machine may miss.
    for attempt in range(1, LOCAL_START_ATTEMPTS + 1):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            return
        except Exception as error:  # Ray raises a bare Exception for it
            ray.shutdown()
            if attempt == LOCAL_START_ATTEMPTS:
                raise WorkerError(
                    f"Ray did not start on this machine in {attempt} attempts ({error}); free some CPU time and "
                    "memory, or set cluster.runtime to local"
                ) from error
            logger.warning("Ray did not start (%s); trying again", error)
