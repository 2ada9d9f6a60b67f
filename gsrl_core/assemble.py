"""The scene that simulation draws: photographed bench, FR3, cube and plate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3
from gsrl_core.geometry.props import CUBE_COLOR, PLATE_COLOR, cube_mesh, plate_mesh
from gsrl_core.geometry.rotation import make_rigid, rigid_inverse
from gsrl_core.splat.from_mesh import ColoredMesh, Light, gaussians_from_mesh, load_mesh
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import read_ply
from gsrl_core.splat.scene import Scene, save_scene

OBJECT_POSITIONS = {"cube": (0.4, 0.2, 0.02), "plate": (0.45, 0.0, 0.02)}
"""Where the seed's task puts the objects' origins (m, base frame)."""
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
    robot_gaussians: int = 7000,
    cube_gaussians: int = 300,
    plate_gaussians: int = 1000,
    seed: int = 0,
) -> Scene:
    """Put robot and objects into a reconstructed bench and save the Scene folder.

    Args:
        static_ply: the bench's Gaussians in the robot's base frame; none takes the table of ``gsenv``.
        out: folder to write.
        gsenv: folder in the layout of RLinf/gsenv-assets-v0, whose robot and objects are then used; none samples the
            FR3's visual meshes and the project's own cube and plate.
        robot_gaussians: for the whole robot.
        cube_gaussians: for the cube.
        plate_gaussians: for the plate.
        seed: of the surface samples.

    Raises:
        SceneError: a file is missing or broken, or a count is too small.
    """
    if static_ply is None and gsenv is None:
        raise SceneError("assemble: neither a bench (static_ply) nor gsenv assets were given; give at least one")
    static = read_ply(static_ply or _gsenv_root(gsenv) / "object" / "table" / "table_abs.ply")
    if gsenv is None:
        bodies = robot_bodies(robot_gaussians, seed) | object_bodies(cube_gaussians, plate_gaussians, seed)
    else:
        bodies = gsenv_bodies(gsenv)
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
    robot = fr3()
    poses = robot.forward(START_QPOS)
    meshes = {
        link: ColoredMesh.concatenate(
            [load_mesh(v.mesh).moved(v.link_from_mesh.numpy(), v.scale) for v in robot.visuals[link]]
        )
        for link in LINKS
    }
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


def object_bodies(cube_count: int = 300, plate_count: int = 1000, seed: int = 0) -> Bodies:
    """The red cube and the white plate where the seed's task puts them."""
    sources = {
        "cube": (ColoredMesh.uniform(*cube_mesh(), CUBE_COLOR), cube_count),
        "plate": (ColoredMesh.uniform(*plate_mesh(), PLATE_COLOR), plate_count),
    }
    return {
        name: (gaussians_from_mesh(mesh, count, seed=seed, light=Light()), _pose_at(OBJECT_POSITIONS[name]))
        for name, (mesh, count) in sources.items()
    }


def gsenv_bodies(folder: Path) -> Bodies:
    """Robot and objects from a folder in the layout of RLinf/gsenv-assets-v0 (splats in base coordinates at rest).

    The robot's splats were taken at START_QPOS and are moved into the links' own frames. The objects' are centred in x
    and y as RLinf centres them; in z they are set down so that their lowest part rests where this project's collision
    shapes have their underside.

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
    for name, position in OBJECT_POSITIONS.items():
        gaussians = _required(root / "object" / name / "object_3dgs_abs.ply")
        gaussians = gaussians.transformed(identity, -gaussians.means.mean(0))
        if name == "plate":
            gaussians = gaussians.stretched(torch.tensor(PLATE_STRETCH)).transformed(
                identity, torch.tensor(PLATE_SHIFT)
            )
        underside = torch.quantile(gaussians.means[:, 2], 0.01)
        settle = torch.stack([torch.zeros(()), torch.zeros(()), -OBJECT_POSITIONS[name][2] - underside])
        bodies[name] = (gaussians.transformed(identity, settle), _pose_at(position))
    return bodies


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


def _pose_at(position: tuple[float, float, float]) -> Tensor:
    return make_rigid(torch.eye(3), torch.tensor(position))


def _area(mesh: ColoredMesh) -> float:
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(0.5 * np.linalg.norm(normals, axis=1).sum())
