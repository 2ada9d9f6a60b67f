"""Settings of Prefect for runs on this machine; to be applied before prefect is imported."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from gsrl_core.artifacts import gsrl_home
from gsrl_core.errors import ConfigError

# A run needs less than this besides what its own stages write; with less, Prefect's and MLflow's databases fail first.
MINIMUM_FREE = 512 * 2**20
"""Free space below which no run is started [B]."""


def services_file() -> Path:
    """Where ``real2sim2real up`` writes the addresses of what it started."""
    return gsrl_home() / "up.json"


def prepare(*, verbose: bool) -> None:
    """Choose Prefect's home, server and log level, leaving alone what the user has set.

    Everything stays below GSRL_HOME, so that the user's own ``~/.prefect`` profile is neither read nor changed. Runs go
    to the server of ``$PREFECT_API_URL``, else to that of a running ``real2sim2real up``, else to one that lives as
    long as the run.

    Raises:
        ConfigError: ``$PREFECT_API_URL`` does not answer.
    """
    defaults = {
        "PREFECT_HOME": str(gsrl_home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if verbose else "CRITICAL",
        "MLFLOW_LOGGING_LEVEL": "INFO" if verbose else "WARNING",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    given = os.environ.get("PREFECT_API_URL")
    if given:
        if not answers(f"{given}/health"):
            raise ConfigError(
                f"the Prefect server PREFECT_API_URL={given} does not answer; start it (real2sim2real up), or unset "
                "PREFECT_API_URL to run without one"
            )
    elif services := running_services():
        os.environ["PREFECT_API_URL"] = services["prefect_api"]
        os.environ.setdefault("GSRL_MLFLOW_UI", services["mlflow"])
    else:
        os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"


def running_services() -> dict[str, str] | None:
    """Addresses of a running ``up`` on this machine, or None."""
    try:
        services = json.loads(services_file().read_text())
    except (OSError, ValueError):
        return None
    return services if answers(f"{services['prefect_api']}/health") else None


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether an HTTP GET of ``url`` succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return response.status < 400
    except (urllib.error.URLError, OSError, ValueError):
        return False
