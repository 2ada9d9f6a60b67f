"""What the bodies look like as coloured triangle meshes: the source of the robot's splats and of SAPIEN's pictures."""

from __future__ import annotations

import numpy as np

from gsrl_core.geometry.fr3 import LINKS, fr3
from gsrl_core.sim.objects import MeshFile, Painted, TaskObject
from gsrl_core.sim.task import Task
from gsrl_core.splat.from_mesh import ColoredMesh, load_mesh
from gsrl_core.splat.harmonics import C0
from gsrl_core.splat.ply import read_ply

_BOX_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


def body_meshes(task: Task) -> dict[str, ColoredMesh]:
    """Every body of ``task.body_names`` in its own frame.

    Raises:
        SceneError: a mesh or splat file cannot be read.
    """
    return robot_meshes() | {thing.name: object_mesh(thing) for thing in task.bodies}


def robot_meshes() -> dict[str, ColoredMesh]:
    """The FR3's visual meshes, link by link.

    Raises:
        SceneError: a mesh is missing or broken.
    """
    visuals = fr3().visuals
    return {
        link: ColoredMesh.concatenate(
            [load_mesh(visual.mesh).moved(visual.link_from_mesh.numpy(), visual.scale) for visual in visuals[link]]
        )
        for link in LINKS
    }


def object_mesh(thing: TaskObject) -> ColoredMesh:
    """An object's surface in its own frame.

    One that is known by splats alone has none: its collision shape stands for it, in their mean colour.

    Raises:
        SceneError: a file cannot be read.
    """
    if isinstance(thing.look, Painted):
        return ColoredMesh.uniform(*thing.look.mesh, thing.look.color)
    if isinstance(thing.look, MeshFile):
        return load_mesh(thing.look.path).moved(thing.look.mesh_to_body)
    gaussians = read_ply(thing.look.path)
    weights = gaussians.logit_opacities.sigmoid()[:, None]
    mean = 0.5 + C0 * (weights * gaussians.harmonics[:, 0]).sum(0) / weights.sum()
    color = mean.clamp(0, 1).tolist()
    pieces = thing.hulls if thing.box is None else (_BOX_CORNERS * thing.box,)
    return ColoredMesh.concatenate([ColoredMesh.uniform(*_convex_surface(piece), color) for piece in pieces])


def _convex_surface(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and outward triangles [F, 3] of the convex hull of ``points`` [V, 3]."""
    from scipy.spatial import ConvexHull

    hull = ConvexHull(points)
    corners = hull.points[hull.simplices]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    inward = (normals * hull.equations[:, :3]).sum(axis=1) < 0
    faces = hull.simplices.astype(np.int64)
    faces[inward] = faces[inward][:, ::-1]
    return hull.points, faces
