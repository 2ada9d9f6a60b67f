"""The usual objects: one source for their collision shapes (sim) and for their looks (assemble).

Cube and plate rest on the table plane z = 0 when their origin is at z = 0.02 m, which is where the seed's task puts
them: the cube's origin is its centre, the plate's is on its axis, PLATE_ORIGIN_HEIGHT above its underside. A cube that
lies flat on the plate's floor then has its centre 6 mm above the plate's origin, inside the seed's 0 <= dz <= 0.07 m.
"""

from __future__ import annotations

import numpy as np

Mesh = tuple[np.ndarray, np.ndarray]
"""Vertices float64 [V, 3] (m, body frame) and triangles int64 [F, 3], counter-clockwise seen from outside."""

CUBE_HALF = 0.02
"""Half the cube's edge (m)."""
CUBE_COLOR = (0.78, 0.10, 0.08)
"""Red, sRGB 0 to 1."""

PLATE_ORIGIN_HEIGHT = 0.02
"""Height of the plate's origin above its underside (m)."""
PLATE_RADIUS = 0.09
"""Outer radius at the rim (m)."""
PLATE_FLOOR_RADIUS = 0.055
"""Radius of the flat part (m)."""
PLATE_FLOOR_THICKNESS = 0.006
"""Height of the inner floor above the underside (m)."""
PLATE_RIM_HEIGHT = 0.025
"""Height of the rim above the underside (m)."""
PLATE_WALL = 0.004
"""Thickness of the wall at the rim (m)."""
PLATE_COLOR = (0.90, 0.89, 0.86)
"""Off-white, sRGB 0 to 1."""

# (radius, height above the underside) of the sloping wall's cross-section: a convex polygon, counter-clockwise.
_WALL = (
    (PLATE_FLOOR_RADIUS, 0.0),
    (PLATE_RADIUS, PLATE_RIM_HEIGHT - PLATE_WALL),
    (PLATE_RADIUS, PLATE_RIM_HEIGHT),
    (PLATE_RADIUS - PLATE_WALL, PLATE_RIM_HEIGHT),
    (PLATE_FLOOR_RADIUS, PLATE_FLOOR_THICKNESS),
)


def cube_mesh() -> Mesh:
    """The cube, centred at its origin, edges along the axes."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * CUBE_HALF
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    return corners, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def disc_mesh(radius: float, thickness: float = 0.001, segments: int = 32) -> Mesh:
    """A flat round mark: its underside in the plane z = 0, its axis z."""
    _check_segments(segments)
    angle = 2 * np.pi * np.arange(segments) / segments
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bottom, top = (np.column_stack([ring, np.full(segments, z)]) for z in (0.0, thickness))
    return _prism(bottom, top)


def plate_mesh(segments: int = 48) -> Mesh:
    """The plate as a closed surface of revolution about z: flat floor, sloping wall, raised rim (concave).

    Args:
        segments: number of facets around the axis, at least 3.
    """
    _check_segments(segments)
    angle = 2 * np.pi * np.arange(segments) / segments
    rings = np.array([[r * np.cos(angle), r * np.sin(angle), np.full(segments, z)] for r, z in _WALL])
    vertices = rings.transpose(0, 2, 1).reshape(-1, 3)
    below, above = len(vertices), len(vertices) + 1
    vertices = np.concatenate([vertices, [[0, 0, 0], [0, 0, PLATE_FLOOR_THICKNESS]]])
    here, there = np.arange(segments), np.roll(np.arange(segments), -1)
    faces = []
    for ring in range(len(_WALL) - 1):
        a, b = ring * segments, (ring + 1) * segments
        faces += [np.stack([a + here, a + there, b + there], 1), np.stack([a + here, b + there, b + here], 1)]
    top = (len(_WALL) - 1) * segments
    faces += [np.stack([np.full(segments, below), there, here], 1)]
    faces += [np.stack([np.full(segments, above), top + here, top + there], 1)]
    return _lowered(vertices), np.concatenate(faces)


def plate_convex_parts(segments: int = 16) -> list[Mesh]:
    """The plate as ``1 + segments`` convex pieces (floor disc and wall sectors) for rigid-body collision.

    Args:
        segments: number of wall sectors, at least 3.
    """
    _check_segments(segments)
    angle = 2 * np.pi * np.arange(segments + 1) / segments
    section = np.array(_WALL)
    profiles = [np.stack([section[:, 0] * np.cos(a), section[:, 0] * np.sin(a), section[:, 1]], axis=1) for a in angle]
    parts = [_floor_disc(angle[:-1])] + [_prism(profiles[i + 1], profiles[i]) for i in range(segments)]
    return [(_lowered(vertices), faces) for vertices, faces in parts]


def _floor_disc(angle: np.ndarray) -> Mesh:
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1) * PLATE_FLOOR_RADIUS
    bottom, top = (np.column_stack([ring, np.full(len(ring), z)]) for z in (0.0, PLATE_FLOOR_THICKNESS))
    return _prism(bottom, top)


def _prism(first: np.ndarray, second: np.ndarray) -> Mesh:
    """Two congruent convex polygons [P, 3] joined; ``first`` is counter-clockwise seen from ``second``."""
    count = len(first)
    here, there = np.arange(count), np.roll(np.arange(count), -1)
    fan = np.stack([np.zeros(count - 2, dtype=np.int64), here[1:-1], here[2:]], axis=1)
    sides = [np.stack([here, there, count + there], 1), np.stack([here, count + there, count + here], 1)]
    return np.concatenate([first, second]), np.concatenate([fan[:, ::-1], count + fan, *sides])


def _lowered(vertices: np.ndarray) -> np.ndarray:
    return vertices - [0.0, 0.0, PLATE_ORIGIN_HEIGHT]


def _check_segments(segments: int) -> None:
    if segments < 3:
        raise ValueError(f"plate: {segments} segments; a closed ring needs at least 3")
