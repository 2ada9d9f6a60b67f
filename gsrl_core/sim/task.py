"""What a task is: its objects, where an episode starts, what counts as success, and how the scripted expert does it.

A task is one file with a subclass of :class:`Task`, read by the lean stepper, by the ManiSkill environment and by what
assembles the scene; ``tasks/`` has those of the project, docs/your_own_task.md shows one of your own. Imports stay
light here and there: physics workers load both. Frame: robot base = world, table at z = 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gsrl_core.errors import SimulationError
from gsrl_core.sim import fr3
from gsrl_core.sim.objects import TABLE, MeshFile, SplatFile, TaskObject, checked

if TYPE_CHECKING:
    from torch import Tensor

MAX_EPISODE_STEPS = 100
SIM_HZ, CONTROL_HZ = 500, 10
QPOS_STD = 0.02

OBJECT_PATCH_RADIUS = 0.1
OBJECT_CONTACT_OFFSET = 0.005
CONTACT_OFFSET = 0.005
SOLVER_POSITION_ITERATIONS, SOLVER_VELOCITY_ITERATIONS = 6, 1
"""The seed has 25 position iterations; at 500 Hz 6 give the same trajectories to less than a millimetre (a test
compares them) in a third of the time."""
BOUNCE_THRESHOLD = 2.0
SLEEP_THRESHOLD = 0.005
TABLE_FRICTION = 0.3

REST_SPEED = 0.02
"""Mean linear speed over a control step below which an object is at rest (m/s)."""
REST_SPIN = 0.3
"""Mean angular speed over a control step below which an object is at rest (rad/s)."""

# Distinguishes the streams that one episode seed feeds (start state here, perturbations in perturb.py).
_START_STREAM = 0


@dataclass(frozen=True)
class EpisodeSpec:
    """All that decides an episode's physics."""

    seed: int
    pose_range_scale: float = 1.0
    """Multiplies the half ranges of the object positions."""
    friction_scale: float = 1.0
    """Multiplies the friction of objects and fingers."""


@dataclass(frozen=True)
class StartState:
    """Where an episode begins."""

    qpos: np.ndarray
    """float64 [9]: joints (rad), fingers (m)."""
    objects: Mapping[str, np.ndarray]
    """Object -> float64 [7]: position (m), quaternion wxyz; see :func:`pose`."""


@dataclass(frozen=True)
class ObjectsNow:
    """What success is judged from, for one environment."""

    poses: Mapping[str, np.ndarray]
    """Object -> world_from_object [4, 4]."""
    speeds: Callable[[str], tuple[float, float]]
    """Mean linear (m/s) and angular (rad/s) speed of an object over the last control step, see :func:`mean_speeds`."""
    pressing: Callable[[str], frozenset[str]]
    """What presses on an object: names of other objects, ``table``, ``robot``. Costs as much as the rest together."""


@dataclass(frozen=True)
class Verdict:
    """The parts of success; ``success`` is their conjunction."""

    inside: bool
    """The object is where the task wants it."""
    resting: bool
    """What it is to lie on carries it."""
    released: bool
    """Nothing else touches it."""
    still: bool
    """It does not move."""
    success_seed: bool
    """The looser test that is reported beside success; that of PutCubeOnPlate is the seed's."""

    @property
    def success(self) -> bool:
        """The object lies where it belongs, released and at rest."""
        return self.inside and self.resting and self.released and self.still


