"""Gaussians that look like a coloured triangle mesh: a few flat, opaque discs on its outer surface.

Dense samples of the surface that can be seen from outside are clustered evenly (farthest points, then Lloyd steps in
position, normal and colour), and each cluster becomes the Gaussian with its mean and covariance. Clusters follow edges
and colour boundaries by themselves, so few Gaussians suffice. Light (sky, sun, occlusion) is baked into the colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import KDTree

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import matrix_to_quat
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics

SAMPLES_PER_GAUSSIAN = 40
COVERAGE = 2.3
"""Standard deviation of a disc over that of its cluster; below about 2 the gaps between neighbours show."""
OPACITY = 0.985
FLATNESS = 0.05
"""Smallest thickness of a disc relative to its largest radius."""
LLOYD_STEPS = 3
_VIEWS = 48
"""Directions from which a sample may be seen from outside."""
_GRAZING = 0.4
"""Views at a smaller cosine to the normal are too oblique for the z-buffer's resolution."""
_HIDDEN = 0.05
"""Samples less open than this are inside."""
_BLOCKERS = 40_000


@dataclass(frozen=True)
class ColoredMesh:
    """A triangle mesh with one colour per face."""

    vertices: np.ndarray
    """float64 [V, 3] (m)."""
    faces: np.ndarray
    """int64 [F, 3], counter-clockwise seen from outside."""
    colors: np.ndarray
    """float64 [F, 3], sRGB 0 to 1."""

    def moved(self, transform: np.ndarray, scale: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> ColoredMesh:
        """The mesh scaled along its own axes and then moved by ``transform`` [4, 4]."""
        vertices = (self.vertices * scale) @ transform[:3, :3].T + transform[:3, 3]
        return ColoredMesh(vertices, self.faces, self.colors)

    @staticmethod
    def uniform(vertices: np.ndarray, faces: np.ndarray, color: tuple[float, float, float]) -> ColoredMesh:
        """A mesh of one colour (sRGB 0 to 1)."""
        return ColoredMesh(vertices, faces, np.tile(np.asarray(color, dtype=np.float64), (len(faces), 1)))

    @staticmethod
    def concatenate(meshes: list[ColoredMesh]) -> ColoredMesh:
        """All meshes as one."""
        starts = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
        return ColoredMesh(
            np.concatenate([mesh.vertices for mesh in meshes]),
            np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]),
            np.concatenate([mesh.colors for mesh in meshes]),
        )


@dataclass(frozen=True)
class Light:
    """A sky and a sun; the defaults give indoor light from above and from the camera's side."""

    sun_direction: tuple[float, float, float] = (0.35, -0.45, 0.82)
    """Towards the sun, in the world frame; any length."""
    sun: float = 0.38
    sky: float = 0.62
    """Light of the whole upper half space on a horizontal surface."""
    ground: float = 0.45
    """Light from below relative to the sky's."""


@dataclass(frozen=True)
class SurfaceSamples:
    """S points on the outside of a mesh."""

    points: np.ndarray
    """float64 [S, 3] (m)."""
    normals: np.ndarray
    """float64 [S, 3], unit."""
    colors: np.ndarray
    """float64 [S, 3], 0 to 1."""
    openness: np.ndarray
    """float64 [S], 0 to 1: share of the directions above the surface from which the point is seen."""


