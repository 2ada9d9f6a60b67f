"""PPO fine-tuning."""

from __future__ import annotations

from typing import Any

from prefect import task

from gsrl_core.artifacts import Artifact
from gsrl_core.sections import PipelineConfig
from tasks import options
from tasks.stage import Build, Result, Stage, run_stage

FINETUNED = Stage(
    "finetune",
    "checkpoint",
    sections=("sim", "policy", "ppo", "cluster"),
    checked=("evaluation", "tracking"),
    modules=("gsrl_core.finetune",),
    attachments=("training.json", "training.csv", "learning_curve.png"),
    uses_gpu=True,
    own_tensorboard=True,
)


@task(name="finetune", **options.STAGE)
def finetune(config: PipelineConfig, checkpoint: Artifact, scene: Artifact, parent_run_id: str) -> Result:
    """The policy after PPO in the splat-rendered environment; resumes from its last saved iteration."""
    return run_stage(FINETUNED, config, {"checkpoint": checkpoint, "scene": scene}, _finetune, parent_run_id)


def _finetune(build: Build) -> dict[str, Any]:
    from gsrl_core.finetune import finetune as driver

    return driver(
        build.inputs["checkpoint"], build.inputs["scene"], build.out, build.workspace, build.config, build.reporter
    )
