"""What a flow run keeps while it goes through its stages: configuration, MLflow parent run, timings, results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prefect.artifacts import create_link_artifact
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict

from gsrl_core.artifacts import Artifact
from gsrl_core.sections import PipelineConfig
from tasks import tracking


class StageReport(BaseModel):
    """One line of a pipeline's report."""

    model_config = ConfigDict(frozen=True)

    name: str
    seconds: float
    cached: bool
    artifact: Artifact


class StageResult(BaseModel):
    """What a stage flow returns: its artefacts by name, the lines of the report, and why the pipeline stops here."""

    model_config = ConfigDict(frozen=True)

    artifacts: dict[str, Artifact]
    stages: tuple[StageReport, ...]
    blocked: str | None = None
    """A gate's reason with advice; None when it passed."""
    mlflow_run_id: str


@dataclass
class Session:
    """A flow run in progress."""

    config: PipelineConfig
    mlflow_run_id: str
    stages: list[StageReport] = field(default_factory=list)

    def stage(self, name: str, task: Any, *args: Any) -> Artifact:
        """Run a task as stage ``name`` and note its time and whether it came from the cache; raises what it raises."""
        start = time.perf_counter()
        state = task(self.config, *args, self.mlflow_run_id, return_state=True)
        artifact = state.result()
        seconds = round(time.perf_counter() - start, 3)
        self.stages.append(StageReport(name=name, seconds=seconds, cached=state.name == "Cached", artifact=artifact))
        return artifact

    def include(self, result: StageResult) -> None:
        """Take over the stages of a sub-flow."""
        self.stages.extend(result.stages)

    def summary(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Write the pipeline's numbers to its MLflow run."""
        tracking.summarise(self.mlflow_run_id, metrics, tags)

    def result(self, *, blocked: str | None = None, **artifacts: Artifact) -> StageResult:
        """The flow's return value."""
        return StageResult(
            artifacts=artifacts, stages=tuple(self.stages), blocked=blocked, mlflow_run_id=self.mlflow_run_id
        )


@contextmanager
def session(name: str, config: PipelineConfig, parent_run_id: str | None) -> Iterator[Session]:
    """Attach to the pipeline's MLflow run, or open one for a flow that was started alone (and close it)."""
    if parent_run_id is not None:
        yield Session(config, parent_run_id)
        return
    own = tracking.begin_pipeline(config, name, str(flow_run.id))
    create_link_artifact(tracking.run_link(own), key="mlflow-run", description=f"MLflow run of {name}")
    try:
        yield Session(config, own)
    except BaseException as failure:
        tracking.end_pipeline(own, failure)
        raise
    tracking.end_pipeline(own)
