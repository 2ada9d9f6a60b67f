"""PickAndPlace-v0: an object of your choice, from a mesh or from splats, to a mark on the table or onto the plate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import props
from gsrl_core.sim import scanned
from gsrl_core.sim.objects import TABLE, TaskObject, mark, plate
from gsrl_core.sim.task import Plan, Task, pose, uniform

BUNDLED = Path(__file__).parents[2] / "bundled" / "objects" / "can.ply"
GOALS = ("mark", "plate")
OBJECT_CENTER, OBJECT_RANGE = (0.41, 0.19), (0.08, 0.05)
GOAL_CENTER = (0.45, 0.0)
GOAL_RANGES = {"mark": (0.07, 0.05), "plate": (0.05, 0.0)}
"""Centre +- half range (m)."""
MARK_COLOR = (0.10, 0.25, 0.72)
HAND_WIDTH = 0.075
"""Widest that the fingers, 80 mm apart at most, still get around (m)."""
REACH_OVER = 0.035
"""How far an object may stand above the fingertips' middle without touching the palm (m)."""
LOOSE_HEIGHT = 0.07


@dataclass(frozen=True)
class PickAndPlace(Task):
    """Strictly: on the mark with its centre, or wholly within the plate's rim. Loosely: also above it."""

    mesh: str | None = None
    """Mesh file with colours; none: a can that ships with the project, or ``splat`` alone."""
    splat: str | None = None
    """Splat PLY in the same frame, drawn instead of the mesh."""
    parts: str | None = None
    """Mesh file whose connected pieces are convex, for collision; none: the convex hull."""
    noun: str = "can"
    """What the instruction calls it; also the body's name."""
    scale: float = 1.0
    """Metres per unit of the files."""
    mass: float = 0.2
    """kg."""
    friction: float = 1.0
    goal: str = "mark"
    """``mark`` or ``plate``."""
    radius: float = 0.06
    """Of the mark (m)."""

    name = "PickAndPlace-v0"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise SimulationError(f"PickAndPlace: goal {self.goal!r}; allowed: {', '.join(GOALS)}")
        for option in ("scale", "mass", "friction", "radius"):
            if not 0 < getattr(self, option) < float("inf"):
                raise SimulationError(f"PickAndPlace: {option} is {getattr(self, option)}; it must be positive")

    @property
    def moved(self) -> str:
        """The body's name: ``noun`` in one word."""
        return "_".join(self.noun.split())

    @property
    def support(self) -> str:
        """The mark has no body: the table carries what is on it."""
        return TABLE if self.goal == "mark" else "plate"

    @property
    def instruction(self) -> str:
        """Names object and goal."""
        return f"pick up the {self.noun} and put it on the {self._goal_words}"

    @property
    def rewordings(self) -> tuple[str, ...]:
        """The same in other words."""
        return (
            f"place the {self.noun} on the {self._goal_words}",
            f"grab the {self.noun} and set it down on the {self._goal_words}",
            f"move the {self.noun} to the {self._goal_words}",
        )

    def objects(self) -> tuple[TaskObject, ...]:
        """The object and its goal."""
        mesh, splat, parts = (
            None if path is None else Path(path).expanduser() for path in (self.mesh, self.splat, self.parts)
        )
        if mesh is None and splat is None:
            mesh = BUNDLED
        thing = scanned.object_from_file(
            self.moved, mesh, splat=splat, parts=parts, scale=self.scale, mass=self.mass, friction=self.friction
        )
        self._check(thing)
        return thing, mark("mark", self.radius, MARK_COLOR) if self.goal == "mark" else plate()

    def place(self, rng: np.random.Generator, scale: float) -> Mapping[str, np.ndarray]:
        """The object to the left, turned at will; the goal in front of the robot."""
        height, clearance = scanned.half_height(self._thing), self._goal_radius + scanned.radius(self._thing)
        while True:
            start = uniform(rng, (*OBJECT_CENTER, height), (*OBJECT_RANGE, 0.0), scale)
            goal = uniform(rng, (*GOAL_CENTER, self._goal_height), (*GOAL_RANGES[self.goal], 0.0), scale)
            turn = rng.uniform(-np.pi, np.pi)
            if np.linalg.norm(start[:2] - goal[:2]) > clearance:
                return {self.moved: pose(*start, turn), self.goal: pose(*goal)}

    def locate(self, poses: Mapping[str, np.ndarray]) -> tuple[bool, bool]:
        """The object's centre over the goal; for the plate so near its axis that the rim holds all of it."""
        offset = poses[self.moved][:3, 3] - poses[self.goal][:3, 3]
        planar, lift = float(np.hypot(offset[0], offset[1])), float(offset[2] - self._lying_height)
        loosely = planar <= self._inside_radius and -0.01 <= lift <= LOOSE_HEIGHT
        return bool(loosely and lift <= 0.01 and poses[self.goal][2, 2] > 0.97), bool(loosely)

    def plan(self) -> Plan:
        """Across its narrowest piece, at the middle of its height or as high as the palm needs."""
        held = scanned.grasp(self._thing)
        return Plan(
            self.moved,
            self.goal,
            self._lying_height,
            width=held.width,
            turns=held.turns,
            angle=held.angle,
            grasp=(*held.point[:2], max(held.point[2], held.top - REACH_OVER)),
            release_within=min(0.02, self._inside_radius / 2),
            settled_within=self._inside_radius,
        )

    @property
    def _goal_words(self) -> str:
        return "blue mark" if self.goal == "mark" else "plate"

    @property
    def _goal_radius(self) -> float:
        return self.radius if self.goal == "mark" else props.PLATE_RADIUS

    @property
    def _goal_height(self) -> float:
        return 0.0 if self.goal == "mark" else props.PLATE_ORIGIN_HEIGHT

    @property
    def _inside_radius(self) -> float:
        if self.goal == "mark":
            return self.radius
        return props.PLATE_RADIUS - props.PLATE_WALL - scanned.radius(self._thing)

    @property
    def _lying_height(self) -> float:
        floor = 0.0 if self.goal == "mark" else props.PLATE_FLOOR_THICKNESS - props.PLATE_ORIGIN_HEIGHT
        return floor + scanned.half_height(self._thing)

    @property
    def _thing(self) -> TaskObject:
        return self.bodies[0]

    def _check(self, thing: TaskObject) -> None:
        width, reach = scanned.grasp(thing).width, scanned.radius(thing)
        if width > HAND_WIDTH:
            raise SimulationError(
                f"PickAndPlace: the {self.noun} is {1000 * width:.0f} mm wide at its narrowest, the hand holds "
                f"{1000 * HAND_WIDTH:.0f} mm; choose a smaller scale, or turn the mesh"
            )
        room = props.PLATE_FLOOR_RADIUS if self.goal == "plate" else 0.19 - self.radius
        if reach > room:
            raise SimulationError(
                f"PickAndPlace: the {self.noun} reaches {1000 * reach:.0f} mm from its axis, more than the "
                f"{1000 * room:.0f} mm that there are beside or on the {self.goal}; choose a smaller scale"
            )
