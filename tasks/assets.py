"""Bring in what the pipeline starts from: photos, and robot assets of a hub data set."""

from __future__ import annotations

from prefect import task

from gsrl_core import folders, hub
from gsrl_core.artifacts import Store
from gsrl_core.sections import PipelineConfig
from tasks import options
from tasks.stage import Build, Result, Stage, run_stage

CAPTURE = Stage("capture", "capture", modules=("gsrl_core.folders",))
GSENV = Stage("gsenv-assets", "dataset")


@task(name="fetch-capture", **options.STAGE)
def fetch_capture(config: PipelineConfig, parent_run_id: str) -> Result:
    """Photos (or a video) as an artefact: later stages do not depend on a folder that somebody may change."""
    source = folders.locate_capture(config.assets.capture)

    def body(build: Build) -> dict[str, str | int]:
        return {"files": folders.copy_capture(source, build.out)}

    return run_stage(CAPTURE, config, {}, body, parent_run_id, identity={"content": folders.capture_digest(source)})


@task(name="fetch-gsenv-assets", **options.FETCH)
def fetch_gsenv_assets(config: PipelineConfig, reference: str, parent_run_id: str) -> Result:
    """Robot and object splats in the layout of RLinf/gsenv-assets-v0."""
    store = Store()
    source = hub.resolve(reference, config.assets.revision, store, "dataset")

    def body(build: Build) -> dict[str, str]:
        return hub.fetch_into(source, build.out, "dataset", None, store, build.reporter)

    return run_stage(GSENV, config, {}, body, parent_run_id, identity={"source": f"{source.kind}:{source.identity}"})