@dataclass(frozen=True)
class Plan:
    """What the scripted expert (expert.py) does: pick an object up and lay it down on another."""

    pick: str
    """The object to carry."""
    onto: str
    """The object, or mark, on whose axis it is laid down."""
    height: float
    """Of the carried object's origin above that of ``onto`` when it lies there (m)."""
    width: float = 0.04
    """Distance between the fingers that hold it (m)."""
    turns: int = 4
    """The hand may grasp it at this many equally spaced angles; 0 at any."""
    angle: float = 0.0
    """About z from the object's y axis to the line between the fingers (rad)."""
    grasp: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Where the point between the fingertips is in its frame (m)."""
    release_within: float = 0.02
    """The hand opens when the axes are this close (m)."""
    settled_within: float = 0.045
    """A free object this close to the axis was laid down there and is left alone (m)."""


class Task(ABC):
    """One task. Options are the fields of a subclass that is a frozen dataclass (``sim.task_options``)."""

    name: str
    """Such as ``StackCube-v0``; the gym id is ``GSEnv-`` and this."""
    instruction: str
    """What the policy is told."""
    rewordings: tuple[str, ...] = ()
    """Other ways to say it, for the sweep's cell ``wording``; without any that cell keeps the instruction."""
    moved: str
    """The object that success is about."""
    support: str = TABLE
    """What carries it at the end: an object, or ``table``."""

    @abstractmethod
    def objects(self) -> tuple[TaskObject, ...]:
        """Make the objects, in the order of pose arrays (after the robot's links)."""

    @abstractmethod
    def place(self, rng: np.random.Generator, scale: float) -> Mapping[str, np.ndarray]:
        """Draw where the objects start: object -> :func:`pose`.

        Args:
            rng: the episode's own generator; nothing else may be random.
            scale: multiplies the half ranges (1 is nominal).
        """

    @abstractmethod
    def locate(self, poses: Mapping[str, np.ndarray]) -> tuple[bool, bool]:
        """``inside`` and ``success_seed`` of :class:`Verdict` from world_from_object [4, 4] alone."""

    @abstractmethod
    def plan(self) -> Plan:
        """What the scripted expert does."""

    @cached_property
    def bodies(self) -> tuple[TaskObject, ...]:
        """The objects, made once; in physics workers those that the parent made. Raises SimulationError."""
        return checked(self.objects())

    def start(self, spec: EpisodeSpec) -> StartState:
        """Draw the start from the episode's seed alone (own generator; no global random state is read or written)."""
        rng = np.random.Generator(np.random.PCG64([_START_STREAM, spec.seed]))
        qpos = np.array(fr3.START_QPOS)
        qpos[:7] += rng.normal(0.0, QPOS_STD, 7)
        return StartState(qpos, self.place(rng, spec.pose_range_scale))

    def judge(self, now: ObjectsNow, *, complete: bool = True) -> Verdict:
        """Strict success: in its place, carried by ``support`` and touched by nothing else, at rest.

        Args:
            now: the objects.
            complete: if false, the costly parts (``resting``, ``released``, ``still``) are left false unless the object
                is in its place: where it is not, they cannot make a success.
        """
        inside, loosely = self.locate(now.poses)
        if not inside and not complete:
            return Verdict(False, False, False, False, loosely)
        pressing = now.pressing(self.moved)
        speed, spin = now.speeds(self.moved)
        return Verdict(
            inside=inside,
            resting=self.support in pressing,
            released=not pressing - {self.support},
            still=speed < REST_SPEED and spin < REST_SPIN,
            success_seed=loosely,
        )

    def expert(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """``VecEnv.privileged()`` -> actions float32 [B, 7] of ``pd_ee_target_delta_pose``; follows :meth:`plan`."""
        from gsrl_core.sim.expert import Expert  # torch, which workers do without

        return Expert(self.plan()).act

    def files(self) -> tuple[Path, ...]:
        """Files that decide what the task is; caches know their bytes."""
        looks = [thing.look for thing in self.bodies]
        return tuple(look.path for look in looks if isinstance(look, MeshFile | SplatFile))


def check_task(task: Task) -> None:
    """See that the parts of a task fit together.

    Raises:
        SimulationError: an impossible object, or a name in the task's start, success or plan that no object has.
    """
    names = [thing.name for thing in task.bodies]
    plan, placed = task.plan(), set(task.start(EpisodeSpec(0)).objects)
    if placed != set(names):
        raise SimulationError(f"task {task.name}: place() gives {sorted(placed)}, the objects are {names}")
    for what, name in (("moved", task.moved), ("plan().pick", plan.pick), ("plan().onto", plan.onto)):
        if name not in names:
            raise SimulationError(f"task {task.name}: {what} is {name!r}, the objects are {names}")
    if task.support not in (*names, TABLE):
        raise SimulationError(f"task {task.name}: support is {task.support!r}; allowed: {', '.join(names)}, {TABLE}")


def body_names(task: Task) -> tuple[str, ...]:
    """Moving bodies in the order of every pose array of this package: the robot's links, then the objects."""
    return (*fr3.LINKS, *(thing.name for thing in task.bodies))


def pose(x: float, y: float, z: float, yaw: float = 0.0) -> np.ndarray:
    """An upright object at x, y, z (m), turned by ``yaw`` (rad) about z: float64 [7], position and quaternion wxyz."""
    return np.array([x, y, z, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])


def uniform(rng: np.random.Generator, center: tuple, half_range: tuple, scale: float) -> np.ndarray:
    """A position [3] (m), uniform within ``center`` +- ``scale`` x ``half_range``."""
    return np.array(center) + scale * np.array(half_range) * rng.uniform(-1.0, 1.0, 3)


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
