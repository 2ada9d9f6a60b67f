"""How every stage runs: look in the cache, else build in a fresh folder, commit, remember."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prefect.states import Completed, State

from gsrl_core.artifacts import Artifact, JsonScalar, Store
from gsrl_core.sections import PipelineConfig
from tasks import tracking
from tasks.options import gpu_slots, restricted, stage_key
from tasks.reporting import PROGRESS_LOGGER, StageReporter

_log = logging.getLogger(PROGRESS_LOGGER)


@dataclass(frozen=True)
class Stage:
    """What a stage is: its name, what it makes, and what its result depends on."""

    name: str
    kind: str
    """Kind of the artefact it makes."""
    sections: tuple[str, ...] = ()
    """Sections of the configuration that decide its result: part of the cache key."""
    checked: tuple[str, ...] = ()
    """Sections that it may see besides, to check or to log, without effect on its result; it sees no others."""
    modules: tuple[str, ...] = ()
    """Drivers whose code (with all that they import) is part of the cache key."""
    attachments: tuple[str, ...] = ()
    """Globs of files that are attached to the MLflow run."""
    uses_gpu: bool = False
    own_tensorboard: bool = False
    """The driver writes TensorBoard files itself, into the artefact."""


@dataclass(frozen=True)
class Build:
    """What a stage's body gets."""

    out: Path
    """Empty folder that becomes the artefact."""
    workspace: Path
    """Survives a crash: a later run of the same stage with the same key finds it."""
    config: PipelineConfig
    """The sections that the stage declared; all others at their defaults."""
    inputs: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the input artefacts, verified."""
    reporter: StageReporter | None = None


Body = Callable[[Build], Mapping[str, JsonScalar]]

Result = Artifact | State[Artifact]
"""What a task returns: the artefact, or a state named ``Cached`` that carries it."""


def run_stage(
    stage: Stage,
    config: PipelineConfig,
    inputs: Mapping[str, Artifact],
    body: Body,
    parent_run_id: str,
    *,
    label: str | None = None,
    identity: Mapping[str, str] | None = None,
) -> Result:
    """Return the stage's artefact: from the cache (as a state named ``Cached``) or by running ``body``.

    At most one process builds a key at a time; others wait for it and then find it cached. A kill at any moment leaves
    the store as it was, plus the workspace from which the next run resumes.

    Args:
        stage: the declaration.
        config: the whole configuration.
        inputs: artefacts of earlier stages by name; part of the key by digest.
        body: fills ``Build.out`` and returns the artefact's facts.
        parent_run_id: MLflow run of the pipeline.
        label: name for people when one stage runs twice in a pipeline.
        identity: further parts of the key, for inputs that are not artefacts.

    Raises:
        ArtifactError: an input was altered, or the disk is full.
    """
    store = Store()
    label = label or stage.name
    digests = {name: artifact.sha256 for name, artifact in inputs.items()} | dict(identity or {})
    key = stage_key(stage.name, digests, config, stage.sections, stage.modules, body)
    sections = {name: getattr(config, name) for name in stage.sections}
    with store.locked(f"{stage.name}-{key}"):
        if (hit := store.recall(stage.name, key)) is not None:
            _log.info("%s: from the store", label, extra={"stage": label, "fraction": 1.0})
            tracking.cached_stage(parent_run_id, label, sections, key, digests, hit)
            return Completed(name="Cached", message=f"{stage.kind} {hit.sha256[:12]} from the store", data=hit)
        with tracking.stage_run(parent_run_id, label, sections, key, digests) as run:
            artifact = _execute(store, stage, key, config, inputs, body, run, label)
            run.result(artifact)
            run.files(artifact.path, stage.attachments)
    return artifact


def _execute(
    store: Store,
    stage: Stage,
    key: str,
    config: PipelineConfig,
    inputs: Mapping[str, Artifact],
    body: Body,
    run: tracking.StageRun,
    label: str,
) -> Artifact:
    workspace = store.workspace(f"{stage.name}-{key}")
    wanted = config.tracking.tensorboard and not stage.own_tensorboard
    board = store.root / "tensorboard" / f"{label}-{run.run_id[:8]}" if wanted else None
    reporter = StageReporter(label, run, board)
    reporter.progress(0.0, f"{label}: starting")
    try:
        with store.full_disk_is_an_error(), store.building(stage.kind) as out:
            build = Build(
                out=out,
                workspace=workspace,
                config=restricted(config, stage.sections + stage.checked),
                inputs={name: store.check(artifact) for name, artifact in inputs.items()},
                reporter=reporter,
            )
            if stage.uses_gpu:
                with gpu_slots(config):
                    facts = body(build)
            else:
                facts = body(build)
            artifact = store.commit(stage.kind, out, facts)
            store.record(stage.name, key, artifact)
        shutil.rmtree(workspace, ignore_errors=True)
        reporter.progress(1.0, f"{label}: done")
    finally:
        with suppress(OSError):
            workspace.rmdir()  # after a failure: only if the stage left nothing to resume from
        reporter.close()
    return artifact
