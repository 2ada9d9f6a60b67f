"""A ray caster for upright boxes and cylinders: textures, Lambert shading, two soft area lights, no acceleration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit, prange

Array = np.ndarray
ROOM, BOX, CYLINDER = 0, 1, 2


@dataclass(frozen=True)
class Solid:
    """One primitive, turned about the vertical only."""

    kind: int
    """ROOM (a box seen from inside), BOX or CYLINDER (radius = half[0])."""
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    faces: tuple[np.ndarray, ...]
    """Textures uint8 [h, w, 3]: -x +x -y +y -z +z of a box, or side and caps of a cylinder."""


@dataclass(frozen=True)
class Packed:
    """Solids as arrays: what the kernels read."""

    shape: np.ndarray
    """float64 [S, 9]: kind, center, half, cos yaw, sin yaw."""
    face: np.ndarray
    """int64 [S, 6, 3]: offset into ``texels``, height, width."""
    texels: np.ndarray
    """float32 [T, 3]: linear light."""


def pack(solids: list[Solid]) -> Packed:
    """Gather shapes and textures; a texture used many times is stored once."""
    shape = np.array([(s.kind, *s.center, *s.half, math.cos(s.yaw), math.sin(s.yaw)) for s in solids], dtype=np.float64)
    face = np.zeros((len(solids), 6, 3), np.int64)
    offsets: dict[int, int] = {}
    parts, total = [], 0
    for row, solid in enumerate(solids):
        for column in range(6):
            texture = solid.faces[column % len(solid.faces)]
            if id(texture) not in offsets:
                offsets[id(texture)] = total
                parts.append(to_linear(texture).reshape(-1, 3))
                total += len(parts[-1])
            face[row, column] = (offsets[id(texture)], *texture.shape[:2])
    return Packed(shape, face, np.concatenate(parts))


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Convert sRGB uint8 to linear light in [0, 1] (IEC 61966-2-1)."""
    value = srgb.astype(np.float32) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB in [0, 1]."""
    value = np.clip(linear, 0, 1)
    return np.where(value <= 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)


@njit(cache=True, inline="always")
def _slabs(
    ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, hx: float, hy: float, hz: float
) -> tuple[float, float, int, int]:
    """Entry and exit distances of a ray through a centred box, and the face codes (0..5) of both."""
    near, far, near_face, far_face = -1e30, 1e30, 0, 0
    for axis in range(3):
        o, d, h = (ox, dx, hx) if axis == 0 else ((oy, dy, hy) if axis == 1 else (oz, dz, hz))
        if abs(d) < 1e-12:
            if abs(o) > h:
                return 1e30, -1e30, 0, 0
            continue
        low, high = (-h - o) / d, (h - o) / d
        low_face, high_face = 2 * axis, 2 * axis + 1
        if low > high:
            low, high = high, low
            low_face, high_face = high_face, low_face
        if low > near:
            near, near_face = low, low_face
        if high < far:
            far, far_face = high, high_face
    return near, far, near_face, far_face


@njit(cache=True, inline="always")
def _cylinder(
    ox: float, oy: float, oz: float, dx: float, dy: float, dz: float, radius: float, hz: float
) -> tuple[float, int]:
    """First hit of a ray with a centred upright cylinder: distance and code (0 side, 4 bottom, 5 top)."""
    best, code = 1e30, 0
    a = dx * dx + dy * dy
    b = ox * dx + oy * dy
    disc = b * b - a * (ox * ox + oy * oy - radius * radius)
    if disc > 0 and a > 1e-12:
        t = (-b - math.sqrt(disc)) / a
        if t > 1e-6 and abs(oz + t * dz) <= hz:
            best = t
    if abs(dz) > 1e-12:
        for side in (-1.0, 1.0):
            t = (side * hz - oz) / dz
            x, y = ox + t * dx, oy + t * dy
            if 1e-6 < t < best and x * x + y * y <= radius * radius:
                best, code = t, 4 if side < 0 else 5
    return best, code


@njit(cache=True)
def _hit(shape: Array, o: Array, d: Array, limit: float) -> tuple[float, int, int]:
    """Nearest solid along a ray: distance, index, face. ``limit`` ends the search."""
    best, index, face = limit, -1, 0
    for s in range(shape.shape[0]):
        c, k = shape[s, 7], shape[s, 8]
        px, py, oz = o[0] - shape[s, 1], o[1] - shape[s, 2], o[2] - shape[s, 3]
        ox, oy = c * px + k * py, -k * px + c * py
        dx, dy = c * d[0] + k * d[1], -k * d[0] + c * d[1]
        if shape[s, 0] == CYLINDER:
            t, code = _cylinder(ox, oy, oz, dx, dy, d[2], shape[s, 4], shape[s, 6])
        else:
            near, far, near_face, far_face = _slabs(ox, oy, oz, dx, dy, d[2], shape[s, 4], shape[s, 5], shape[s, 6])
            if near > far:
                continue
            t, code = (far, far_face) if shape[s, 0] == ROOM else (near, near_face)
        if 1e-6 < t < best:
            best, index, face = t, s, code
    return best, index, face


@njit(cache=True)
def _albedo(
    shape: Array, face_table: Array, texels: Array, s: int, face: int, x: float, y: float, z: float, out: Array
) -> None:
    """Bilinear texture value at local point (x, y, z) of a face, into ``out``."""
    hx, hy, hz = shape[s, 4], shape[s, 5], shape[s, 6]
    if shape[s, 0] == CYLINDER and face == 0:
        u, v = 0.5 + math.atan2(y, x) / (2 * math.pi), 0.5 - z / (2 * hz)
    elif shape[s, 0] == CYLINDER:
        u, v = 0.5 + x / (2 * hx), 0.5 - y / (2 * hx)
    elif face >= 4:
        u, v = 0.5 + x / (2 * hx), 0.5 - y / (2 * hy)
    elif face >= 2:
        u, v = (0.5 + x / (2 * hx) if face == 2 else 0.5 - x / (2 * hx)), 0.5 - z / (2 * hz)
    else:
        u, v = (0.5 - y / (2 * hy) if face == 0 else 0.5 + y / (2 * hy)), 0.5 - z / (2 * hz)
    if shape[s, 0] == ROOM and face < 4:
        u = 1 - u
    slot = (0 if face == 0 else 1) if shape[s, 0] == CYLINDER else face
    offset, height, width = face_table[s, slot, 0], face_table[s, slot, 1], face_table[s, slot, 2]
    column = min(max(u * width - 0.5, 0.0), width - 1.001)
    row = min(max(v * height - 0.5, 0.0), height - 1.001)
    i, j = int(row), int(column)
    fr, fc = row - i, column - j
    i1, j1 = min(i + 1, height - 1), min(j + 1, width - 1)
    for channel in range(3):
        top = texels[offset + i * width + j, channel] * (1 - fc) + texels[offset + i * width + j1, channel] * fc
        low = texels[offset + i1 * width + j, channel] * (1 - fc) + texels[offset + i1 * width + j1, channel] * fc
        out[channel] = top * (1 - fr) + low * fr


@njit(cache=True)
def _normal(shape: Array, s: int, face: int, x: float, y: float, out: Array) -> None:
    """Outward normal in the world (inward for the room)."""
    nx = ny = nz = 0.0
    if shape[s, 0] == CYLINDER and face == 0:
        nx, ny = x / shape[s, 4], y / shape[s, 4]
    elif face < 2:
        nx = -1.0 if face == 0 else 1.0
    elif face < 4:
        ny = -1.0 if face == 2 else 1.0
    else:
        nz = -1.0 if face == 4 else 1.0
    sign = -1.0 if shape[s, 0] == ROOM else 1.0
    c, k = shape[s, 7], shape[s, 8]
    out[0], out[1], out[2] = sign * (c * nx - k * ny), sign * (k * nx + c * ny), sign * nz


@njit(cache=True)
def _shade(
    shape: Array,
    face_table: Array,
    texels: Array,
    lights: Array,
    ambient: float,
    o: Array,
    d: Array,
    jitter: Array,
    out: Array,
) -> None:
    """Light that comes back along a ray, added to ``out``. ``jitter`` [L, 2] picks a point of each area light."""
    t, s, face = _hit(shape, o, d, 1e30)
    if s < 0:
        return
    point = o + t * d
    px, py, z = point[0] - shape[s, 1], point[1] - shape[s, 2], point[2] - shape[s, 3]
    c, k = shape[s, 7], shape[s, 8]
    x, y = c * px + k * py, -k * px + c * py
    albedo, normal, toward = np.empty(3), np.empty(3), np.empty(3)
    _albedo(shape, face_table, texels, s, face, x, y, z, albedo)
    _normal(shape, s, face, x, y, normal)
    # Upward faces see the ceiling, downward ones the floor: a cheap hemisphere instead of bounced light.
    level = ambient * (0.75 + 0.25 * normal[2])
    total = np.full(3, level)
    for light in range(lights.shape[0]):
        for axis in range(3):
            spot = lights[light, axis] + (jitter[light, 0] - 0.5) * lights[light, 3 + axis]
            toward[axis] = spot + (jitter[light, 1] - 0.5) * lights[light, 6 + axis] - point[axis]
        distance = math.sqrt((toward * toward).sum())
        facing = (normal * toward).sum() / distance
        if facing <= 0:
            continue
        _, blocker, _ = _hit(shape, point + 1e-5 * normal, toward / distance, distance - 1e-3)
        if blocker < 0:
            for channel in range(3):
                total[channel] += lights[light, 9 + channel] * facing / (distance * distance)
    for channel in range(3):
        out[channel] += albedo[channel] * total[channel]


@njit(cache=True, parallel=True)
def render(
    shape: Array,
    face_table: Array,
    texels: Array,
    lights: Array,
    ambient: float,
    center: Array,
    rays: Array,
    samples: int,
    seed: int,
) -> Array:
    """Linear picture [h, w, 3] seen from ``center``.

    Args:
        shape: float64 [S, 9] (see Packed); face_table and texels alike.
        face_table: int64 [S, 6, 3].
        texels: float32 [T, 3].
        lights: float64 [L, 12]: centre, two edge vectors, colour times intensity.
        ambient: light from everywhere.
        center: float64 [3] optical centre.
        rays: float64 [samples, samples, h, w, 3] unit directions, a stratum each.
        samples: strata along each image axis.
        seed: of the jitter on the lights.
    """
    height, width = rays.shape[2], rays.shape[3]
    image = np.zeros((height, width, 3))
    for row in prange(height):
        np.random.seed(seed + row)
        jitter = np.empty((lights.shape[0], 2))
        for column in range(width):
            for a in range(samples):
                for b in range(samples):
                    for light in range(lights.shape[0]):
                        jitter[light, 0] = ((a + light) % samples + np.random.random()) / samples
                        jitter[light, 1] = ((b + light) % samples + np.random.random()) / samples
                    _shade(
                        shape,
                        face_table,
                        texels,
                        lights,
                        ambient,
                        center,
                        rays[a, b, row, column],
                        jitter,
                        image[row, column],
                    )
    return image / (samples * samples)
