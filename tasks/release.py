"""Package, verify, register: a version appears in the registry only with a verified package behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.states import Completed
from prefect.transactions import Transaction, get_transaction

from gsrl_core.artifacts import Artifact, write_json
from gsrl_core.sections import PipelineConfig
from tasks import options, tracking
from tasks.stage import Build, Result, Stage, run_stage

PACKAGE = Stage(
    "package",
    "package",
    sections=("sim", "policy", "evaluation", "release"),
    modules=("gsrl_core.package",),
    attachments=("contract.json", "lineage.json", "README.md", "MANIFEST.sha256"),
)
VERIFICATION = Stage(
    "verify",
    "verification",
    sections=("release",),
    modules=("gsrl_core.package",),
    attachments=("verification.json",),
)
ALIAS = "candidate"
"""Alias of the version released last; ``champion`` is left to people."""


@task(name="build-package", **options.STAGE)
def build_package(
    config: PipelineConfig,
    checkpoint: Artifact,
    scene: Artifact,
    evaluation: Artifact,
    lineage: Mapping[str, Any],
    parent_run_id: str,
) -> Result:
    """The folder that a robot computer needs, and nothing else."""

    def body(build: Build) -> dict[str, Any]:
        from gsrl_core.package import build_package as driver

        inputs = build.inputs
        return driver(
            inputs["checkpoint"], inputs["scene"], inputs["evaluation"], build.out, build.config, dict(lineage)
        )

    inputs = {"checkpoint": checkpoint, "scene": scene, "evaluation": evaluation}
    return run_stage(PACKAGE, config, inputs, body, parent_run_id)


@task(name="verify-package", **options.STAGE)
def verify_package(config: PipelineConfig, package: Artifact, parent_run_id: str) -> Result:
    """Digests, parity vectors, and an episode through the robot's control interface."""
    return run_stage(VERIFICATION, config, {"package": package}, _verify, parent_run_id)


@task(name="register", **options.STAGE)
def register(config: PipelineConfig, package: Artifact, evaluation: Artifact, parent_run_id: str) -> Result:
    """A version of the registered model that points to the package; withdrawn when the release fails after it."""
    metrics = {key: float(evaluation.facts[key]) for key in ("success_rate", "success_low", "success_high")}
    version, created = tracking.register(config.release.name, package, parent_run_id, metrics)
    if created:
        get_transaction().set("withdraw", {"name": config.release.name, "version": version})
    facts = {**package.facts, "model": config.release.name, "version": version}
    registered = package.model_copy(update={"facts": facts})
    return registered if created else Completed(name="Cached", message=f"version {version} exists", data=registered)


@register.on_rollback
def _withdraw(transaction: Transaction) -> None:
    if (made := transaction.get("withdraw", None)) is not None:
        tracking.unregister(made["name"], made["version"])


@task(name="promote", **options.STAGE)
def promote(config: PipelineConfig, registered: Artifact, parent_run_id: str) -> Result:
    """Point the alias ``candidate`` to the new version; the former target comes back when the release fails."""
    name, version = config.release.name, str(registered.facts["version"])
    before = tracking.alias(name, ALIAS)
    if before == version:
        return Completed(name="Cached", message=f"{ALIAS} is version {version} already", data=registered)
    get_transaction().set("before", {"name": name, "version": before})
    tracking.set_alias(name, ALIAS, version)
    return registered


@promote.on_rollback
def _restore(transaction: Transaction) -> None:
    if (before := transaction.get("before", None)) is not None:
        tracking.set_alias(before["name"], ALIAS, before["version"])


def _verify(build: Build) -> dict[str, Any]:
    from gsrl_core.package import verify_package as driver

    findings = driver(build.inputs["package"], build.config.release.verify_robot, build.reporter)
    write_json(build.out / "verification.json", findings)
    return {key: value for key, value in findings.items() if isinstance(value, str | int | float | bool | None)}
