"""Photos to the scene that simulation draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prefect import task

from gsrl_core.artifacts import Artifact
from gsrl_core.errors import GateError
from gsrl_core.sections import PipelineConfig
from tasks import options
from tasks.reporting import show_picture
from tasks.stage import Build, Result, Stage, run_stage

RECONSTRUCTION = Stage(
    "reconstruct",
    "reconstruction",
    sections=("capture", "fit"),
    modules=("gsrl_core.reconstruct",),
    attachments=("quality.json", "photo_render.png"),
    uses_gpu=True,
)
# Of the section sim the task alone decides the scene; it is part of the key by its own digest.
SCENE = Stage("assemble", "scene", checked=("sim",), modules=("gsrl_core.assemble",))

_RESUMABLE = ".work"


@task(name="reconstruct", **options.STAGE)
def reconstruct(config: PipelineConfig, capture: Artifact, parent_run_id: str) -> Result:
    """Cameras and a metric 3D Gaussian model of the bench, with its measured quality."""
    result = run_stage(RECONSTRUCTION, config, {"capture": capture}, _reconstruct, parent_run_id)
    artifact = result if isinstance(result, Artifact) else result.data
    show_picture("photo-render", artifact.path / "photo_render.png", "Photo beside render, held-out view")
    return result


@task(name="assemble-scene", **options.STAGE)
def assemble_scene(
    config: PipelineConfig, reconstruction: Artifact, gsenv: Artifact | None, parent_run_id: str
) -> Result:
    """The bench with the robot and the task's objects as bodies."""
    inputs = {"reconstruction": reconstruction} | ({"gsenv": gsenv} if gsenv else {})
    identity = {"task": options.task_version(config.sim)}
    return run_stage(SCENE, config, inputs, _assemble, parent_run_id, identity=identity)


def require_quality(config: PipelineConfig, reconstruction: Artifact) -> None:
    """The gate after reconstruction, by the thresholds of this run.

    Raises:
        GateError: a measured value misses its threshold; says which, by how much, and what helps.
    """
    from gsrl_core.reconstruct import gates

    quality = json.loads((reconstruction.path / "quality.json").read_text())
    failed = [gate for gate in gates(quality, config.quality) if not gate["passed"]]
    if failed:
        raise GateError(
            "the reconstruction is not good enough: "
            + "; ".join(f"{g['name']} is {g['value']} (needs {g['threshold']}): {g['advice']}" for g in failed)
        )


def _reconstruct(build: Build) -> dict[str, Any]:
    from gsrl_core.reconstruct import reconstruct as driver

    # The driver resumes from a folder inside its output, which therefore lies in the workspace until it is done.
    draft = build.workspace / "draft"
    # The gates are judged by require_quality: another threshold must not repeat the fit.
    photos = _photos(build.inputs["capture"])
    quality = driver(photos, draft, build.config.capture, build.config.fit, None, build.reporter)
    shutil.copytree(draft, build.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_RESUMABLE))
    return {key: quality[key] for key in ("psnr", "ssim", "registered", "total", "gaussians", "reprojection_px")}


def _photos(capture: Path) -> Path:
    """The folder of photos, or the file when the capture is one video (markers.json may lie beside it)."""
    from gsrl_core.capture.frames import PHOTO_SUFFIXES, VIDEO_SUFFIXES

    videos = [path for path in capture.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES]
    photos = [path for path in capture.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES]
    return videos[0] if len(videos) == 1 and not photos else capture


def _assemble(build: Build) -> dict[str, Any]:
    from gsrl_core.assemble import assemble_scene as driver
    from gsrl_core.sim.tasks import configured_task

    scene = driver(
        build.inputs["reconstruction"] / "scene.ply", build.out,
        gsenv=build.inputs.get("gsenv"), task=configured_task(build.config.sim),
    )  # fmt: skip
    return {"gaussians": len(scene.body), "bodies": len(scene.names)}
