"""The sweep over seeds and perturbations, and the gate that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact

from gsrl_core.artifacts import Artifact, digest_file
from gsrl_core.errors import GateError
from gsrl_core.sections import PipelineConfig
from tasks import options
from tasks.stage import Build, Result, Stage, run_stage

SWEEP = Stage(
    "sweep",
    "evaluation",
    sections=("sim", "policy", "evaluation"),
    modules=("gsrl_core.evaluate",),
    attachments=("report.json", "table.md", "videos/*.mp4"),
    uses_gpu=True,
)


@task(name="evaluate", task_run_name="{label}", **options.STAGE)
def evaluate(config: PipelineConfig, checkpoint: Artifact, scene: Artifact, label: str, parent_run_id: str) -> Result:
    """Success rates of a checkpoint, with intervals, over the same fixed seeds for every checkpoint."""
    inputs = {"checkpoint": checkpoint, "scene": scene}
    real = config.evaluation.real_results
    # A path is part of the section; what the file says is not.
    path = Path(real).expanduser() if real else None
    identity = {"real results": digest_file(path)} if path and path.is_file() else {}
    result = run_stage(SWEEP, config, inputs, _evaluate, parent_run_id, label=label, identity=identity)
    artifact = result if isinstance(result, Artifact) else result.data
    create_table_artifact(_rows(artifact), key=f"{label}-table", description=f"Success rates, {label}")
    return result


def require_success(evaluation: Artifact, minimum: float) -> None:
    """The gate before release: the lower bound of nominal success must reach ``minimum``.

    Raises:
        GateError: it does not; says the numbers and what helps.
    """
    facts = evaluation.facts
    if facts["success_low"] < minimum:
        raise GateError(
            f"nominal success is {facts['success_rate']:.1%} with lower bound {facts['success_low']:.1%} over "
            f"{facts['episodes']} episodes, below release.minimum_success = {minimum:.1%}; train longer "
            "(ppo.iterations), evaluate more episodes for a tighter interval (evaluation.episodes), or lower it"
        )


def _evaluate(build: Build) -> dict[str, Any]:
    from gsrl_core.evaluate import evaluate as driver

    real = build.config.evaluation.real_results
    report = driver(
        build.inputs["checkpoint"], build.inputs["scene"], build.out, build.config, build.reporter,
        real_results=Path(real).expanduser() if real else None,
    )  # fmt: skip
    nominal = report.nominal
    low, high = nominal.interval
    return {
        "success_rate": nominal.success_rate,
        "success_low": low,
        "success_high": high,
        "successes": sum(nominal.success),
        "episodes": len(nominal.seeds),
        "success_seed_rate": sum(nominal.success_seed) / len(nominal.seeds),
        "mean_length": nominal.mean_length,
    }


def _rows(evaluation: Artifact) -> list[dict[str, Any]]:
    cells = json.loads((evaluation.path / "report.json").read_text())["cells"]
    columns = ("name", "episodes", "successes", "success_rate", "interval", "success_seed_rate", "mean_length")
    return [{column: cell[column] for column in columns} for cell in cells]
