"""PutCubeOnPlate-v0 in numbers: start states drawn from the episode seed, and what counts as success.

Both the ManiSkill environment and the lean stepper take them from here. Frame: robot base = world, table at z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gsrl_core.geometry import props
from gsrl_core.sim import fr3

TASK = "PutCubeOnPlate-v0"
INSTRUCTION = "pick up the cube and put it on the plate"
BODIES = (*fr3.LINKS, "cube", "plate")
"""Moving bodies, in the order of every pose array of this package."""
MAX_EPISODE_STEPS = 100
SIM_HZ, CONTROL_HZ = 500, 10

# The seed's distributions: centre +- half range (m); both objects upright, not turned.
CUBE_CENTER, CUBE_RANGE = (0.4, 0.2, 0.02), (0.1, 0.05, 0.0)
PLATE_CENTER, PLATE_RANGE = (0.45, 0.0, props.PLATE_ORIGIN_HEIGHT), (0.05, 0.0, 0.0)
QPOS_STD = 0.02
CLEARANCE = props.PLATE_RADIUS + np.sqrt(2) * props.CUBE_HALF + 0.005
"""Least distance (m) between the centres at the start; binds only when a perturbation widens the ranges."""

OBJECT_MASS = 0.3
OBJECT_FRICTION = 1.0
OBJECT_PATCH_RADIUS = 0.1
OBJECT_CONTACT_OFFSET = 0.01
CONTACT_OFFSET = 0.005
SOLVER_POSITION_ITERATIONS, SOLVER_VELOCITY_ITERATIONS = 8, 2
"""The seed has 25 position iterations; at 500 Hz 8 give the same trajectories to less than a millimetre (a test
compares them) in 0.4 of the time."""
BOUNCE_THRESHOLD = 2.0
SLEEP_THRESHOLD = 0.005
TABLE_FRICTION = 0.3
PLATE_SEGMENTS = 16
PLATE_MASS_HEIGHT = 0.008
"""Height of the plate's centre of mass above its underside (m)."""

INSIDE_RADIUS = props.PLATE_RADIUS - props.PLATE_WALL - np.sqrt(2) * props.CUBE_HALF
"""A cube whose centre is this close to the plate's axis lies wholly within the rim, however it is turned (m)."""
REST_SPEED = 0.02
"""Mean linear speed over a control step below which an object is at rest (m/s)."""
REST_SPIN = 0.3
"""Mean angular speed over a control step below which an object is at rest (rad/s)."""
SEED_RADIUS, SEED_HEIGHT = 0.07, 0.07
"""The seed's success: centres within this distance in the plane and this height of each other (m)."""

# Distinguishes the streams that one episode seed feeds (start state here, perturbations in perturb.py).
_START_STREAM = 0


@dataclass(frozen=True)
class EpisodeSpec:
    """All that decides an episode's physics."""

    seed: int
    pose_range_scale: float = 1.0
    """Multiplies the half ranges of the object positions."""
    friction_scale: float = 1.0
    """Multiplies the friction of cube, plate and fingers."""


@dataclass(frozen=True)
class StartState:
    """Where an episode begins."""

    qpos: np.ndarray
    """float64 [9]: joints (rad), fingers (m)."""
    cube: np.ndarray
    """float64 [3]: centre (m)."""
    plate: np.ndarray
    """float64 [3]: origin (m)."""


def start_state(spec: EpisodeSpec) -> StartState:
    """Draw the start from the episode's seed alone (own generator; no global random state is read or written)."""
    rng = np.random.Generator(np.random.PCG64([_START_STREAM, spec.seed]))
    qpos = np.array(fr3.START_QPOS)
    qpos[:7] += rng.normal(0.0, QPOS_STD, 7)
    while True:
        cube = _uniform(rng, CUBE_CENTER, CUBE_RANGE, spec.pose_range_scale)
        plate = _uniform(rng, PLATE_CENTER, PLATE_RANGE, spec.pose_range_scale)
        if np.linalg.norm(cube[:2] - plate[:2]) > CLEARANCE:
            return StartState(qpos, cube, plate)


def _uniform(rng: np.random.Generator, center: tuple, half_range: tuple, scale: float) -> np.ndarray:
    return np.array(center) + scale * np.array(half_range) * rng.uniform(-1.0, 1.0, 3)


@dataclass(frozen=True)
class ObjectState:
    """What the success tests look at, for one environment."""

    cube_position: np.ndarray
    """[3] (m)."""
    plate_position: np.ndarray
    """[3] (m)."""
    plate_up: np.ndarray
    """[3]: the plate's z axis in the world."""
    cube_speed: float
    """Mean over the last control step (m/s), see :func:`mean_speeds`."""
    cube_spin: float
    """Mean over the last control step (rad/s)."""
    cube_on_plate: bool
    """The plate presses on the cube."""
    cube_elsewhere: bool
    """The robot or the table presses on the cube."""


@dataclass(frozen=True)
class Verdict:
    """The parts of success; ``success`` is their conjunction."""

    inside: bool
    """The cube is wholly within the rim, above the plate, and the plate is upright."""
    resting: bool
    """The plate carries the cube."""
    released: bool
    """Neither the robot nor the table touches the cube."""
    still: bool
    """The cube does not move."""
    success_seed: bool
    """The seed's test: near in the plane and in height; also passed by a cube that is held or hovers."""

    @property
    def success(self) -> bool:
        """The cube lies on the plate, released and at rest."""
        return self.inside and self.resting and self.released and self.still


def mean_speeds(before: np.ndarray, after: np.ndarray, seconds: float) -> tuple[float, float]:
    """Linear (m/s) and angular (rad/s) speed between two poses [4, 4].

    Displacement, not PhysX's velocities: the solver reports centimetres per second for bodies that do not move at all
    while they are pinched or pressed.
    """
    turn = after[:3, :3] @ before[:3, :3].T
    # |R - R^T| gives the sine of the angle, the trace its cosine; together they are accurate at every angle.
    sine = np.linalg.norm([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
    angle = np.arctan2(sine, np.trace(turn) - 1)
    return float(np.linalg.norm(after[:3, 3] - before[:3, 3]) / seconds), float(angle / seconds)


def locate(cube_position: np.ndarray, plate_position: np.ndarray, plate_up: np.ndarray) -> tuple[bool, bool]:
    """``inside`` and ``success_seed`` of :class:`Verdict`, from where the objects are; see :class:`ObjectState`."""
    offset = cube_position - plate_position
    planar = float(np.hypot(offset[0], offset[1]))
    above = bool(0.0 <= offset[2] <= SEED_HEIGHT)
    return bool(above and planar <= INSIDE_RADIUS and plate_up[2] > 0.97), bool(above and planar < SEED_RADIUS)


def judge(state: ObjectState) -> Verdict:
    """Apply the strict and the seed's definition of success."""
    inside, success_seed = locate(state.cube_position, state.plate_position, state.plate_up)
    return Verdict(
        inside=inside,
        resting=state.cube_on_plate,
        released=not state.cube_elsewhere,
        still=bool(state.cube_speed < REST_SPEED and state.cube_spin < REST_SPIN),
        success_seed=success_seed,
    )
