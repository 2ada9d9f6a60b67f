"""The true state, as experts, critics and metrics see it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsrl_core.geometry.rotation import matrix_to_quat
from gsrl_core.sim import fr3
from gsrl_core.sim.states import States


def privileged(states: States, objects: Sequence[str]) -> dict[str, Tensor]:
    """The true state of B environments, float32 on the CPU.

    ``tcp_pose`` and each object's ``<name>_pose`` [B, 7] (m, quaternion wxyz), ``qpos`` and ``qvel`` [B, 9], each
    object's ``<name>_velocity`` [B, 6] (m/s, rad/s).

    Args:
        states: as physics left them.
        objects: names of the task's objects, in the order of the states.
    """
    bodies = torch.from_numpy(states.body_to_world.copy())
    velocities = torch.from_numpy(states.velocities.copy())
    poses = {f"{name}_pose": _pose(bodies[:, len(fr3.LINKS) + i]) for i, name in enumerate(objects)}
    return {
        **poses,
        "tcp_pose": _pose(torch.from_numpy(states.tcp_to_world.copy())),
        "qpos": torch.from_numpy(states.qpos.copy()),
        "qvel": torch.from_numpy(states.qvel.copy()),
        **{f"{name}_velocity": velocities[:, i] for i, name in enumerate(objects)},
    }


def _pose(transform: Tensor) -> Tensor:
    return torch.cat([transform[:, :3, 3], matrix_to_quat(transform[:, :3, :3])], dim=1)
