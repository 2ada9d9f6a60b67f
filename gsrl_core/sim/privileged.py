"""The true state, as experts, critics and metrics see it."""

from __future__ import annotations

import torch
from torch import Tensor

from gsrl_core.geometry.rotation import matrix_to_quat
from gsrl_core.sim import task
from gsrl_core.sim.states import States


def privileged(states: States) -> dict[str, Tensor]:
    """The true state of B environments, float32 on the CPU.

    ``cube_pose``, ``plate_pose``, ``tcp_pose`` [B, 7] (m, quaternion wxyz), ``qpos`` and ``qvel`` [B, 9],
    ``cube_velocity`` and ``plate_velocity`` [B, 6] (m/s, rad/s).
    """
    bodies = torch.from_numpy(states.body_to_world.copy())
    velocities = torch.from_numpy(states.velocities.copy())
    return {
        "cube_pose": _pose(bodies[:, task.BODIES.index("cube")]),
        "plate_pose": _pose(bodies[:, task.BODIES.index("plate")]),
        "tcp_pose": _pose(torch.from_numpy(states.tcp_to_world.copy())),
        "qpos": torch.from_numpy(states.qpos.copy()),
        "qvel": torch.from_numpy(states.qvel.copy()),
        "cube_velocity": velocities[:, 0],
        "plate_velocity": velocities[:, 1],
    }


def _pose(transform: Tensor) -> Tensor:
    return torch.cat([transform[:, :3, 3], matrix_to_quat(transform[:, :3, :3])], dim=1)
