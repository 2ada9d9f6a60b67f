"""The flow: photos of a bench to a verified policy package for a Franka FR3."""

from __future__ import annotations

import logging
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict

from flows.parameters import Overrides
from flows.session import Session, StageReport, StageResult, session
from flows.stages import expanded, finetune, release, run_flow, scene, start_policy, sweep
from gsrl_core.artifacts import Artifact, Store, write_json
from gsrl_core.config import apply_overrides
from gsrl_core.preflight import check_pipeline
from gsrl_core.sections import PipelineConfig

_NONE = Overrides()
_log = logging.getLogger(__name__)


class SuccessRate(BaseModel):
    """Nominal success of a checkpoint with its Wilson interval."""

    model_config = ConfigDict(frozen=True)

    rate: float
    low: float
    high: float
    successes: int
    episodes: int


class PipelineReport(BaseModel):
    """The result of a run; written to ``$GSRL_HOME/runs/<id>/report.json``."""

    model_config = ConfigDict(frozen=True)

    id: str
    status: Literal["released", "not released", "failed"]
    reason: str | None
    """Why nothing was released: a gate's advice, or the error."""
    seconds: float
    stages: tuple[StageReport, ...]
    success_before: SuccessRate | None
    success_after: SuccessRate | None
    psnr: float | None
    """Held-out PSNR of the reconstruction [dB]."""
    package: str | None
    """Folder of the verified package."""
    model_version: str | None
    """``name/version`` in the MLflow registry."""
    mlflow_run_id: str
    prefect_flow_run_id: str

    @property
    def file(self) -> Path:
        """Where the report is written."""
        return Store().root / "runs" / self.id / "report.json"


@flow(name="real2sim2real")
def real2sim2real(config: PipelineConfig, overrides: Overrides = _NONE) -> PipelineReport | State[Any]:
    """Photos -> scene -> PPO -> sweep before and after -> gate -> verified, registered package.

    Args:
        config: expanded preset; deployments carry one.
        overrides: single values that replace the preset's, by dotted key.

    Raises:
        GsrlError: the configuration cannot work, or a stage failed; then the report says so too.
    """
    run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    config = expanded(config, overrides)
    check_pipeline(config)
    Store().collect_garbage()
    start = time.perf_counter()
    with session(f"real2sim2real {run_id}", config, None) as run:
        made: dict[str, Artifact] = {}
        try:
            blocked = _stages(run, made)
        except Exception as error:
            try:
                _finish(run, run_id, made, "failed", str(error), start)
            except Exception as second:  # a full disk fails both; the first error is the one to show
                _log.warning("the report of the failed run could not be written: %s", second)
            raise
        report = _finish(run, run_id, made, "not released" if blocked else "released", blocked, start)
    if blocked:
        return Completed(name="NotReleased", message=blocked, data=report)
    return report


def _stages(run: Session, made: dict[str, Artifact]) -> str | None:
    """Go through the stages and fill ``made``; returns a gate's reason when the pipeline ends early."""

    def step(stage: Any, renamed: dict[str, str], config: PipelineConfig = run.config, **inputs: Any) -> str | None:
        result: StageResult = run_flow(stage, config, **inputs, parent_run_id=run.mlflow_run_id)
        run.include(result)
        made.update({name: result.artifacts[key] for key, name in renamed.items() if key in result.artifacts})
        return result.blocked

    step(start_policy, {"checkpoint": "start"})  # first, because a wrong name or digest should cost seconds
    if blocked := step(scene, {"scene": "scene", "reconstruction": "reconstruction"}):
        return blocked
    bench = made["scene"]
    # Before training only the nominal rate is asked for; perturbations are measured on what may be released.
    nominal = apply_overrides(run.config, {"evaluation.episodes_per_perturbation": 0, "evaluation.real_results": None})
    step(sweep, {"evaluation": "before"}, nominal, scene_artifact=bench, checkpoint=made["start"], label="sweep-before")
    step(finetune, {"checkpoint": "tuned"}, scene_artifact=bench, checkpoint=made["start"])
    step(sweep, {"evaluation": "after"}, scene_artifact=bench, checkpoint=made["tuned"], label="sweep")
    return step(
        release, {"package": "package"},
        scene_artifact=bench, checkpoint=made["tuned"], evaluation=made["after"],
    )  # fmt: skip


def _finish(
    run: Session,
    run_id: str,
    made: dict[str, Artifact],
    status: Literal["released", "not released", "failed"],
    reason: str | None,
    start: float,
) -> PipelineReport:
    package = made.get("package")
    report = PipelineReport(
        id=run_id,
        status=status,
        reason=reason,
        seconds=round(time.perf_counter() - start, 3),
        stages=tuple(run.stages),
        success_before=_success(made.get("before")),
        success_after=_success(made.get("after")),
        psnr=made["reconstruction"].facts["psnr"] if "reconstruction" in made else None,
        package=str(package.path) if package else None,
        model_version=f"{package.facts['model']}/{package.facts['version']}" if package else None,
        mlflow_run_id=run.mlflow_run_id,
        prefect_flow_run_id=str(flow_run.id),
    )
    report.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(report.file, report.model_dump(mode="json"))
    run.summary(_numbers(report), {"gsrl.status": status, "gsrl.run": run_id, "gsrl.reason": reason or ""})
    create_markdown_artifact(_markdown(report), key="report", description=f"Report of run {run_id}")
    return report


def _success(evaluation: Artifact | None) -> SuccessRate | None:
    if evaluation is None:
        return None
    facts = evaluation.facts
    return SuccessRate(
        rate=facts["success_rate"],
        low=facts["success_low"],
        high=facts["success_high"],
        successes=facts["successes"],
        episodes=facts["episodes"],
    )


def _numbers(report: PipelineReport) -> dict[str, float]:
    values = {"psnr": report.psnr, "seconds": report.seconds}
    for name, success in (("before", report.success_before), ("after", report.success_after)):
        if success:
            values |= {f"success_{name}": success.rate, f"success_{name}_low": success.low}
            values |= {f"success_{name}_high": success.high}
    return {key: value for key, value in values.items() if value is not None}


def _markdown(report: PipelineReport) -> str:
    rows = [
        f"| {s.name} | {s.seconds:.1f} | {'cached' if s.cached else 'run'} | `{s.artifact.sha256[:12]}` |"
        for s in report.stages
    ]
    rates = [
        f"- success {name}: {success.rate:.1%} [{success.low:.1%}, {success.high:.1%}] over {success.episodes} episodes"
        for name, success in (("before", report.success_before), ("after", report.success_after))
        if success
    ]
    head = f"# {report.status}" + (f"\n\n{report.reason}" if report.reason else "")
    package = [f"- package: `{report.package}`", f"- model: {report.model_version}"] if report.package else []
    table = ["| stage | s | | artefact |", "|---|---|---|---|", *rows]
    return "\n".join([head, "", *rates, *package, "", *table, ""])
