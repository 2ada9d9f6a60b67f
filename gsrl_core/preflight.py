"""What a pipeline can know to be wrong before it works for hours: relations that no section can check by itself."""

from __future__ import annotations

from pathlib import Path

from gsrl_core.dist.placement import check_roles
from gsrl_core.errors import ConfigError
from gsrl_core.evaluate import read_real_results
from gsrl_core.package import check_packageable
from gsrl_core.sections import PipelineConfig
from gsrl_core.team import check_seeds


def check_pipeline(config: PipelineConfig) -> None:
    """Raise what a later stage would raise about ``config`` itself.

    Raises:
        ConfigError: seeds overlap, or a file or folder that is named does not exist or cannot be read.
        PlacementError: ``cluster.component_placement`` cannot be read, whatever the machine.
        PackageError: the robot package could not express the environment's camera or actions.
    """
    check_seeds(config)
    check_roles(config.cluster.component_placement)
    check_packageable(config.sim)
    if config.evaluation.real_results is not None:
        read_real_results(Path(config.evaluation.real_results).expanduser())
    background = config.sim.realism.background
    if background not in (None, "random") and not Path(background).expanduser().is_dir():
        raise ConfigError(f"sim.realism.background: {background} is not a folder; give one with pictures, or 'random'")
