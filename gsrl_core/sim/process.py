"""One physics worker as its pool sees it: the process, the socket to it, and how it ended if it did."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import IO, Any

from gsrl_core.errors import SimulationError, WorkerError
from gsrl_core.sim.settings import WorldSettings

_CLOSE_SECONDS = 5.0
ANSWER_SECONDS = 600.0
"""A worker that is silent for so long hangs. The longest command, a hundred steps of some environments, takes less than
a minute."""
_LAST_LINES = 20


class WorkerDiedError(WorkerError):
    """The process of a worker ended; the message says how, with its last words. The pool starts another."""


class WorkerProcess:
    """A process that runs :mod:`gsrl_core.sim.worker`."""

    def __init__(self, index: int, memory_fd: int, num_envs: int, horizon: int, settings: WorldSettings) -> None:
        """Start the process. That it cannot start, or dies, is learnt from :meth:`receive`.

        Args:
            index: number of the worker, for messages.
            memory_fd: descriptor of the block that :func:`gsrl_core.sim.states.view` lays out.
            num_envs: B, of the whole pool.
            horizon: longest action chunk.
            settings: how every environment is stepped.
        """
        ours, theirs = socketpair()
        self.index = index
        self.alive = True
        """Whether it is to be used; false once it was closed."""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        arguments = [str(value) for value in (theirs.fileno(), memory_fd, num_envs, horizon)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gsrl_core.sim.worker", *arguments],
            pass_fds=(theirs.fileno(), memory_fd),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self.send(settings)

    def send(self, message: Any) -> None:
        """Send the settings (once, first) or a command. A process that is dead is reported by :meth:`receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self) -> dict[int, str]:
        """Wait for the answer to the last command.

        Returns:
            Environments whose physics diverged, with the reason.

        Raises:
            WorkerDiedError: the process ended, or it hung for :data:`ANSWER_SECONDS` and was killed.
            SimulationError: the command was refused.
            WorkerError: the worker raised something else; carries its traceback.
        """
        try:
            if not self.connection.poll(ANSWER_SECONDS):
                self.process.kill()
                raise self._death(f"; it was killed because it had not answered for {ANSWER_SECONDS:g} s")
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if kind == "done":
            return content[0]
        name, message, trace = content
        if name == SimulationError.__name__:
            raise SimulationError(message)
        raise WorkerError(f"physics worker {self.index} raised {name}: {message}\n{trace}")

    def close(self) -> None:
        """End the process, whatever it is doing; calling it again does nothing."""
        if not self.alive:
            return
        self.alive = False
        self.send(("close",))
        self.connection.close()
        try:
            self.process.wait(timeout=_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()

    def _death(self, why: str = "") -> WorkerDiedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_CLOSE_SECONDS)
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        advice = why or (" (9 is often the kernel out of memory: use fewer workers)" if code == -9 else "")
        report = "; its last words:\n" + "\n".join(last) if last else "; it wrote no error"
        return WorkerDiedError(f"physics worker {self.index} (pid {self.process.pid}) {how}{advice}{report}")


def _environment() -> dict[str, str]:
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    # The child must find this very package, also when it was put on sys.path at run time.
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
