"""Physics on all cores: worker processes that each step several single environments into shared memory.

PhysX on the CPU holds Python's lock while it steps, so threads gain nothing. Environment i lives in worker i mod W,
which spreads the episodes that end early.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import IO, Any, Protocol

import numpy as np

from gsrl_core.errors import SimulationError, WorkerError
from gsrl_core.sim import states as layout
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.states import States
from gsrl_core.sim.task import EpisodeSpec

_CLOSE_SECONDS = 5.0


class Physics(Protocol):
    """What steps B environments; implemented by :class:`Pool` and by the ManiSkill batch backend."""

    states: States

    def reset(self, specs: Sequence[EpisodeSpec]) -> None:
        """Start one episode per environment."""
        ...

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Execute ``actions`` float32 [B, H, A] where ``active`` [B]; other environments stay as they are."""
        ...

    def close(self) -> None:
        """Release processes and memory; calling it again does nothing."""
        ...


class _Worker:
    """One process and the socket to it."""

    def __init__(self, index: int, memory_fd: int, num_envs: int, horizon: int) -> None:
        ours, theirs = socketpair()
        self.index = index
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        environment = os.environ | {
            name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        # The child must find this very package, also when it was put on sys.path at run time.
        paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        arguments = [str(value) for value in (theirs.fileno(), memory_fd, num_envs, horizon)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gsrl_core.sim.worker", *arguments],
            pass_fds=(theirs.fileno(), memory_fd),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        theirs.close()
        self.connection = Connection(ours.detach())

    def send(self, *command: Any) -> None:
        try:
            self.connection.send(command)
        except (BrokenPipeError, ConnectionResetError):
            raise self.death() from None

    def receive(self) -> Exception | None:
        """Wait for the answer to the last command: None, or what the worker raised, or how it died."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self.death()
        if answer is None:
            return None
        name, message, trace = answer
        if name == SimulationError.__name__:
            return SimulationError(message)
        return WorkerError(f"physics worker {self.index} raised {name}: {message}\n{trace}")

    def death(self) -> WorkerError:
        """Describe how the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_CLOSE_SECONDS)
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-8:]
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        advice = " (9 is often the kernel out of memory: use fewer workers)" if code == -9 else ""
        report = "; its last words:\n" + "\n".join(last) if last else "; it wrote no error"
        return WorkerError(f"physics worker {self.index} (pid {self.process.pid}) {how}{advice}{report}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(("close",))
        self.connection.close()
        try:
            self.process.wait(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()


class Pool:
    """B environments in W processes; ``states`` is shared memory that the workers fill."""

    def __init__(self, settings: WorldSettings, num_envs: int, horizon: int, workers: int = 0) -> None:
        """Start the processes.

        Args:
            settings: how every environment is stepped.
            num_envs: B.
            horizon: longest action chunk.
            workers: processes; 0 takes one per core that this process may use. Never more than ``num_envs``.

        Raises:
            WorkerError: a process could not be started.
        """
        cores = len(os.sched_getaffinity(0))
        count = min(workers or cores, num_envs)
        self._settings = settings
        self._num_envs = num_envs
        self._workers: list[_Worker] = []
        size = layout.size_in_bytes(num_envs, horizon)
        memory_fd = os.memfd_create("gsrl-physics")
        try:
            os.ftruncate(memory_fd, size)
            self._block = mmap.mmap(memory_fd, size)
            self.states = layout.view(self._block, num_envs, horizon)
            self._workers = [_Worker(i, memory_fd, num_envs, horizon) for i in range(count)]
            self._command({i: ("settings", settings) for i in range(count)})
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory_fd)

    def reset(self, specs: Sequence[EpisodeSpec]) -> None:
        """Start one episode per environment. Raises SimulationError, WorkerError (the pool is then closed)."""
        if len(specs) != self._num_envs:
            raise SimulationError(f"{len(specs)} episodes for {self._num_envs} environments; give one each")
        jobs = {env: spec for env, spec in enumerate(specs)}
        self._command({i: ("reset", {env: jobs[env] for env in self._envs(i)}) for i in range(len(self._workers))})

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        """See :class:`Physics`. Raises SimulationError, WorkerError (the pool is then closed)."""
        width = self._settings.action_dim
        horizon = actions.shape[1]
        self.states.actions[:, :horizon, :width] = actions
        self.states.executed[:] = 0
        jobs = {i: [env for env in self._envs(i) if active[env]] for i in range(len(self._workers))}
        self._command({i: ("step", envs, horizon) for i, envs in jobs.items() if envs})

    def close(self) -> None:
        """Stop the processes; their memory goes with the last reference to ``states``."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()

    def _envs(self, worker: int) -> range:
        return range(worker, self._num_envs, len(self._workers))

    def _command(self, commands: Mapping[int, tuple[Any, ...]]) -> None:
        if not self._workers:
            raise SimulationError("the environment is closed; make a new one")
        try:
            for index, command in commands.items():
                self._workers[index].send(*command)
            # All answers are taken before an error is raised.
            problems = [problem for index in commands if (problem := self._workers[index].receive())]
        except BaseException:
            self.close()
            raise
        if problems:
            self.close()
            raise problems[0]

    def __del__(self) -> None:
        self.close()
