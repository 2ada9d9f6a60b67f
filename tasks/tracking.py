"""Experiment tracking: the only module that knows MLflow. One parent run a pipeline, one child run a stage, by id."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gsrl_core.artifacts import Artifact, gsrl_home
from gsrl_core.config import section_digest
from gsrl_core.errors import ConfigError
from gsrl_core.sections import PipelineConfig, Section

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient

# Read when MLflow is first imported, which every function here puts off; a worker of Prefect has no other place for it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

_log = logging.getLogger(__name__)
_MAX_PARAM, _MAX_TAG = 500, 5000


def tracking_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, by default a SQLite file under ``$GSRL_HOME``."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{gsrl_home() / 'mlflow.db'}"


def run_link(run_id: str) -> str:
    """Address of a run in the MLflow UI: of the tracking server, or of the one that ``real2sim2real up`` starts."""
    uri = tracking_uri()
    root = uri if uri.startswith("http") else os.environ.get("GSRL_MLFLOW_UI", "http://127.0.0.1:5000")
    experiment = _client().get_run(run_id).info.experiment_id
    return f"{root.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def begin_pipeline(config: PipelineConfig, name: str, flow_run_id: str) -> str:
    """Open the parent run of a pipeline and return its id.

    Raises:
        ConfigError: the tracking store cannot be used.
    """
    tags = {
        "prefect.flow_run_id": flow_run_id,
        "gsrl.config_sha": hashlib.sha256(section_digest(config).encode()).hexdigest(),
        "git.commit": git_commit(),
        "gsrl.owner": _owner(),
    }
    client = _client()
    experiment = _experiment(client, config.tracking.experiment)
    _close_dead_runs(client, experiment)
    return client.create_run(experiment, tags=tags, run_name=name).info.run_id


def summarise(run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Write the pipeline's numbers and texts to its parent run."""
    run = StageRun(_client(), run_id)
    run.metrics(metrics, 0)
    run.tags(tags)


def end_pipeline(run_id: str, failure: BaseException | None = None) -> None:
    """Close the parent run: FINISHED, or FAILED because of ``failure``."""
    if failure is None:
        _client().set_terminated(run_id, "FINISHED")
        return
    with _not_masking(failure):
        _client().set_terminated(run_id, "FAILED")


@contextmanager
def _not_masking(failure: BaseException) -> Iterator[None]:
    """The cause matters more than its record: when both fail (a full disk), the record is given up with a warning."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        _log.warning("MLflow could not record %s: %s", type(failure).__name__, error)


@contextmanager
def stage_run(
    parent_run_id: str, stage: str, sections: Mapping[str, Section], key: str, inputs: Mapping[str, str]
) -> Iterator[StageRun]:
    """A child run for one executed stage; marked FAILED when the block raises, KILLED when it is interrupted.

    Args:
        parent_run_id: the pipeline's run.
        stage: name.
        sections: of the configuration, recorded as parameters.
        key: of the store's index.
        inputs: digests by name; with each run's own ``gsrl.artifact.sha256`` they link every artefact to its origin.
    """
    run = _open_child(parent_run_id, stage, {"gsrl.cached": "false", **_origin(key, inputs)})
    try:
        run.params(_flattened(sections))
        yield run
    except Exception as error:
        with _not_masking(error):
            run.close("FAILED", {"gsrl.error": f"{type(error).__name__}: {error}"})
        raise
    except BaseException as interrupt:
        with _not_masking(interrupt):
            run.close("KILLED", {})
        raise
    run.close("FINISHED", {})


def cached_stage(
    parent_run_id: str,
    stage: str,
    sections: Mapping[str, Section],
    key: str,
    inputs: Mapping[str, str],
    artifact: Artifact,
) -> None:
    """A child run for a stage that was not executed, so that pipelines can be compared stage by stage."""
    run = _open_child(parent_run_id, stage, {"gsrl.cached": "true", **_origin(key, inputs)})
    run.params(_flattened(sections))
    run.result(artifact)
    run.close("FINISHED", {})


def _origin(key: str, inputs: Mapping[str, str]) -> dict[str, str]:
    digests = {f"gsrl.input.{name.replace(' ', '_')}": digest for name, digest in inputs.items()}
    return {"gsrl.stage_key": key, **digests}


class StageRun:
    """Writes to one MLflow run, by id (no global state: usable from any thread)."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    def params(self, values: Mapping[str, str]) -> None:
        """Record parameters (texts)."""
        from mlflow.entities import Param

        items = [Param(key, value[:_MAX_PARAM]) for key, value in values.items()]
        for start in range(0, len(items), 100):
            self._client.log_batch(self.run_id, params=items[start : start + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags (texts)."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(key, value[:_MAX_TAG]) for key, value in values.items()])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at ``step`` in one transaction."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(key, float(value), now, step) for key, value in values.items()])

    def image(self, name: str, rgb: np.ndarray, step: int) -> None:
        """Record a uint8 [h, w, 3] picture."""
        self._client.log_image(self.run_id, rgb, key=name.replace("/", "_"), step=step)

    def files(self, folder: Path, patterns: tuple[str, ...]) -> None:
        """Attach the files of ``folder`` that match."""
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                where = path.relative_to(folder).parent.as_posix()
                self._client.log_artifact(self.run_id, str(path), None if where == "." else where)

    def result(self, artifact: Artifact) -> None:
        """Record what the stage made: digest and path as tags, numeric facts as metrics."""
        described = {"sha256": artifact.sha256, "path": str(artifact.path), "kind": artifact.kind}
        self.tags({f"gsrl.artifact.{key}": value for key, value in described.items()})
        numbers = {k: float(v) for k, v in artifact.facts.items() if isinstance(v, int | float)}
        if numbers:
            self.metrics(numbers, 0)

    def close(self, status: str, tags: Mapping[str, str]) -> None:
        """End the run."""
        self.tags(tags)
        self._client.set_terminated(self.run_id, status)


