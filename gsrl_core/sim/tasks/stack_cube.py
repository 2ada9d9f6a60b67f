"""StackCube-v0: ManiSkill's task of this name, judged strictly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gsrl_core.geometry.props import CUBE_HALF
from gsrl_core.sim.objects import TaskObject, cube
from gsrl_core.sim.task import Plan, Task, pose, uniform

RED_CENTER, RED_RANGE = (0.42, 0.16, CUBE_HALF), (0.08, 0.06, 0.0)
GREEN_CENTER, GREEN_RANGE = (0.45, -0.02, CUBE_HALF), (0.07, 0.05, 0.0)
"""Centre +- half range (m)."""
GREEN_COLOR = (0.12, 0.48, 0.16)
CLEARANCE = 0.075
"""Least distance (m) between the centres at the start: fingers fit between the cubes however these are turned."""
OVERLAP = np.hypot(CUBE_HALF, CUBE_HALF) + 0.005
"""ManiSkill's bound of the distance between the axes (m)."""
HEIGHT_ERROR = 0.005
"""ManiSkill's bound of the height difference's error (m)."""


class StackCube(Task):
    """The red cube on the green one. Loosely: ManiSkill's bounds on where it is, which a held cube passes."""

    name = "StackCube-v0"
    instruction = "stack the red cube on the green cube"
    rewordings = (
        "put the red cube on top of the green cube",
        "place the red block on the green block",
        "pick up the red cube and set it down on the green one",
        "make a tower with the red cube above the green cube",
    )
    moved, support = "red_cube", "green_cube"

    def objects(self) -> tuple[TaskObject, ...]:
        """Both cubes."""
        return cube("red_cube"), cube("green_cube", GREEN_COLOR)

    def place(self, rng: np.random.Generator, scale: float) -> Mapping[str, np.ndarray]:
        """Red to the left, green in front of the robot, turned at will."""
        while True:
            red = uniform(rng, RED_CENTER, RED_RANGE, scale)
            green = uniform(rng, GREEN_CENTER, GREEN_RANGE, scale)
            turns = rng.uniform(-np.pi, np.pi, 2)
            if np.linalg.norm(red[:2] - green[:2]) > CLEARANCE:
                return {"red_cube": pose(*red, turns[0]), "green_cube": pose(*green, turns[1])}

    def locate(self, poses: Mapping[str, np.ndarray]) -> tuple[bool, bool]:
        """On top: ManiSkill's ``is_cubeA_on_cubeB``; strictly, the red cube's centre is over the green one's face."""
        offset = poses["red_cube"][:3, 3] - poses["green_cube"][:3, 3]
        on_top = abs(offset[2] - 2 * CUBE_HALF) <= HEIGHT_ERROR
        loosely = bool(on_top and np.hypot(offset[0], offset[1]) <= OVERLAP)
        over_face = np.abs(poses["green_cube"][:3, :3].T @ offset)[:2].max() <= CUBE_HALF
        return bool(loosely and over_face), loosely

    def plan(self) -> Plan:
        """Onto the green cube's top; a cube that fell off it is free again."""
        return Plan("red_cube", "green_cube", 2 * CUBE_HALF, release_within=0.008, settled_within=0.025)
