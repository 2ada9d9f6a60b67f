"""Settings of Prefect for runs on this machine; to be applied before prefect is imported."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.services import HOST, Services, answers, free_port
from gsrl_core.artifacts import Store, gsrl_home
from gsrl_core.errors import ConfigError

# Below this, Prefect's and MLflow's databases fail before a stage does.
MINIMUM_FREE = 512 * 2**20
"""Free space without which no run is started [B]."""

_FLUSH_S = 5.0


def services_file() -> Path:
    """Where ``real2sim2real up`` writes the addresses of what it started."""
    return gsrl_home() / "up.json"


def prepare(*, verbose: bool) -> None:
    """Check the store and choose Prefect's home and log level, leaving alone what the user has set.

    Everything stays below GSRL_HOME, so that the user's own ``~/.prefect`` profile is neither read nor changed.

    Raises:
        ArtifactError: the store cannot be written, or the disk is full.
    """
    Store().require_space(MINIMUM_FREE)
    defaults = {
        "PREFECT_HOME": str(gsrl_home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if verbose else "CRITICAL",
        "MLFLOW_LOGGING_LEVEL": "INFO" if verbose else "CRITICAL",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    if any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        # Prefect's own client talks to loopback.
        excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [excluded, HOST]))


@contextmanager
def prefect_api(*, verbose: bool) -> Iterator[None]:
    """A Prefect server for the length of the block: ``$PREFECT_API_URL``, else a running ``up``, else one of our own.

    Our own is Prefect's server application as Prefect's ephemeral mode starts it, but behind a guard: it ends with this
    process even when that is killed.

    Raises:
        ConfigError: ``$PREFECT_API_URL`` does not answer.
        ServiceError: our own server did not start.
    """
    prepare(verbose=verbose)
    given = os.environ.get("PREFECT_API_URL")
    if given:
        if not answers(f"{given}/health"):
            raise ConfigError(
                f"the Prefect server PREFECT_API_URL={given} does not answer; start it (real2sim2real up), or unset "
                "PREFECT_API_URL to run without one"
            )
        yield
    elif running := running_services():
        os.environ["PREFECT_API_URL"] = running["prefect_api"]
        os.environ.setdefault("GSRL_MLFLOW_UI", running["mlflow"])
        yield
    else:
        with _own_server():
            yield


def running_services() -> dict[str, str] | None:
    """Addresses of a running ``up`` on this machine, or None."""
    try:
        found = json.loads(services_file().read_text())
    except (OSError, ValueError):
        return None
    return found if answers(f"{found['prefect_api']}/health") else None


@contextmanager
def _own_server() -> Iterator[None]:
    port = free_port()
    api = f"http://{HOST}:{port}/api"
    ephemeral = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    services = Services({**os.environ, **ephemeral})
    services.start(
        "prefect-run", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", HOST,
        "--port", str(port), "--log-level", "error", "--lifespan", "on",
    )  # fmt: skip
    os.environ["PREFECT_API_URL"] = api
    try:
        importlib.import_module("flows.real2sim2real")  # seconds that the server needs to start anyway
        services.wait_for("prefect-run", f"{api}/health")
        yield
    finally:
        _flush()
        services.stop()


def _flush() -> None:
    """Let Prefect's background threads send the last log lines and events while there is a server to receive them."""
    if "prefect.logging.handlers" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=_FLUSH_S)
    EventsWorker.drain_all(timeout=_FLUSH_S)
