"""Physics on all cores: worker processes that each step several single environments into shared memory.

PhysX on the CPU holds Python's lock while it steps, so threads gain nothing. Environment i lives in worker i mod W,
which spreads the episodes that end early.

A worker that dies takes the current episodes of its own environments with it and nothing else: they are *lost*, which
is written in ``states.lost`` and logged with what repeats them, and a new process serves the next reset.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gsrl_core.errors import GsrlError, SimulationError, WorkerError
from gsrl_core.sim import states as layout
from gsrl_core.sim.process import WorkerDiedError, WorkerProcess
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.states import States
from gsrl_core.sim.task import EpisodeSpec

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""How often in a row a worker may be started again without having executed one chunk in between."""


WORKERS_PER_CORE = 2
"""A command ends with its slowest worker. Two on a core, each with half the environments, leave less of it idle: some
environments take four times as long as others (fingers on the plate), and the kernel moves workers to free cores."""


class Physics(Protocol):
    """What steps B environments; implemented by :class:`Pool` and by the ManiSkill batch backend."""

    states: States

    def reset(self, specs: Sequence[EpisodeSpec]) -> None:
        """Start one episode per environment."""
        ...

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Execute ``actions`` float32 [B, H, A] where ``active`` [B]; other environments stay as they are.

        Where the simulation crashes, ``states.lost`` is set and the rest of the entry is that before the chunk; the
        environment cannot be stepped until the next reset.
        """
        ...

    def close(self) -> None:
        """Release processes and memory; calling it again does nothing."""
        ...


class Pool:
    """B environments in W processes; ``states`` is shared memory that the workers fill."""

    def __init__(self, settings: WorldSettings, num_envs: int, horizon: int, workers: int = 0) -> None:
        """Start the processes.

        Args:
            settings: how every environment is stepped.
            num_envs: B.
            horizon: longest action chunk.
            workers: processes; 0 takes :data:`WORKERS_PER_CORE`. Never more than ``num_envs``.

        Raises:
            WorkerError: a process could not be started.
        """
        count = worker_count(workers, num_envs)
        self._settings, self._num_envs, self._horizon = settings, num_envs, horizon
        self._workers: list[WorkerProcess] = []
        self._memory_fd = -1
        self._deaths = [0] * count
        self._specs: tuple[EpisodeSpec, ...] = ()
        self._present = np.zeros(num_envs, dtype=bool)
        sizes = (num_envs, horizon, len(settings.objects))
        size = layout.size_in_bytes(*sizes)
        self._memory_fd = os.memfd_create("gsrl-physics")
        try:
            os.ftruncate(self._memory_fd, size)
            self.states = layout.view(mmap.mmap(self._memory_fd, size), *sizes)
            self._workers = [self._start(i) for i in range(count)]
            self._insist({i: ("reset", {}) for i in range(count)})
        except BaseException:
            self.close()
            raise

    def reset(self, specs: Sequence[EpisodeSpec]) -> None:
        """Start one episode per environment, in new processes where the old ones died.

        Raises:
            SimulationError: a wrong number of episodes, or the pool is closed.
            WorkerError: a worker died more than :data:`MAX_RESTARTS` times in a row. The pool is then closed.
        """
        if len(specs) != self._num_envs:
            raise SimulationError(f"{len(specs)} episodes for {self._num_envs} environments; give one each")
        self._specs = tuple(specs)
        self._insist({i: ("reset", {env: specs[env] for env in self._envs(i)}) for i in range(len(self._workers))})
        self._present[:] = True
        self.states.lost[:] = 0

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        """See :class:`Physics`.

        Raises:
            SimulationError: an action is not finite, there is no episode yet, or the pool is closed.
            WorkerError: as in :meth:`reset`, or a worker raised an unexpected error. The pool is then closed.
        """
        if not self._specs:
            raise SimulationError("the environment has no episode yet; call reset first")
        horizon = actions.shape[1]
        self.states.actions[:, :horizon, : self._settings.action_dim] = actions
        self.states.executed[:] = 0
        before = layout.snapshot(self.states)
        running = active & self._present
        jobs = {i: [env for env in self._envs(i) if running[env]] for i in range(len(self._workers))}
        diverged, deaths = self._command({i: ("step", envs, horizon) for i, envs in jobs.items() if envs})
        for index, envs in jobs.items():
            if envs and index not in deaths:
                self._deaths[index] = 0
        reports = [(f"{death}\nit {self._occupation(index)}", jobs[index]) for index, death in deaths.items()]
        reports += [(reason, [env]) for env, reason in diverged.items()]
        for index in deaths:
            self._present[list(self._envs(index))] = False
        self._present[list(diverged)] = False
        self._lose(active & ~self._present, before)
        for reason, envs in reports:
            self._report(reason, envs)
        self._bury(deaths)

    def close(self) -> None:
        """Stop the processes; their memory goes with the last reference to ``states``."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1

    def _envs(self, worker: int) -> range:
        return range(worker, self._num_envs, len(self._workers))

    def _start(self, index: int) -> WorkerProcess:
        try:
            return WorkerProcess(index, self._memory_fd, self._num_envs, self._horizon, self._settings)
        except OSError as error:
            self.close()
            raise WorkerError(f"physics worker {index} cannot be started: {error}; use fewer workers") from error

    # ------------------------------------------------------------------ commands
    def _insist(self, commands: Mapping[int, tuple[Any, ...]]) -> None:
        """Execute commands that may be repeated, in new processes where the old ones are dead or die of them."""
        while True:
            for index, worker in enumerate(self._workers):
                if not worker.alive:
                    self._workers[index] = self._start(index)
            _, deaths = self._command(commands)
            self._bury(deaths)
            if not deaths:
                return
            for death in deaths.values():
                logger.warning("%s\nit is started again", death)
            commands = {index: commands[index] for index in deaths}

    def _command(self, commands: Mapping[int, tuple[Any, ...]]) -> tuple[dict[int, str], dict[int, WorkerDiedError]]:
        """Send a command to each worker and take all answers.

        Returns:
            Environments that diverged, with the reason; workers that died, with how.

        Raises:
            SimulationError, WorkerError: what a living worker answered. The pool is then closed.
        """
        if not self._workers:
            raise SimulationError("the environment is closed; make a new one")
        diverged: dict[int, str] = {}
        deaths: dict[int, WorkerDiedError] = {}
        problems: list[GsrlError] = []
        try:
            for index, command in commands.items():
                self._workers[index].send(command)
            for index in commands:
                try:
                    diverged |= self._workers[index].receive()
                except WorkerDiedError as death:
                    deaths[index] = death
                except GsrlError as problem:
                    problems.append(problem)
        except BaseException:
            self.close()
            raise
        if problems:
            self.close()
            raise problems[0]
        return diverged, deaths

    # ------------------------------------------------------------------ crashes
    def _bury(self, deaths: Mapping[int, WorkerDiedError]) -> None:
        """Reap dead workers. Raises WorkerError, with the pool closed, when one has died too often."""
        for index, death in deaths.items():
            self._workers[index].close()
            self._deaths[index] += 1
            if self._deaths[index] > MAX_RESTARTS:
                self.close()
                raise WorkerError(
                    f"{death}\nit was started {self._deaths[index]} times without executing one chunk, so it is not "
                    "started again"
                )

    def _lose(self, lost: np.ndarray, before: States) -> None:
        """End the episodes of ``lost`` [B]: what a worker may have written in part is what it was before the chunk."""
        layout.restore(self.states, before, lost)
        self.states.lost[lost] = 1

    def _occupation(self, worker: int) -> str:
        """What a dead worker was doing."""
        envs = list(self._envs(worker))
        busy = [env for env in envs if self.states.busy[env]]
        self.states.busy[envs] = 0
        return f"was stepping environment {busy[0]}" if busy else "was not stepping"

    def _report(self, reason: str, envs: Iterable[int]) -> None:
        elapsed = self.states.elapsed
        episodes = "; ".join(f"environment {env}: {self._specs[env]} after {elapsed[env]} steps" for env in envs)
        logger.warning("%s\nlost until the next reset: %s", reason, episodes)

    def __del__(self) -> None:
        self.close()


def worker_count(workers: int, num_envs: int) -> int:
    """Number of processes that :class:`Pool` starts for these arguments."""
    return min(workers or WORKERS_PER_CORE * len(os.sched_getaffinity(0)), num_envs)
