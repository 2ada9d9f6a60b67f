"""Physics by ManiSkill's own batched environment: the GPU backend, and the reference that the lean one is held to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sapien import physx

from gsrl_core.errors import SimulationError
from gsrl_core.sections import SimConfig
from gsrl_core.sim import fr3, task
from gsrl_core.sim import states as layout
from gsrl_core.sim.settings import action_dim
from gsrl_core.sim.tasks import configured_task

logger = logging.getLogger(__name__)


class BatchPhysics:
    """All environments in one ManiSkill environment. Those that are done are stepped on, but their record is kept."""

    def __init__(self, sim: SimConfig, num_envs: int) -> None:
        """Build the environment on ``sim.physics_backend``.

        Raises:
            SimulationError: no CUDA device, no PhysX GPU library, or several environments on the CPU.
        """
        if sim.physics_backend == "physx_cuda":
            check_gpu_physics()
        elif num_envs != 1:
            raise SimulationError(f"ManiSkill runs one environment on the CPU, not {num_envs}; use the worker pool")
        from gsrl_core.sim.maniskill import env_class

        made = configured_task(sim)
        self._seeds: list[int] = []
        self._action_dim = action_dim(sim.control_mode)
        objects = len(made.bodies)
        self.states = layout.view(
            bytearray(layout.size_in_bytes(num_envs, sim.max_episode_steps, objects)),
            num_envs,
            sim.max_episode_steps,
            objects,
        )
        self._env = env_class(made)(
            num_envs=num_envs,
            obs_mode="none",
            reward_mode="none",
            control_mode=sim.control_mode,
            sim_backend=sim.physics_backend,
            sim_config={
                "sim_freq": sim.sim_hz,
                "control_freq": sim.control_hz,
                "scene_config": {"solver_position_iterations": sim.solver_iterations},
            },
        )

    def reset(self, specs: Sequence[task.EpisodeSpec]) -> None:
        """Start one episode per environment. Raises SimulationError for a friction or range that is not nominal."""
        if any(spec != task.EpisodeSpec(spec.seed) for spec in specs):
            raise SimulationError(
                "the batched backend starts nominal episodes only; pose and friction perturbations need physx_cpu"
            )
        _, info = self._env.reset(seed=[spec.seed for spec in specs])
        self._seeds = [spec.seed for spec in specs]
        for name in ("elapsed", "executed", "success", "success_seed", "lost"):
            getattr(self.states, name)[:] = 0
        self._record(info, np.ones(len(specs), dtype=bool))

    def step(self, actions: np.ndarray, active: np.ndarray) -> None:
        """Execute ``actions`` float32 [B, H, A] where ``active`` [B]."""
        states = self.states
        states.executed[:] = 0
        before = layout.snapshot(states)
        running = active & ~states.lost.astype(bool)
        for h in range(actions.shape[1]):
            if not running.any():
                break
            # An environment that is done gets zeros, whatever the policy made of its frozen observation.
            command = np.where(running[:, None], actions[:, h, : self._action_dim], np.float32(0))
            *_, info = self._env.step(torch.from_numpy(command).to(self._base.device))
            running &= ~self._lose(running & ~self._finite(), before)
            states.executed[running] += 1
            states.elapsed[running] += 1
            states.success_seed[running & info["success_seed"].cpu().numpy()] = 1
            self._record(info, running)
            finished = running & info["success"].cpu().numpy()
            states.success[finished] = 1
            running &= ~finished

    def close(self) -> None:
        """Close the environment; calling it again does nothing."""
        self._env.close()

    @property
    def _base(self) -> Any:
        return self._env.unwrapped

    def _finite(self) -> np.ndarray:
        """Bool [B]: the robot's joints are numbers."""
        return torch.isfinite(self._base.agent.robot.get_qpos()).all(dim=1).cpu().numpy()

    def _lose(self, diverged: np.ndarray, before: layout.States) -> np.ndarray:
        """End the episodes of ``diverged`` (bool [B]) in the state before the chunk; returns the same."""
        if diverged.any():
            layout.restore(self.states, before, diverged)
            self.states.lost[diverged] = 1
            seeds = [self._seeds[env] for env in np.flatnonzero(diverged)]
            logger.warning("the physics diverged; lost until the next reset: the episodes of seeds %s", seeds)
        return diverged

    def _record(self, info: dict[str, torch.Tensor], which: np.ndarray) -> None:
        base, states = self._base, self.states
        robot = base.agent.robot
        objects = base.objects.values()
        bodies = [*(robot.links_map[name] for name in fr3.LINKS), *objects]
        poses = torch.stack([body.pose.to_transformation_matrix() for body in bodies], dim=1)
        velocities = [torch.cat([b.linear_velocity, b.angular_velocity], dim=-1) for b in objects]
        values = {
            "body_to_world": poses,
            "tcp_to_world": base.agent.tcp.pose.to_transformation_matrix(),
            "qpos": robot.get_qpos(),
            "qvel": robot.get_qvel(),
            "velocities": torch.stack(velocities, dim=1),
            "parts": torch.stack([info[part] for part in layout.PARTS], dim=1),
        }
        for name, value in values.items():
            getattr(states, name)[which] = value.cpu().numpy()[which]


def check_gpu_physics() -> None:
    """Load PhysX's GPU library. Raises SimulationError, with what to do, unless GPU physics can run here."""
    if not torch.cuda.is_available():
        raise SimulationError("physics_backend physx_cuda needs a CUDA device; use physx_cpu on this machine")
    # Where sapien looks for it. Not downloaded here: native code from the network is the user's decision.
    library = Path.home() / ".sapien" / "physx" / physx.version() / "libPhysXGpu_64.so"
    if not library.is_file():
        raise SimulationError(
            f"physics_backend physx_cuda needs NVIDIA's library at {library}, which sapien's wheel does not contain; "
            "run `python -c 'import sapien.physx; sapien.physx.enable_gpu()'` once with network access (it downloads "
            "it from github.com/sapien-sim/physx-precompiled), copy it from another machine, or use physx_cpu"
        )
    try:
        physx.enable_gpu()
    except OSError as error:
        raise SimulationError(
            f"physics_backend physx_cuda: {library} or the CUDA driver cannot be loaded ({error}); delete the file and "
            "download it again, see that libcuda.so is on the loader's path, or use physx_cpu"
        ) from error
    except RuntimeError as error:
        raise SimulationError(
            f"physics_backend physx_cuda cannot be enabled ({error}); choose it before this process steps any physics "
            "on the CPU, or use physx_cpu"
        ) from error
