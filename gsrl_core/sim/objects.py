"""The objects of a task: collision shapes, mass and looks as plain data, and makers of the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import props

TABLE, ROBOT = "table", "robot"
"""Names that contacts report for what is no object."""

Color = tuple[float, float, float]
"""sRGB, 0 to 1."""
_PLATE_SEGMENTS = 16
_PLATE_MASS_HEIGHT = 0.008
"""Height of the plate's centre of mass above its underside (m)."""


@dataclass(frozen=True)
class Painted:
    """A mesh of one colour."""

    mesh: props.Mesh
    color: Color
    gaussians: int
    """How many splats show it."""


@dataclass(frozen=True)
class MeshFile:
    """A mesh file with colours (OBJ, PLY, GLB, COLLADA, STL)."""

    path: Path
    mesh_to_body: np.ndarray
    """[4, 4]: a uniform scale and a shift from the file's frame to the object's."""
    gaussians: int


@dataclass(frozen=True)
class SplatFile:
    """A splat PLY, of a scanned object for example."""

    path: Path
    mesh_to_body: np.ndarray
    """[4, 4]: a uniform scale and a shift from the file's frame to the object's."""


@dataclass(frozen=True)
class TaskObject:
    """A rigid body. Its frame is the one that poses, shapes and splats refer to; z is up when it stands."""

    name: str
    look: Painted | MeshFile | SplatFile
    mass: float
    """kg."""
    inertia: np.ndarray
    """[3]: principal moments (kg m^2)."""
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of mass (m)."""
    axes: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    """Of inertia: quaternion wxyz."""
    box: tuple[float, float, float] | None = None
    """Half sizes (m) of a box about the origin, for collision."""
    hulls: tuple[np.ndarray, ...] = ()
    """Convex pieces for collision: float32 [V, 3] vertices (m) each. A concave object needs several."""
    friction: float = 1.0
    fixed: bool = False
    """Nothing moves it (a mark on the table); shapes are not needed then."""


def box(
    name: str, half: tuple[float, float, float], color: Color, *, mass: float = 0.3, gaussians: int = 300
) -> TaskObject:
    """A box of half sizes ``half`` (m), its origin at its centre."""
    x, y, z = (2 * value for value in half)
    inertia = mass / 12 * np.array([y * y + z * z, x * x + z * z, x * x + y * y])
    corners, faces = props.cube_mesh()
    mesh = (corners / props.CUBE_HALF * half, faces)
    return TaskObject(name, Painted(mesh, color, gaussians), mass, inertia, box=half)


def cube(name: str = "cube", color: Color = props.CUBE_COLOR, *, mass: float = 0.3) -> TaskObject:
    """The project's 40 mm cube."""
    inertia = np.full(3, mass * (2 * props.CUBE_HALF) ** 2 / 6)
    return TaskObject(name, Painted(props.cube_mesh(), color, 300), mass, inertia, box=(props.CUBE_HALF,) * 3)


def plate(name: str = "plate", color: Color = props.PLATE_COLOR, *, mass: float = 0.3) -> TaskObject:
    """The project's plate: concave, 180 mm wide; see :mod:`gsrl_core.geometry.props` for its frame."""
    hulls = tuple(np.asarray(vertices, np.float32) for vertices, _ in props.plate_convex_parts(_PLATE_SEGMENTS))
    return TaskObject(
        name,
        Painted(props.plate_mesh(), color, 1000),
        mass,
        inertia=mass * props.PLATE_RADIUS**2 / np.array([4, 4, 2]),
        center=(0.0, 0.0, _PLATE_MASS_HEIGHT - props.PLATE_ORIGIN_HEIGHT),
        hulls=hulls,
    )


def mark(name: str, radius: float, color: Color) -> TaskObject:
    """A round mark on the table that nothing collides with; its origin is on the table."""
    return TaskObject(name, Painted(props.disc_mesh(radius), color, 500), 1.0, np.ones(3), fixed=True)


def checked(objects: tuple[TaskObject, ...]) -> tuple[TaskObject, ...]:
    """``objects``, if a world can be built of them.

    Raises:
        SimulationError: a name twice or reserved, a mass or moment that is not positive, a free object without shape.
    """
    names = [thing.name for thing in objects]
    if len(set(names)) != len(names) or {TABLE, ROBOT, "static", ""} & set(names):
        raise SimulationError(f"objects {names}: names must be distinct, and none of table, robot, static")
    for thing in objects:
        if not (thing.mass > 0 and (np.asarray(thing.inertia) > 0).all()):
            raise SimulationError(f"object {thing.name!r}: mass {thing.mass} and inertia {thing.inertia} must be > 0")
        if not thing.fixed and thing.box is None and not thing.hulls:
            raise SimulationError(f"object {thing.name!r} has no collision shape; give box or hulls, or make it fixed")
    return objects
