"""Objects from files: a mesh or splats give the looks, and collision shapes are made of them.

Workers make none: settings carry finished objects. The object's frame has its origin in the middle of the bounding box;
the file's z axis points up, lengths are metres after ``scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from gsrl_core.errors import SceneError, SimulationError
from gsrl_core.sim.objects import MeshFile, SplatFile, TaskObject

MOST_VERTICES = 128
"""Of one convex piece; PhysX takes 255, and contacts cost more with more."""
_OPAQUE = 0.3
"""Opacity from which on a splat counts as substance."""
_TRIM = 0.005
"""Share of a scan's splats that may float at either end of each axis."""
_SMALLEST, _LARGEST = 0.005, 0.5


def object_from_file(
    name: str,
    mesh: Path | None,
    *,
    splat: Path | None = None,
    parts: Path | None = None,
    scale: float = 1.0,
    mass: float = 0.2,
    friction: float = 1.0,
    gaussians: int = 1000,
) -> TaskObject:
    """A free rigid body of uniform density.

    Args:
        name: of the body.
        mesh: its surface with colours; none: ``splat`` alone.
        splat: a splat PLY in the frame of ``mesh`` that is drawn instead of it.
        parts: a mesh in the same frame whose connected pieces are each convex (as CoACD and V-HACD write them); none:
            the convex hull of ``mesh``, or of the splats.
        scale: metres per unit of the files.
        mass: kg.
        friction: coefficient.
        gaussians: splats that show ``mesh``.

    Raises:
        SimulationError: no file given, one that cannot be used, or a size of the object that is not on a bench.
    """
    shape = parts or mesh or splat
    if shape is None:
        raise SimulationError(f"object {name!r}: give a mesh or a splat file")
    solids = [scale * piece for piece in _pieces(shape, _stamp(shape), shape == parts)]
    points = np.concatenate(solids)
    low, high = points.min(axis=0), points.max(axis=0)
    size = high - low
    if size.max() > _LARGEST or size.max() < _SMALLEST:
        raise SimulationError(
            f"object {name!r} of {shape} measures {' x '.join(f'{1000 * s:.0f}' for s in size)} mm; choose a scale "
            f"that makes its longest side {1000 * _SMALLEST:.0f} to {1000 * _LARGEST:.0f} mm"
        )
    middle = (low + high) / 2
    mesh_to_body = np.diag([scale, scale, scale, 1.0])
    mesh_to_body[:3, 3] = -middle
    hulls = tuple((solid - middle).astype(np.float32) for solid in solids)
    center, inertia, axes = _mass_properties(hulls, mass)
    if splat is not None:
        look = SplatFile(splat, mesh_to_body)
    else:
        assert mesh is not None  # parts alone show nothing
        look = MeshFile(mesh, mesh_to_body, gaussians)
    return TaskObject(name, look, mass, inertia, center, axes, hulls=hulls, friction=friction)


def half_height(thing: TaskObject) -> float:
    """From the origin down to the lowest point (m)."""
    return -float(min(hull[:, 2].min() for hull in thing.hulls))


def radius(thing: TaskObject) -> float:
    """Of the circle about the z axis that holds the object (m)."""
    return float(max(np.linalg.norm(hull[:, :2], axis=1).max() for hull in thing.hulls))


@dataclass(frozen=True)
class Grasp:
    """How parallel fingers, pointing down, hold an object."""

    point: tuple[float, float, float]
    """Between the fingertips, in the object's frame (m)."""
    width: float
    """Of what they hold (m)."""
    angle: float
    """From the object's y axis to the line between the fingers (rad)."""
    turns: int
    """At how many equally spaced angles they may; 0 for what is round."""
    top: float
    """Height of what they hold above the origin (m)."""


def grasp(thing: TaskObject) -> Grasp:
    """Across the narrowest width, seen from above, of a narrow convex piece near the centre of mass."""
    held = [_grasp_of(hull) for hull in thing.hulls]
    narrow = min(one.width for one in held)
    near = [one for one in held if one.width < 1.5 * narrow]
    return min(near, key=lambda one: float(np.linalg.norm(np.subtract(one.point[:2], thing.center[:2]))))


