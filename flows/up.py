"""``real2sim2real up``: Prefect server, work pool, worker, deployments and MLflow UI on this machine's loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flows.environment import answers, services_file
from gsrl_core.artifacts import gsrl_home, write_json
from gsrl_core.errors import ConfigError, GsrlError

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0


class ServiceError(GsrlError):
    """A service did not start, or ended by itself."""


class Services:
    """Child processes that are stopped together."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = gsrl_home() / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *arguments: str) -> None:
        """Start ``python -m <arguments>`` with its output in the log folder."""
        with self._log(name).open("wb") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", *arguments], env=self._environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def run(self, name: str, *arguments: str, cwd: Path | None = None) -> None:
        """Run ``python -m <arguments>`` to its end. Raises ServiceError with the end of its output."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments], env=self._environment, cwd=cwd, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ServiceError(f"{name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until ``url`` answers. Raises ServiceError when the process ends or takes too long."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not answers(url, 2.0):
            self.check()
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{name} did not answer at {url} within {_START_TIMEOUT_S:.0f} s: {self._tail(name)}"
                )
            time.sleep(0.5)

    def check(self) -> None:
        """Raise ServiceError when a child has ended."""
        for name, child in self._children.items():
            if child.poll() is not None:
                raise ServiceError(f"{name} ended with code {child.returncode}: {self._tail(name)}")

    def stop(self) -> None:
        """Ask all children to end (last started first), then kill their process groups."""
        for child in reversed(self._children.values()):
            _signal_group(child, signal.SIGTERM)
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            _signal_group(child, signal.SIGKILL)
            child.wait()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _tail(self, name: str) -> str:
        text = self._log(name).read_text(errors="replace").strip()
        return f"{text[-1500:]}\n(log: {self._log(name)})"


def serve_all(prefect_port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
    """Start everything, print the addresses, and stay until interrupted; then stop everything.

    Raises:
        ConfigError: a port is in use, or this is not a checkout with prefect.yaml.
        ServiceError: a service did not start, or ended by itself.
    """
    project = Path(__file__).parent.parent
    if not (project / "prefect.yaml").is_file():
        raise ConfigError(f"{project} has no prefect.yaml; run `up` from a checkout of the repository")
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        require_free_port(port, option)
    api, ui = f"http://{_HOST}:{prefect_port}/api", f"http://{_HOST}:{mlflow_port}"
    os.environ.pop("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", None)
    services = Services({**os.environ, "PREFECT_API_URL": api, "GSRL_MLFLOW_UI": ui})
    try:
        _start(services, project, prefect_port, mlflow_port, api, ui, say)
        write_json(services_file(), {"prefect_api": api, "mlflow": ui, "pid": os.getpid()})
        say(f"Prefect UI   http://{_HOST}:{prefect_port}\nMLflow UI    {ui}\nlogs         {gsrl_home() / 'logs'}")
        say(f"start a run  PREFECT_API_URL={api} prefect deployment run real2sim2real/laptop")
        say("Ctrl-C stops everything")
        while True:
            services.check()
            time.sleep(1)
    finally:
        services_file().unlink(missing_ok=True)
        services.stop()


def require_free_port(port: int, option: str) -> None:
    """Raise ConfigError when something listens on ``port`` of the loopback already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {_HOST} cannot be used ({error.strerror}); stop what uses it or give another {option}"
            ) from error


def _start(
    services: Services,
    project: Path,
    prefect_port: int,
    mlflow_port: int,
    api: str,
    ui: str,
    say: Callable[[str], None],
) -> None:
    from tasks.tracking import tracking_uri

    say("starting the Prefect server and the MLflow UI ...")
    services.start("prefect-server", "prefect", "server", "start", "--host", _HOST, "--port", str(prefect_port))
    services.start(
        "mlflow", "mlflow", "ui", "--backend-store-uri", tracking_uri(), "--host", _HOST, "--port", str(mlflow_port)
    )
    services.wait_for("prefect-server", f"{api}/health")
    services.run(
        "creating the work pool", "prefect", "work-pool", "create", "local", "--type", "process", "--overwrite"
    )
    services.run("prefect deploy", "prefect", "--no-prompt", "deploy", "--all", cwd=project)
    services.start("worker", "prefect", "worker", "start", "--pool", "local", "--type", "process")
    services.wait_for("mlflow", f"{ui}/health")


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
