"""SAPIEN's own pictures: the bodies' triangle meshes drawn by its Vulkan rasteriser, where splats are drawn otherwise.

One scene with visuals and no physics serves all environments: for each of them the bodies are moved and the cameras
take their pictures. The light is the one that is baked into the splats of meshes (:class:`Light`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import sapien
import torch
from sapien import render
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera, to_sapien_pose
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.from_mesh import ColoredMesh, Light
from gsrl_core.splat.scene import Scene

TABLE_COLOR = (0.62, 0.60, 0.57)
"""Of the plane z = 0, sRGB 0 to 1."""
_TABLE_HALF = 3.0
"""Half the side of the square that shows it (m)."""
_SHADERS = Path(sapien.__file__).parent / "vulkan_shader" / "minimal"
"""SAPIEN's pack of shaders that ManiSkill's cameras use too: colour, position and body."""
_FORMATS = {"Color": "r8g8b8a8unorm", "PositionSegmentation": "r16g16b16a16sint"}
"""Of the pack's pictures, as in ManiSkill; new cameras of the process take them."""
_NEAR, _FAR = 0.01, 100.0
"""Distances between which the cameras see (m)."""
_Z, _OWNER = 2, 3
"""Channels of the picture PositionSegmentation: z in OpenGL camera axes (mm) and the entity's id, 0 for none."""


class SapienRasterizer:
    """Draws meshes at the bodies' poses; a :class:`gsrl_core.interfaces.Rasterizer` for which Gaussians do not count.

    The table plane takes the place of the scene's static part.
    """

    def __init__(self, meshes: Mapping[str, ColoredMesh]) -> None:
        """Upload the meshes.

        Args:
            meshes: body name -> its surface in its own frame. Scenes to draw may have these bodies and no others.

        Raises:
            SimulationError: this machine has no Vulkan device that SAPIEN can use.
        """
        self._scene = sapien.Scene([_render_system()])
        self._bodies = {name: self._add(_shape(mesh)) for name, mesh in meshes.items()}
        self._add(_table())
        self._light(Light())
        self._cameras: dict[tuple[str, int, int], render.RenderCameraComponent] = {}

    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment; see :class:`gsrl_core.interfaces.Rasterizer`. Frames are on the CPU.

        Raises:
            SimulationError: the scene has other bodies than the meshes.
        """
        if set(scene.names) != set(self._bodies):
            raise SimulationError(f"the scene has bodies {scene.names}, but there are meshes of {tuple(self._bodies)}")
        bodies = [self._bodies[name] for name in scene.names]
        ids = torch.full((max(e.per_scene_id for e in self._scene.entities) + 1,), -1, dtype=torch.int16)
        for index, body in enumerate(bodies):
            ids[body.per_scene_id] = index
        drawn: dict[str, list[Frames]] = {name: [] for name in cameras}
        for env, poses in enumerate(body_to_world.cpu().numpy()):
            for body, pose in zip(bodies, poses, strict=True):
                body.pose = sapien.Pose(pose)
            for name, camera in cameras.items():
                self._aim(name, camera, env)
            self._scene.update_render()
            for name, camera in cameras.items():
                drawn[name].append(self._take(name, camera, ids if extras else None))
        return {name: _stacked(frames) for name, frames in drawn.items()}

    def _aim(self, name: str, camera: Camera, env: int) -> None:
        """Put SAPIEN's camera where ``camera`` (C = 1 or B) is for one environment."""
        seat = self._camera(name, camera)
        here = camera.select(env if len(camera) > 1 else 0)
        seat.entity.pose = sapien.Pose(to_sapien_pose(here.world_to_camera[0]).cpu().numpy())
        (fx, skew, cx), (_, fy, cy), _ = here.K[0].tolist()
        seat.set_perspective_parameters(_NEAR, _FAR, fx, fy, cx, cy, skew)

    def _take(self, name: str, camera: Camera, ids: Tensor | None) -> Frames:
        """One picture [1, h, w]; with depth, alpha and bodies where ``ids`` tells a body's index by its entity's id."""
        seat = self._camera(name, camera)
        seat.take_picture()
        rgb = torch.from_numpy(seat.get_picture("Color"))[None, ..., :3]
        if ids is None:
            return Frames(rgb)
        seen = torch.from_numpy(seat.get_picture("PositionSegmentation").astype(np.int64))[None]
        owner = seen[..., _OWNER]
        depth = -seen[..., _Z] / 1000
        return Frames(rgb, torch.where(owner > 0, depth, 0.0), (owner > 0).float(), ids[owner])

    def _camera(self, name: str, camera: Camera) -> render.RenderCameraComponent:
        key = (name, camera.width, camera.height)
        if key not in self._cameras:
            for picture, kind in _FORMATS.items():
                render.set_picture_format(picture, kind)
            self._cameras[key] = render.RenderCameraComponent(camera.width, camera.height, str(_SHADERS))
            self._add(self._cameras[key])
        return self._cameras[key]

    def _add(self, component: sapien.Component) -> sapien.Entity:
        entity = sapien.Entity()
        entity.add_component(component)
        self._scene.add_entity(entity)
        return entity

    def _light(self, light: Light) -> None:
        """Hemisphere sky as a constant part and light from above, and the sun, in linear light."""
        above = light.sky * (1 - light.ground) / 2
        self._scene.set_ambient_light([light.sky * light.ground + above] * 3)
        for strength, towards in ((above, (0.0, 0.0, 1.0)), (light.sun, light.sun_direction)):
            # A matt surface reflects 1 / pi of what falls on it.
            self._scene.add_directional_light([-x for x in towards], [np.pi * strength] * 3)


