"""How a world is stepped: plain data that crosses to the workers without importing SAPIEN in the parent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsrl_core.errors import SimulationError
from gsrl_core.sim import task
from gsrl_core.sim.objects import TaskObject
from gsrl_core.sim.tasks import DEFAULT, load_task

CONTROL_MODES = ("pd_ee_target_delta_pose", "pd_ee_delta_pose", "pd_joint_delta_pos", "pd_joint_pos")


@dataclass(frozen=True)
class WorldSettings:
    """How an environment is stepped."""

    urdf: Path
    """See :func:`gsrl_core.sim.fr3.prepare_urdf`."""
    sim_hz: int = task.SIM_HZ
    control_hz: int = task.CONTROL_HZ
    control_mode: str = CONTROL_MODES[0]
    solver_iterations: int = task.SOLVER_POSITION_ITERATIONS
    """TGS position iterations per simulation step."""
    task: str = DEFAULT
    """See :func:`gsrl_core.sim.tasks.load_task`."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    objects: tuple[TaskObject, ...] = field(init=False)
    """The task's. They travel with the settings, because making them may load meshes, which workers are spared."""

    def __post_init__(self) -> None:
        if self.control_mode not in CONTROL_MODES:
            raise SimulationError(f"control mode {self.control_mode!r}; allowed: {', '.join(CONTROL_MODES)}")
        if self.sim_hz % self.control_hz:
            raise SimulationError(f"sim_hz {self.sim_hz} must be a multiple of control_hz {self.control_hz}")
        played = load_task(self.task, self.task_options)
        task.check_task(played)
        object.__setattr__(self, "objects", played.bodies)

    def load_task(self) -> task.Task:
        """The task with these very objects."""
        played = load_task(self.task, self.task_options)
        played.__dict__["bodies"] = self.objects
        return played

    @property
    def action_dim(self) -> int:
        """See :func:`action_dim`."""
        return action_dim(self.control_mode)


def action_dim(control_mode: str) -> int:
    """Width of an action: pose delta or arm joints, then the gripper."""
    return 7 if "ee" in control_mode else 8
