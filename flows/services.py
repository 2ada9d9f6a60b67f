"""Servers that this project starts on loopback; they end with it, however it ends."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from flows import guard
from gsrl_core.artifacts import gsrl_home
from gsrl_core.errors import ConfigError, GsrlError

HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0


class ServiceError(GsrlError):
    """A service did not start, or ended by itself."""


class Services:
    """Child processes, each behind a guard (:mod:`flows.guard`), that are stopped together."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = gsrl_home() / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``python -m <arguments>`` with its output in the log folder."""
        command = [sys.executable, guard.__file__, sys.executable, "-m", *arguments]
        with self._log(name).open("wb") as log:
            self._children[name] = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def run(self, name: str, *arguments: str, cwd: Path | None = None) -> None:
        """Run ``python -m <arguments>`` to its end. Raises ServiceError with the end of its output."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments], env=self._environment, cwd=cwd, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ServiceError(f"{name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until ``url`` answers. Raises ServiceError when a service ends or this one takes too long."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not answers(url, 2.0):
            self.check()
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{name} does not answer at {url} after {_START_TIMEOUT_S:.0f} s: {self._tail(name)}"
                )
            time.sleep(0.2)

    def check(self) -> None:
        """Raise ServiceError when a service has ended."""
        for name, child in self._children.items():
            if child.poll() is not None:
                raise ServiceError(f"{name} ended with code {child.returncode}: {self._tail(name)}")

    def stop(self) -> None:
        """End all services, last started first; returns when they are gone."""
        for child in reversed(self._children.values()):
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        for child in self._children.values():
            child.wait()
        self._children.clear()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        text = self._log(name).read_text(errors="replace").strip()
        return f"{text[-1500:]}\n(log: {self._log(name)})"


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether an HTTP GET of ``url`` succeeds; loopback is asked directly, not through a proxy."""
    try:
        with _opener(direct=f"//{HOST}:" in url).open(url, timeout=timeout_s) as response:
            return response.status < 400
    except (urllib.error.URLError, OSError, ValueError):
        return False


@cache
def _opener(direct: bool) -> urllib.request.OpenerDirector:
    # Kept, because reading the system's certificates for a new one takes longer than asking.
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if direct else []))


def require_free_port(port: int, option: str) -> None:
    """Raise ConfigError when something listens on ``port`` of the loopback already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {HOST} cannot be used ({error.strerror}); stop what uses it or give another {option}"
            ) from error


def free_port() -> int:
    """A port of the loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
