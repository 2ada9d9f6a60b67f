"""The scene that simulation draws: photographed bench, FR3 and the task's objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3
from gsrl_core.geometry.rotation import make_rigid, quat_to_matrix, rigid_inverse
from gsrl_core.sim.looks import object_mesh, robot_meshes
from gsrl_core.sim.objects import SplatFile, TaskObject
from gsrl_core.sim.task import EpisodeSpec, Task
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.from_mesh import ColoredMesh, Light, gaussians_from_mesh
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import read_ply
from gsrl_core.splat.scene import Scene, save_scene

GSENV_OBJECTS = ("cube", "plate")
"""Objects that RLinf/gsenv-assets-v0 has splats of."""
GSENV_UNDERSIDE = -0.02
"""Lowest part of both in their own frames, as in geometry/props.py (m)."""
ROBOT_OFFSET_Z = 0.02
"""The gsenv robot splats were captured this much too low; RLinf adds it when it loads them (m)."""
PLATE_STRETCH = (0.96, 1.0, 0.96)
PLATE_SHIFT = (-0.005, -0.005, 0.0)
"""Hand-measured corrections of the gsenv plate that RLinf applies (its gs_scale, and its offset in m)."""

# Gaussians per area relative to the arm: what the camera sees closely, and what decides a grasp, gets more.
_DETAIL = {"fr3_link7": 1.5, "fr3_hand": 2.5, "fr3_leftfinger": 6.0, "fr3_rightfinger": 6.0}

Bodies = dict[str, tuple[Gaussians, Tensor]]


def assemble_scene(
    static_ply: Path | None,
    out: Path,
    *,
    gsenv: Path | None = None,
    task: Task | None = None,
    robot_gaussians: int = 7000,
    seed: int = 0,
) -> Scene:
    """Put robot and objects into a reconstructed bench and save the Scene folder.

    Args:
        static_ply: the bench's Gaussians in the robot's base frame; none takes the table of ``gsenv``.
        out: folder to write.
        gsenv: folder in the layout of RLinf/gsenv-assets-v0, whose robot, cube and plate are then used; none samples
            the FR3's visual meshes and takes the task's own objects.
        task: whose objects lie on the bench; none is PutCubeOnPlate-v0.
        robot_gaussians: for the whole robot.
        seed: of the surface samples.

    Raises:
        SceneError: a file is missing or broken, or a count is too small.
    """
    if static_ply is None and gsenv is None:
        raise SceneError("assemble: neither a bench (static_ply) nor gsenv assets were given; give at least one")
    static = read_ply(static_ply or _gsenv_root(gsenv) / "object" / "table" / "table_abs.ply")
    objects = object_bodies(task or load_task(), seed)
    bodies = (robot_bodies(robot_gaussians, seed) | objects) if gsenv is None else gsenv_bodies(gsenv, objects)
    scene = Scene.from_parts(static, bodies)
    save_scene(out, scene)
    return scene


def robot_bodies(count: int = 7000, seed: int = 0) -> Bodies:
    """The FR3's links at the start posture, sampled from its visual meshes.

    Raises:
        SceneError: fewer than 20 Gaussians per link asked for, or meshes missing.
    """
    if count < 20 * len(LINKS):
        raise SceneError(f"assemble: {count} Gaussians for the robot; at least {20 * len(LINKS)} are needed")
    poses = fr3().forward(START_QPOS)
    meshes = robot_meshes()
    weights = np.array([_area(meshes[link]) * _DETAIL.get(link, 1.0) for link in LINKS])
    shares = np.maximum(20, np.floor(count * weights / weights.sum())).astype(int)
    return {
        link: (
            gaussians_from_mesh(
                meshes[link], int(share), seed=seed, light=Light(), world_from_mesh=poses[link].double().numpy()
            ),
            poses[link],
        )
        for link, share in zip(LINKS, shares, strict=True)
    }


def object_bodies(task: Task, seed: int = 0) -> Bodies:
    """The task's objects at the centres of their start ranges.

    Raises:
        SceneError: a mesh or splat file cannot be read.
    """
    places = task.start(EpisodeSpec(0, pose_range_scale=0.0)).objects
    return {thing.name: (_splats(thing, seed), _transform(places[thing.name])) for thing in task.bodies}


def _splats(thing: TaskObject, seed: int) -> Gaussians:
    look = thing.look
    if isinstance(look, SplatFile):
        scale = look.mesh_to_body[0, 0]
        return read_ply(look.path).transformed(torch.eye(3), torch.tensor(look.mesh_to_body[:3, 3]), float(scale))
    return gaussians_from_mesh(object_mesh(thing), look.gaussians, seed=seed, light=Light())


def gsenv_bodies(folder: Path, objects: Bodies) -> Bodies:
    """Robot, cube and plate from a folder in the layout of RLinf/gsenv-assets-v0 (splats in base coordinates at rest).

    The robot's splats were taken at START_QPOS and are moved into the links' own frames. The objects' are centred in x
    and y as RLinf centres them; in z they are set down so that their lowest part rests where this project's collision
    shapes have their underside. Further ``objects`` stay what they are.

    Raises:
        SceneError: a file of the layout is missing or broken.
    """
    root = _gsenv_root(folder)
    poses = fr3().forward(START_QPOS)
    identity, lift = torch.eye(3), torch.tensor([0.0, 0.0, ROBOT_OFFSET_Z])
    bodies: Bodies = {}
    for link in LINKS:
        in_base = _required(root / "robot" / "my_franka" / "parts" / f"{link}_3dgs_abs.ply").transformed(identity, lift)
        link_from_base = rigid_inverse(poses[link])
        bodies[link] = (in_base.transformed(link_from_base[:3, :3], link_from_base[:3, 3]), poses[link])
    for name, (own, place) in objects.items():
        bodies[name] = (_gsenv_object(root, name) if name in GSENV_OBJECTS else own, place)
    return bodies


def _gsenv_object(root: Path, name: str) -> Gaussians:
    identity = torch.eye(3)
    gaussians = _required(root / "object" / name / "object_3dgs_abs.ply")
    gaussians = gaussians.transformed(identity, -gaussians.means.mean(0))
    if name == "plate":
        gaussians = gaussians.stretched(torch.tensor(PLATE_STRETCH)).transformed(identity, torch.tensor(PLATE_SHIFT))
    underside = torch.quantile(gaussians.means[:, 2], 0.01)
    settle = torch.stack([torch.zeros(()), torch.zeros(()), GSENV_UNDERSIDE - underside])
    return gaussians.transformed(identity, settle)


def _gsenv_root(folder: Path) -> Path:
    return folder / "assets" if (folder / "assets").is_dir() else folder


def _required(path: Path) -> Gaussians:
    if not path.is_file():
        raise SceneError(
            f"{path} is missing; a gsenv folder has the layout of RLinf/gsenv-assets-v0 (download it again)"
        )
    gaussians = read_ply(path)
    if not len(gaussians):
        raise SceneError(f"{path} holds no Gaussians; download the assets again")
    return gaussians


def _transform(pose: np.ndarray) -> Tensor:
    placed = torch.tensor(pose, dtype=torch.float32)
    return make_rigid(quat_to_matrix(placed[3:]), placed[:3])


def _area(mesh: ColoredMesh) -> float:
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(0.5 * np.linalg.norm(normals, axis=1).sum())