def register(name: str, package: Artifact, parent_run_id: str, metrics: Mapping[str, float]) -> tuple[str, bool]:
    """Register a verified package as a version of model ``name``; returns the version and whether it is new.

    The package stays in the store: MLflow gets an external model that points to it. The same package is registered
    once; registering it again returns the version that exists.
    """
    from mlflow.entities.logged_model_status import LoggedModelStatus
    from mlflow.exceptions import MlflowException

    client = _client()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name='{name}'"):
        if version.tags.get("gsrl.sha256") == package.sha256 and version.status == "READY":
            return str(version.version), False
    experiment = client.get_run(parent_run_id).info.experiment_id
    tags = {"gsrl.sha256": package.sha256, "gsrl.path": str(package.path)}
    model = client.create_logged_model(
        experiment, name=name, source_run_id=parent_run_id, tags={**tags, "mlflow.model.is_external": "true"},
        model_type="vla",
    )  # fmt: skip
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    for key, value in metrics.items():
        client.log_metric(parent_run_id, key, value, model_id=model.model_id)
    tags["gsrl.model_id"] = model.model_id
    version = client.create_model_version(
        name, package.path.as_uri(), run_id=parent_run_id, tags=tags, model_id=model.model_id
    )
    return str(version.version), True


def alias(name: str, label: str) -> str | None:
    """The version that ``label`` points to, or None. Raises MlflowException when the registry cannot be asked."""
    from mlflow.exceptions import MlflowException

    try:
        # Not get_model_version_by_alias: for a missing alias its error has the code of any invalid argument.
        version = _client().get_registered_model(name).aliases.get(label)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if version is None else str(version)


def set_alias(name: str, label: str, version: str | None) -> None:
    """Point ``label`` to ``version``; None removes it."""
    if version is None:
        _client().delete_registered_model_alias(name, label)
    else:
        _client().set_registered_model_alias(name, label, version)


def unregister(name: str, version: str) -> None:
    """Remove a version whose release did not complete, and its logged model."""
    client = _client()
    model_id = client.get_model_version(name, version).tags["gsrl.model_id"]
    client.delete_model_version(name, version)
    client.delete_logged_model(model_id)


def _open_child(parent_run_id: str, stage: str, tags: Mapping[str, str]) -> StageRun:
    client = _client()
    parent = client.get_run(parent_run_id)
    inherited = {key: parent.data.tags[key] for key in ("prefect.flow_run_id", "gsrl.config_sha", "git.commit")}
    run = client.create_run(
        parent.info.experiment_id,
        tags={**inherited, **tags, "mlflow.parentRunId": parent_run_id, "gsrl.stage": stage, "gsrl.owner": _owner()},
        run_name=stage,
    )
    return StageRun(client, run.info.run_id)


@cache
def _client_for(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise ConfigError(
            f"the MLflow store {uri} cannot be used ({error}); correct MLFLOW_TRACKING_URI, or unset it to use a "
            "SQLite file under GSRL_HOME"
        ) from error
    return client


def _client() -> MlflowClient:
    gsrl_home().mkdir(parents=True, exist_ok=True)
    return _client_for(tracking_uri())


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id
    local = tracking_uri().startswith("sqlite:")
    location = (gsrl_home() / "mlflow-artifacts").as_uri() if local else None
    # Lets the UI open on the runs; it would guess pages for chat traces.
    return client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})


def _close_dead_runs(client: MlflowClient, experiment: str) -> None:
    """Runs left RUNNING by a killed process of this machine are marked KILLED."""
    host = os.uname().nodename
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        where, _, process = run.data.tags.get("gsrl.owner", "").rpartition(":")
        if where == host and process.isdigit() and not Path(f"/proc/{process}").exists():
            client.set_terminated(run.info.run_id, "KILLED")


def _owner() -> str:
    return f"{os.uname().nodename}:{os.getpid()}"


@cache
def git_commit() -> str:
    """The commit of this checkout, with ``-dirty`` when files differ; ``unknown`` for an installed wheel."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _flattened(sections: Mapping[str, Section]) -> dict[str, str]:
    """Section fields as ``section.key`` -> text."""
    dumped = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return {f"{name}.{key}": str(value) for name, values in dumped.items() for key, value in values.items()}
