"""``real2sim2real up``: Prefect server, work pool, worker, deployments and MLflow UI on this machine's loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from flows.environment import services_file
from flows.services import HOST, Services, require_free_port
from gsrl_core.artifacts import gsrl_home, write_json
from gsrl_core.errors import ConfigError


def serve_all(prefect_port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
    """Start everything, print the addresses, and stay until interrupted or terminated; then stop everything.

    Raises:
        ConfigError: a port is in use, or this is not a checkout with prefect.yaml.
        ServiceError: a service did not start, or ended by itself.
    """
    project = Path(__file__).parent.parent
    if not (project / "prefect.yaml").is_file():
        raise ConfigError(f"{project} has no prefect.yaml; run `up` from a checkout of the repository")
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        require_free_port(port, option)
    api, ui = f"http://{HOST}:{prefect_port}/api", f"http://{HOST}:{mlflow_port}"
    services = Services({**os.environ, "PREFECT_API_URL": api, "GSRL_MLFLOW_UI": ui})
    for number in (signal.SIGINT, signal.SIGTERM):  # also when started in the background, where a shell ignores SIGINT
        signal.signal(number, _interrupt)
    try:
        _start(services, project, prefect_port, mlflow_port, say)
        write_json(services_file(), {"prefect_api": api, "mlflow": ui})
        say(f"Prefect UI   http://{HOST}:{prefect_port}\nMLflow UI    {ui}\nlogs         {gsrl_home() / 'logs'}")
        say(f"start a run  PREFECT_API_URL={api} prefect deployment run real2sim2real/laptop")
        say("Ctrl-C stops everything")
        while True:
            services.check()
            time.sleep(1)
    finally:
        services_file().unlink(missing_ok=True)
        services.stop()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _start(services: Services, project: Path, prefect_port: int, mlflow_port: int, say: Callable[[str], None]) -> None:
    from tasks.tracking import tracking_uri

    say("starting the Prefect server and the MLflow UI (a minute the first time) ...")
    services.start("prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
    services.start(
        "mlflow", "mlflow", "ui", "--backend-store-uri", tracking_uri(), "--host", HOST, "--port", str(mlflow_port),
        "--workers", "1",
    )  # fmt: skip
    services.wait_for("prefect", f"http://{HOST}:{prefect_port}/api/health")
    say("deploying ...")
    services.run("the work pool", "prefect", "work-pool", "create", "local", "--type", "process", "--overwrite")
    services.run("prefect deploy", "prefect", "--no-prompt", "deploy", "--all", cwd=project)
    services.start("worker", "prefect", "worker", "start", "--pool", "local", "--type", "process")
    services.wait_for("mlflow", f"http://{HOST}:{mlflow_port}/health")
