"""Policy and environment from their artefacts: what fine-tuning and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from gsrl_core.config import PipelineConfig
from gsrl_core.interfaces import VecEnv

if TYPE_CHECKING:
    from gsrl_core.rl.ppo import TrainablePolicy
    from gsrl_core.sim.perturb import Perturbation


class Embodiment(Protocol):
    """Makes the two halves of the loop. Picklable, so that workers on other machines can make theirs."""

    def make_policy(self, device: torch.device) -> TrainablePolicy:
        """The policy with the weights that training starts from."""
        ...

    def make_env(self, num_envs: int, device: torch.device, perturbation: str | None = None) -> VecEnv:
        """Environments, disturbed by the named perturbation."""
        ...

    def save_policy(self, policy: TrainablePolicy, folder: Path) -> None:
        """Write a checkpoint folder that :meth:`make_policy` of a later run can start from."""
        ...


@dataclass(frozen=True)
class SplatEmbodiment:
    """pi0.5 in the splat-rendered ManiSkill environment."""

    checkpoint: Path
    scene: Path
    config: PipelineConfig

    def make_policy(self, device: torch.device) -> TrainablePolicy:
        """The checkpoint's policy. Raises CheckpointError."""
        raise NotImplementedError

    def make_env(self, num_envs: int, device: torch.device, perturbation: str | None = None) -> VecEnv:
        """The configured task in this scene. Raises SceneError, SimulationError."""
        raise NotImplementedError

    def save_policy(self, policy: TrainablePolicy, folder: Path) -> None:
        """openpi layout with the value head beside it; normalisation statistics are those of the start."""
        raise NotImplementedError


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
