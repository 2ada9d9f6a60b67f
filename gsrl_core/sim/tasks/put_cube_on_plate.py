"""PutCubeOnPlate-v0, the seed's task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gsrl_core.geometry import props
from gsrl_core.sim.objects import TaskObject, cube, plate
from gsrl_core.sim.task import Plan, Task, pose, uniform

# The seed's distributions: centre +- half range (m); both objects upright, not turned.
CUBE_CENTER, CUBE_RANGE = (0.4, 0.2, 0.02), (0.1, 0.05, 0.0)
PLATE_CENTER, PLATE_RANGE = (0.45, 0.0, props.PLATE_ORIGIN_HEIGHT), (0.05, 0.0, 0.0)
CLEARANCE = props.PLATE_RADIUS + np.sqrt(2) * props.CUBE_HALF + 0.005
"""Least distance (m) between the centres at the start; binds only when a perturbation widens the ranges."""
INSIDE_RADIUS = props.PLATE_RADIUS - props.PLATE_WALL - np.sqrt(2) * props.CUBE_HALF
"""A cube whose centre is this close to the plate's axis lies wholly within the rim, however it is turned (m)."""
SEED_RADIUS, SEED_HEIGHT = 0.07, 0.07
"""The seed's success: centres within this distance in the plane and this height of each other (m)."""
UPRIGHT = 0.97
"""Least cosine between the plate's axis and the vertical."""


class PutCubeOnPlate(Task):
    """Strictly, the cube lies wholly within the rim of the plate; loosely, the seed's test, which hovering passes."""

    name = "PutCubeOnPlate-v0"
    instruction = "pick up the cube and put it on the plate"
    rewordings = (
        "place the cube on the plate",
        "put the red block onto the plate",
        "grab the cube and set it down on the white plate",
        "move the cube to the plate",
    )
    moved, support = "cube", "plate"

    def objects(self) -> tuple[TaskObject, ...]:
        """Red cube, white plate."""
        return cube(), plate()

    def place(self, rng: np.random.Generator, scale: float) -> Mapping[str, np.ndarray]:
        """Cube to the left, plate in front of the robot."""
        while True:
            start = uniform(rng, CUBE_CENTER, CUBE_RANGE, scale)
            goal = uniform(rng, PLATE_CENTER, PLATE_RANGE, scale)
            if np.linalg.norm(start[:2] - goal[:2]) > CLEARANCE:
                return {"cube": pose(*start), "plate": pose(*goal)}

    def locate(self, poses: Mapping[str, np.ndarray]) -> tuple[bool, bool]:
        """Within the rim above the upright plate; within the seed's cylinder."""
        offset = poses["cube"][:3, 3] - poses["plate"][:3, 3]
        planar = float(np.hypot(offset[0], offset[1]))
        above = bool(0.0 <= offset[2] <= SEED_HEIGHT)
        upright = poses["plate"][2, 2] > UPRIGHT
        return bool(above and planar <= INSIDE_RADIUS and upright), bool(above and planar < SEED_RADIUS)

    def plan(self) -> Plan:
        """Onto the plate's floor."""
        return Plan("cube", "plate", props.PLATE_FLOOR_THICKNESS - props.PLATE_ORIGIN_HEIGHT + props.CUBE_HALF)