@cache
def _kept_system() -> render.RenderSystem:
    """One that nothing is drawn with: with its last system SAPIEN throws away tables that take a CPU 12 s to make."""
    return render.RenderSystem()


def _render_system() -> render.RenderSystem:
    try:
        _kept_system()
        return render.RenderSystem()
    except RuntimeError as error:
        raise SimulationError(
            f"SAPIEN finds no Vulkan device ({error}). For render_interface 'env' and 'env+gs' install the NVIDIA "
            "driver's Vulkan part, or Mesa's CPU device: `apt-get install libvulkan1 mesa-vulkan-drivers`, of which "
            "version 22 (Debian 12) is too old and 25 will do (there: `-t bookworm-backports`). 'gs' and 'gs_rlinf' "
            "need no Vulkan"
        ) from error


def _shape(mesh: ColoredMesh) -> render.RenderBodyComponent:
    """A mesh in flat facets."""
    texture, uv = _palette(mesh.colors)
    corners = mesh.vertices[mesh.faces].astype(np.float32)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-30)
    material = render.RenderMaterial()
    material.base_color_texture = texture
    body = render.RenderBodyComponent()
    body.attach(
        render.RenderShapeTriangleMesh(
            vertices=corners.reshape(-1, 3),
            triangles=np.arange(3 * len(corners), dtype=np.uint32).reshape(-1, 3),
            normals=normals.repeat(3, axis=0),
            uvs=uv.repeat(3, axis=0),
            material=material,
        )
    )
    return body


def _palette(colors: np.ndarray) -> tuple[render.RenderTexture2D, np.ndarray]:
    """A square texture with a pixel for every colour that occurs, and each face's place in it, float32 [F, 2]."""
    levels = np.round(255 * colors.clip(0, 1)).astype(np.uint8)
    found, index = np.unique(levels, axis=0, return_inverse=True)
    side = int(np.ceil(np.sqrt(len(found))))
    pixels = np.ones((side * side, 4), dtype=np.float32)
    # The shader's picture is the 2.2th root of linear light.
    pixels[: len(found), :3] = (found / 255) ** 2.2
    texture = render.RenderTexture2D(
        pixels.reshape(side, side, 4), "R32G32B32A32Sfloat", filter_mode="nearest", address_mode="edge"
    )
    row, column = np.divmod(index.reshape(-1), side)
    return texture, ((np.column_stack([column, row]) + 0.5) / side).astype(np.float32)


def _table() -> render.RenderBodyComponent:
    corners = _TABLE_HALF * np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    return _shape(ColoredMesh.uniform(corners, np.array([[0, 1, 2], [0, 2, 3]]), TABLE_COLOR))


def _stacked(frames: list[Frames]) -> Frames:
    pictures = [(f.rgb, f.depth, f.alpha, f.body_id) for f in frames]
    return Frames(*(None if kind[0] is None else torch.cat(kind) for kind in zip(*pictures, strict=True)))