def load_mesh(path: Path) -> ColoredMesh:
    """A mesh file that trimesh can read (COLLADA, OBJ, PLY, GLB, STL) with material, face or vertex colours.

    Raises:
        SceneError: unreadable or without triangles.
    """
    import trimesh

    try:
        scene = trimesh.load_scene(path)
        parts = [part for part in scene.dump() if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    except (OSError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise SceneError(f"{path}: not a readable mesh ({type(error).__name__}: {error})") from error
    if not parts:
        raise SceneError(f"{path}: the mesh has no triangles")
    return ColoredMesh.concatenate(
        [ColoredMesh(np.asarray(part.vertices), np.asarray(part.faces), _face_colors(part)) for part in parts]
    )


def gaussians_from_mesh(
    mesh: ColoredMesh,
    count: int,
    *,
    seed: int = 0,
    light: Light | None = None,
    world_from_mesh: np.ndarray | None = None,
) -> Gaussians:
    """``count`` Gaussians (SH degree 0) on the outer surface, in the mesh's frame.

    Args:
        mesh: closed or open, inner parts allowed (they are dropped).
        count: number of Gaussians.
        seed: of the random samples; the same seed gives the same Gaussians.
        light: baked into the colours; none leaves the mesh's own colours.
        world_from_mesh: [4, 4] pose in which the light falls (default: the mesh's frame is the world).

    Raises:
        SceneError: ``count`` is not positive or the mesh has no area.
    """
    if count < 1:
        raise SceneError(f"from_mesh: {count} Gaussians asked for; at least 1")
    samples = sample_outside(mesh, SAMPLES_PER_GAUSSIAN * count, seed)
    if light is not None:
        rotation = np.eye(3) if world_from_mesh is None else world_from_mesh[:3, :3]
        lit = shade(samples.colors, samples.normals @ rotation.T, samples.openness, light)
        samples = SurfaceSamples(samples.points, samples.normals, lit, samples.openness)
    return _discs(samples, _cluster(samples, min(count, len(samples.points))))


def sample_outside(mesh: ColoredMesh, count: int, seed: int) -> SurfaceSamples:
    """About ``count`` points, uniform over the part of the surface that can be seen from outside.

    Raises:
        SceneError: the mesh has no area.
    """
    areas, normals = _areas_and_normals(mesh)
    if not areas.sum() > 0:
        raise SceneError("from_mesh: the mesh has no area")
    rng = np.random.default_rng(seed)
    points, face = _uniform_points(mesh, areas, count, rng)
    blockers, _ = _uniform_points(mesh, areas, max(count, _BLOCKERS), rng)
    # The z-buffer's cells hold six blockers each on average, so that few on a closed surface are empty.
    cell = 2.5 * np.sqrt(areas.sum() / len(blockers))
    openness = _openness(points, normals[face], blockers, cell)
    outside = openness > _HIDDEN
    if not outside.any():
        raise SceneError("from_mesh: no face points outwards; reverse the winding of the triangles")
    chosen = face[outside]
    return SurfaceSamples(points[outside], normals[chosen], mesh.colors[chosen], openness[outside])


def shade(colors: np.ndarray, normals: np.ndarray, openness: np.ndarray, light: Light) -> np.ndarray:
    """Lambertian colours [S, 3] under sun and hemisphere sky, computed in linear light.

    Args:
        colors: [S, 3] sRGB albedo.
        normals: [S, 3] unit, world frame.
        openness: [S] share of the surroundings that is not blocked.
        light: sun and sky.
    """
    sun = np.asarray(light.sun_direction) / np.linalg.norm(light.sun_direction)
    upward = 0.5 + 0.5 * normals[:, 2]
    ambient = light.sky * (light.ground + (1 - light.ground) * upward) * np.sqrt(openness)
    direct = light.sun * np.clip(normals @ sun, 0, None)
    return np.clip(colors**2.2 * (ambient + direct)[:, None], 0, 1) ** (1 / 2.2)


def _areas_and_normals(mesh: ColoredMesh) -> tuple[np.ndarray, np.ndarray]:
    corners = mesh.vertices[mesh.faces]
    doubled = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(doubled, axis=1)
    return 0.5 * length, doubled / length.clip(1e-300)[:, None]


def _uniform_points(
    mesh: ColoredMesh, areas: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points [S, 3] uniform over the surface and the face index [S] of each."""
    face = rng.choice(len(areas), size=count, p=areas / areas.sum())
    u, v = rng.random((2, count))
    fold = u + v > 1  # the unit square folded onto the triangle keeps the density uniform
    u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
    origin, first, second = mesh.vertices[mesh.faces[face]].transpose(1, 0, 2)
    return origin + u[:, None] * (first - origin) + v[:, None] * (second - origin), face


def _openness(points: np.ndarray, normals: np.ndarray, blockers: np.ndarray, cell: float) -> np.ndarray:
    """Share of the viewing directions above each point from which a z-buffer of ``blockers`` does not hide it [S]."""
    seen, faced = np.zeros(len(points)), np.zeros(len(points))
    for direction in _fibonacci_sphere(_VIEWS):
        helper = np.eye(3)[np.argmin(np.abs(direction))]
        right = np.cross(helper, direction)
        right /= np.linalg.norm(right)
        axes = np.stack([right, np.cross(direction, right)], axis=1)
        corner = np.minimum((points @ axes).min(0), (blockers @ axes).min(0))
        pixel, blocked = (np.floor((p @ axes - corner) / cell).astype(np.int64) for p in (points, blockers))
        size = np.maximum(pixel.max(0), blocked.max(0)) + 1
        front = np.full(size, -np.inf)
        np.maximum.at(front, tuple(blocked.T), blockers @ direction)
        cosine = normals @ direction
        facing = np.where(cosine > _GRAZING, cosine, 0.0)
        # A tilted surface spans this much depth within one cell.
        slope = np.sqrt(1 - cosine.clip(_GRAZING, 1) ** 2) / cosine.clip(_GRAZING, 1)
        faced += facing
        seen += facing * (points @ direction > front[tuple(pixel.T)] - cell * (0.5 + 1.5 * slope))
    return seen / faced.clip(1e-9)


def _cluster(samples: SurfaceSamples, count: int) -> np.ndarray:
    """Cluster index [S] of each sample: farthest-point seeds, then Lloyd steps, in (position, normal, colour)."""
    extent = np.ptp(samples.points, axis=0)
    area_scale = np.sqrt((extent[0] * extent[1] + extent[1] * extent[2] + extent[2] * extent[0]) / count)
    features = np.concatenate(
        [samples.points, 0.5 * area_scale * samples.normals, 1.0 * area_scale * samples.colors], axis=1
    ).astype(np.float32)
    seeds = np.empty(count, dtype=np.int64)
    nearest = np.full(len(features), np.inf, dtype=np.float32)
    seeds[0] = 0
    for i in range(1, count):
        offset = features - features[seeds[i - 1]]
        np.minimum(nearest, np.einsum("sd,sd->s", offset, offset), out=nearest)
        seeds[i] = np.argmax(nearest)
    centers = features[seeds]
    label = KDTree(centers).query(features)[1]
    for _ in range(LLOYD_STEPS):
        size = np.bincount(label, minlength=count)
        total = np.stack([np.bincount(label, column, minlength=count) for column in features.T], axis=1)
        centers = np.where(size[:, None] > 0, total / size.clip(1)[:, None], centers)
        label = KDTree(centers).query(features)[1]
    return np.asarray(label)


def _discs(samples: SurfaceSamples, label: np.ndarray) -> Gaussians:
    """One moment-matched Gaussian for each non-empty cluster."""
    _, label, size = np.unique(label, return_inverse=True, return_counts=True)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(label, column) for column in values.T], axis=1) / size[:, None]

    means = mean(samples.points)
    offset = samples.points - means[label]
    covariance = mean((offset[:, :, None] * offset[:, None, :]).reshape(-1, 9)).reshape(-1, 3, 3)
    variances, axes = np.linalg.eigh(covariance)
    axes[:, :, 0] *= np.sign(np.linalg.det(axes))[:, None]  # a rotation, not a reflection
    scales = COVERAGE * np.sqrt(variances.clip(0))
    # A cluster of one or two samples has no extent of its own; it gets a tenth of the usual one.
    largest = np.maximum(scales.max(axis=1), 0.1 * np.median(scales.max(axis=1)) + 1e-6)
    scales = np.maximum(scales, FLATNESS * largest[:, None])
    return Gaussians(
        means=torch.from_numpy(means).float(),
        quats=matrix_to_quat(torch.from_numpy(axes)).float(),
        log_scales=torch.from_numpy(np.log(scales)).float(),
        logit_opacities=torch.logit(torch.full((len(means),), OPACITY)),
        harmonics=colors_to_harmonics(torch.from_numpy(mean(samples.colors)).float()),
    )


def _face_colors(part) -> np.ndarray:  # noqa: ANN001 - trimesh is imported lazily
    visual = part.visual
    if visual.kind == "texture" and getattr(visual.material, "image", None) is None:
        color = np.asarray(visual.material.main_color[:3], dtype=np.float64) / 255
        return np.tile(color, (len(part.faces), 1))
    if visual.kind == "texture":
        visual = visual.to_color()
        return np.asarray(visual.vertex_colors[:, :3], dtype=np.float64)[part.faces].mean(axis=1) / 255
    return np.asarray(visual.face_colors[:, :3], dtype=np.float64) / 255


def _fibonacci_sphere(count: int) -> np.ndarray:
    index = np.arange(count) + 0.5
    z = 1 - 2 * index / count
    azimuth = np.pi * (1 + 5**0.5) * index
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), z], axis=1)
