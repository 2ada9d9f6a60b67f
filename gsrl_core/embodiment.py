"""Policy and environment from their artefacts: what fine-tuning and evaluation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from gsrl_core.interfaces import VecEnv
from gsrl_core.sections import PipelineConfig

if TYPE_CHECKING:
    from gsrl_core.policy.agent import Pi05Policy
    from gsrl_core.rl.ppo import TrainablePolicy


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

    def make_policy(self, device: torch.device) -> Pi05Policy:
        """The checkpoint's policy, sampled as configured. Raises CheckpointError."""
        from gsrl_core.policy.checkpoint import load_policy

        settings = self.config.policy
        policy = load_policy(
            self.checkpoint,
            denoise_steps=settings.denoise_steps,
            action_chunk=settings.action_chunk,
            noise_method=settings.noise_method,
            noise_level=settings.noise_level,
            noise_std_range=settings.noise_std_range,
            precision=settings.precision,
            compile=settings.compile,
            device=device,
            discrete_state=settings.discrete_state,
            asset_id=settings.asset_id,
        )
        policy.network.gradient_checkpointing = self.config.ppo.gradient_checkpointing
        return policy

    def make_env(self, num_envs: int, device: torch.device, perturbation: str | None = None) -> VecEnv:
        """The configured task in this scene. Raises SceneError, SimulationError."""
        from gsrl_core.sim.gs_env import make_env
        from gsrl_core.sim.perturb import perturbation as named
        from gsrl_core.splat.raster import make_rasterizer
        from gsrl_core.splat.scene import load_scene

        return make_env(
            self.config.sim,
            load_scene(self.scene).to(device),
            make_rasterizer(self.config.sim.rasterizer, device),
            num_envs,
            named(perturbation) if perturbation else None,
        )

    def save_policy(self, policy: Pi05Policy, folder: Path) -> None:
        """Openpi layout, critic in heads.safetensors; normalisation statistics are those of the start."""
        from gsrl_core.policy.checkpoint import save_checkpoint

        save_checkpoint(folder, policy, card=_card(self.config))


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _card(config: PipelineConfig) -> str:
    from gsrl_core.sim.tasks import configured_task, told_instruction

    ppo, policy = config.ppo, config.policy
    task = configured_task(config.sim)
    return (
        "# pi0.5 after PPO in a splat-rendered environment\n\n"
        f'Task: {task.name}, "{told_instruction(config.sim, task)}". '
        f"Iterations of {ppo.rollout_epochs} x {config.sim.num_envs} episodes, {policy.noise_method}, "
        f"{policy.denoise_steps} denoising steps, chunks of {policy.action_chunk}. training.json holds settings and "
        "history; heads.safetensors the critic, which serving does not need.\n"
    )
