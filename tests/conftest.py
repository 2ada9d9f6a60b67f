"""Fixtures for all tests: a store of one's own, one tracking store and one Prefect server a session."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """GSRL_HOME in an empty folder."""
    monkeypatch.setenv("GSRL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tracking_store(tmp_path_factory):
    """An SQLite tracking store for the session (making one takes seconds)."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracking(home, tracking_store, monkeypatch):
    """``tasks.tracking`` with a pipeline run open: (module, parent run id)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store)
    from gsrl_core.config import load
    from tasks import tracking

    return tracking, tracking.begin_pipeline(load("laptop"), "test", "no flow")


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """A temporary Prefect server for the session."""
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    slow_machines = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120}
    with temporary_settings(slow_machines), prefect_test_harness(server_startup_timeout=120):
        yield
