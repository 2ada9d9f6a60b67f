"""The stages as flows of their own: each has its run page, and can be deployed and started alone.

Started alone, a stage takes what it needs of earlier stages from the cache, or makes it first. Every flow takes an
expanded configuration and ``overrides`` (dotted keys); ``parent_run_id`` is the MLflow run to attach to (none: a new
one).
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed, State
from prefect.transactions import transaction

from flows.parameters import Overrides
from flows.session import StageResult, session
from gsrl_core.artifacts import Artifact
from gsrl_core.config import apply_overrides
from gsrl_core.errors import GateError
from gsrl_core.sections import PipelineConfig
from tasks import assets, policy, tracking, training
from tasks import evaluation as evaluations
from tasks import release as releases
from tasks import scene as scenes

_NONE = Overrides()


def run_flow(stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a flow and return its value, also when it ended in a state with a name of its own."""
    return stage(*args, **kwargs, return_state=True).result()


def expanded(config: PipelineConfig, overrides: Overrides) -> PipelineConfig:
    """``config`` with ``overrides`` applied and all relations checked. Raises ConfigError."""
    return apply_overrides(config, overrides.assignments())


@flow(name="scene")
def scene(
    config: PipelineConfig, overrides: Overrides = _NONE, parent_run_id: str | None = None
) -> StageResult | State[Any]:
    """Photos -> cameras -> Gaussians -> quality gate -> scene with robot and objects."""
    with session("scene", expanded(config, overrides), parent_run_id) as run:
        capture = run.stage("capture", assets.fetch_capture)
        reconstruction = run.stage("reconstruct", scenes.reconstruct, capture)
        try:
            scenes.require_quality(run.config, reconstruction)
        except GateError as error:
            return _blocked(run.result(blocked=str(error), reconstruction=reconstruction))
        gsenv = run.config.assets.gsenv
        robot = run.stage("gsenv-assets", assets.fetch_gsenv_assets, gsenv) if gsenv else None
        assembled = run.stage("assemble", scenes.assemble_scene, reconstruction, robot)
        return run.result(scene=assembled, reconstruction=reconstruction)


@flow(name="policy")
def start_policy(config: PipelineConfig, overrides: Overrides = _NONE, parent_run_id: str | None = None) -> StageResult:
    """The starting checkpoint."""
    with session("policy", expanded(config, overrides), parent_run_id) as run:
        return run.result(checkpoint=run.stage("policy", policy.fetch_checkpoint))


@flow(name="finetune")
def finetune(
    config: PipelineConfig,
    overrides: Overrides = _NONE,
    scene_artifact: Artifact | None = None,
    checkpoint: Artifact | None = None,
    parent_run_id: str | None = None,
) -> StageResult | State[Any]:
    """PPO on the starting checkpoint in the splat-rendered environment."""
    with session("finetune", expanded(config, overrides), parent_run_id) as run:
        if scene_artifact is None:
            made = run_flow(scene, run.config, parent_run_id=run.mlflow_run_id)
            run.include(made)
            if made.blocked:
                return _blocked(run.result(blocked=made.blocked))
            scene_artifact = made.artifacts["scene"]
        if checkpoint is None:
            fetched = start_policy(run.config, parent_run_id=run.mlflow_run_id)
            run.include(fetched)
            checkpoint = fetched.artifacts["checkpoint"]
        tuned = run.stage("finetune", training.finetune, checkpoint, scene_artifact)
        return run.result(checkpoint=tuned, scene=scene_artifact)


@flow(name="sweep")
def sweep(
    config: PipelineConfig,
    overrides: Overrides = _NONE,
    scene_artifact: Artifact | None = None,
    checkpoint: Artifact | None = None,
    label: str = "sweep",
    parent_run_id: str | None = None,
) -> StageResult | State[Any]:
    """Success rates of a checkpoint over fixed seeds and perturbations; without one, of the fine-tuned policy."""
    with session(label, expanded(config, overrides), parent_run_id) as run:
        if checkpoint is None or scene_artifact is None:
            upstream, known = (scene, {}) if checkpoint else (finetune, {"scene_artifact": scene_artifact})
            made = run_flow(upstream, run.config, **known, parent_run_id=run.mlflow_run_id)
            run.include(made)
            if made.blocked:
                return _blocked(run.result(blocked=made.blocked))
            scene_artifact = made.artifacts["scene"]
            checkpoint = checkpoint or made.artifacts["checkpoint"]
        measured = run.stage(label, evaluations.evaluate, checkpoint, scene_artifact, label)
        return run.result(evaluation=measured, checkpoint=checkpoint, scene=scene_artifact)


@flow(name="release")
def release(
    config: PipelineConfig,
    overrides: Overrides = _NONE,
    scene_artifact: Artifact | None = None,
    checkpoint: Artifact | None = None,
    evaluation: Artifact | None = None,
    parent_run_id: str | None = None,
) -> StageResult | State[Any]:
    """Gate on the lower bound of success, package, verify, register and alias: all of the last two or nothing."""
    with session("release", expanded(config, overrides), parent_run_id) as run:
        if scene_artifact is None or checkpoint is None or evaluation is None:
            made = run_flow(
                sweep, run.config, scene_artifact=scene_artifact, checkpoint=checkpoint,
                parent_run_id=run.mlflow_run_id,
            )  # fmt: skip
            run.include(made)
            if made.blocked:
                return _blocked(run.result(blocked=made.blocked))
            scene_artifact, checkpoint, evaluation = (
                made.artifacts[name] for name in ("scene", "checkpoint", "evaluation")
            )
        try:
            evaluations.require_success(evaluation, run.config.release.minimum_success)
        except GateError as error:
            return _blocked(run.result(blocked=str(error)))
        lineage = _lineage(run.config, run.mlflow_run_id, scene_artifact, checkpoint, evaluation)
        with transaction():
            package = run.stage("package", releases.build_package, checkpoint, scene_artifact, evaluation, lineage)
            run.stage("verify", releases.verify_package, package)
            registered = run.stage("register", releases.register, package, evaluation)
            run.stage("promote", releases.promote, registered)
        return run.result(package=registered)


def _lineage(config: PipelineConfig, mlflow_run_id: str, *inputs: Artifact) -> dict[str, Any]:
    """Where a package comes from: run, code, configuration and the digests of what went in."""
    return {
        "mlflow_run_id": mlflow_run_id,
        "prefect_flow_run_id": str(flow_run.id),
        "git_commit": tracking.git_commit(),
        "config": config.model_dump(mode="json"),
        "artifacts": {f"{artifact.kind}": artifact.sha256 for artifact in inputs},
    }


def _blocked(result: StageResult) -> State[Any]:
    """A gate stopped the stage: a finding, not a crash; the run is completed under a name that says so."""
    return Completed(name="GateNotPassed", message=result.blocked, data=result)
