"""The starting checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import task

from gsrl_core import hub
from gsrl_core.artifacts import Store
from gsrl_core.errors import CheckpointError
from gsrl_core.sections import PipelineConfig
from tasks import options
from tasks.stage import Build, Result, Stage, run_stage

CHECKPOINT = Stage("policy", "checkpoint", modules=("gsrl_core.policy.checkpoint",))


@task(name="fetch-checkpoint", **options.FETCH)
def fetch_checkpoint(config: PipelineConfig, parent_run_id: str) -> Result:
    """The SFT checkpoint from the hub, a mirror, a folder, or what ships with the project."""
    policy, store = config.policy, Store()
    source = hub.resolve(policy.checkpoint, policy.revision, store)

    def body(build: Build) -> dict[str, str]:
        from gsrl_core.policy.checkpoint import check_checkpoint

        facts = hub.fetch_into(source, build.out, "model", policy.sha256, store, build.reporter)
        # Now, because the first stage that loads the weights comes after the reconstruction.
        with _named(policy.checkpoint, build.out):
            check_checkpoint(
                build.out,
                action_chunk=policy.action_chunk,
                noise_method=policy.noise_method,
                noise_std_range=policy.noise_std_range,
                discrete_state=policy.discrete_state,
                asset_id=policy.asset_id,
            )
        return facts

    identity = {
        "source": f"{source.kind}:{source.reference}:{source.identity}",
        "sha256": policy.sha256 or "",
        "checked for": f"{policy.action_chunk}, {policy.noise_method}, {policy.noise_std_range}, "
        f"{policy.discrete_state}, {policy.asset_id}",
    }
    return run_stage(CHECKPOINT, config, {}, body, parent_run_id, identity=identity)


@contextmanager
def _named(reference: str, copy: Path) -> Iterator[None]:
    """Errors about a copy that nobody gets to see name what it is a copy of: there it can be mended."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(copy), reference)) from error