def _grasp_of(hull: np.ndarray) -> Grasp:
    angles = np.linspace(0, np.pi, 180, endpoint=False)
    widths = np.ptp(hull[:, :2] @ np.stack([-np.sin(angles), np.cos(angles)]), axis=0)
    low, high = hull.min(axis=0).astype(float), hull.max(axis=0).astype(float)
    point, top = tuple(((low + high) / 2).tolist()), float(high[2])
    if widths.max() < 1.1 * widths.min():
        return Grasp(point, float(widths.max()), 0.0, 0, top)
    best = int(np.argmin(widths))
    return Grasp(point, float(widths[best]), float(angles[best]), 2, top)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SimulationError(f"object file {path.absolute()} cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size


@cache
def _pieces(path: Path, stamp: tuple[int, int], separate: bool) -> list[np.ndarray]:
    """Vertices [V, 3] of convex pieces in the file's frame; ``stamp`` tells versions of the file apart."""
    clouds = _connected(path) if separate else [_points(path)]
    return [_hull(cloud, path) for cloud in clouds]


def _points(path: Path) -> np.ndarray:
    from gsrl_core.splat.from_mesh import load_mesh
    from gsrl_core.splat.ply import read_ply

    try:
        if not _is_splat(path):
            return load_mesh(path).vertices
        gaussians = read_ply(path)
    except SceneError as error:
        raise SimulationError(str(error)) from error
    means = gaussians.means[gaussians.logit_opacities.sigmoid() > _OPAQUE].double().numpy()
    if len(means) < 4:
        raise SimulationError(f"{path}: {len(means)} opaque splats; a body needs more")
    low, high = np.quantile(means, (_TRIM, 1 - _TRIM), axis=0)
    return means[((means >= low) & (means <= high)).all(axis=1)]


def _is_splat(path: Path) -> bool:
    with path.open("rb") as stream:
        return path.suffix.lower() == ".ply" and b"f_dc_0" in stream.read(4096)


def _connected(path: Path) -> list[np.ndarray]:
    import trimesh

    from gsrl_core.splat.from_mesh import load_mesh

    mesh = load_mesh(path)
    whole = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    return [np.asarray(piece.vertices) for piece in whole.split(only_watertight=False)]


def _hull(points: np.ndarray, path: Path) -> np.ndarray:
    """The corners of the convex hull, or :data:`MOST_VERTICES` that reach as far in evenly spread directions."""
    from scipy.spatial import ConvexHull, QhullError

    try:
        corners = points[ConvexHull(points).vertices]
    except (QhullError, ValueError) as error:
        raise SimulationError(f"{path}: a piece is flat or empty; collision needs solids") from error
    if len(corners) <= MOST_VERTICES:
        return corners
    k = np.arange(MOST_VERTICES) + 0.5
    polar, azimuth = np.arccos(1 - 2 * k / MOST_VERTICES), np.pi * (1 + 5**0.5) * k
    sphere = np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)])
    # The six ends of the axes come first: the bounding box must not shrink.
    directions = np.concatenate([np.eye(3), -np.eye(3), sphere.T[: MOST_VERTICES - 6]])
    return corners[np.unique(np.argmax(corners @ directions.T, axis=0))]


def _mass_properties(
    hulls: tuple[np.ndarray, ...], mass: float
) -> tuple[tuple[float, float, float], np.ndarray, tuple[float, float, float, float]]:
    """Centre of mass (m), principal moments [3] (kg m^2) and their axes (quaternion wxyz) of uniform convex pieces."""
    from scipy.spatial import ConvexHull
    from scipy.spatial.transform import Rotation

    volume, first, second = 0.0, np.zeros(3), np.zeros((3, 3))
    for hull in hulls:
        inner = hull.mean(axis=0, dtype=np.float64)
        for a, b, c in hull[ConvexHull(hull).simplices].astype(np.float64) - inner:
            # The tetrahedron of a face and the inner point; integrals of x and x x^T over it.
            v = abs(np.dot(a, np.cross(b, c))) / 6
            total = a + b + c
            moment = v / 20 * (np.outer(a, a) + np.outer(b, b) + np.outer(c, c) + np.outer(total, total))
            mean = total / 4
            volume += v
            first += v * (inner + mean)
            second += moment + v * (np.outer(inner, mean) + np.outer(mean, inner) + np.outer(inner, inner))
    center = first / volume
    covariance = mass / volume * (second - volume * np.outer(center, center))
    moments, axes = np.linalg.eigh(np.trace(covariance) * np.eye(3) - covariance)
    axes[:, 0] *= np.sign(np.linalg.det(axes))
    x, y, z, w = Rotation.from_matrix(axes).as_quat()
    return tuple(center.tolist()), moments, (float(w), float(x), float(y), float(z))
