"""The environment's cameras: fixed in the base frame or carried by a link, moved by an episode's disturbance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera, from_sapien
from gsrl_core.geometry.rotation import rigid_inverse
from gsrl_core.sections import CameraConfig
from gsrl_core.sim.fr3 import LINKS
from gsrl_core.sim.lens import Lens, pinhole_rays
from gsrl_core.sim.supersample import averaged
from gsrl_core.splat.frames import Frames


class CameraRig:
    """All cameras of B environments.

    What is drawn (:meth:`cameras`) need not be what is seen (:meth:`finished`): a camera with lens distortion is drawn
    as a larger pinhole and bent afterwards, and every camera may be drawn with more pixels that are averaged.
    """

    def __init__(self, configs: Sequence[CameraConfig], downscale: int, supersample: int = 1) -> None:
        """Build the rig.

        Args:
            configs: at least one camera, names distinct.
            downscale: pictures are 1/n of the configured size, intrinsics scaled to match.
            supersample: they are drawn n times as large as that on each side and averaged.

        Raises:
            SimulationError: no camera, a name twice, a link that the robot does not have, or a distortion that cannot
                be drawn.
        """
        names = [config.name for config in configs]
        if not names or len(set(names)) != len(names):
            raise SimulationError(f"cameras {names}: at least one is needed and every name only once")
        seen = {config.name: _camera(config).scaled(1 / downscale) for config in configs}
        # Coefficients act on coordinates without a unit, so they are the same at every size.
        self._lenses = {c.name: Lens(seen[c.name], c.distortion) for c in configs if c.distortion and any(c.distortion)}
        self._seen = seen
        self._supersample = supersample
        self._resting = {
            name: (self._lenses[name].pinhole(camera) if name in self._lenses else camera).scaled(supersample)
            for name, camera in seen.items()
        }
        self._mounts = {config.name: _body(config) for config in configs if config.link is not None}

    @property
    def first(self) -> str:
        """Name of the camera that videos show."""
        return next(iter(self._resting))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Camera name -> (height, width) of the finished pictures in pixels."""
        return {name: (camera.height, camera.width) for name, camera in self._seen.items()}

    def drawn_pixels(self) -> int:
        """Pixels that are drawn for one environment: of all cameras, enlarged by the supersampling."""
        return sum(camera.height * camera.width for camera in self._resting.values())

    def rays(self) -> dict[str, Tensor]:
        """Camera name -> X/Z and Y/Z in camera axes for each pixel of the finished pictures, float32 [h, w, 2]."""
        return {
            name: self._lenses[name].rays if name in self._lenses else pinhole_rays(camera)
            for name, camera in self._seen.items()
        }

    def finished(self, name: str, frames: Frames) -> Frames:
        """What camera ``name`` shows of what was drawn for it; the same object for a pinhole drawn at its own size."""
        reduced = averaged(frames, self._supersample)
        return self._lenses[name].bend_frames(reduced) if name in self._lenses else reduced

    def cameras(self, body_to_world: Tensor, motion: Tensor) -> dict[str, Camera]:
        """The pinhole cameras to draw now.

        Args:
            body_to_world: float32 [b, M, 4, 4], bodies in the order of ``task.body_names``.
            motion: float32 [b, 4, 4], applied after world_to_camera (``perturb.Episode.camera_turn``).

        Returns:
            A camera with leading size 1 where it is the same for all environments, else b.
        """
        moved = bool((motion != torch.eye(4)).any())
        return {name: self._now(name, body_to_world, motion if moved else None) for name in self._resting}

    def _now(self, name: str, body_to_world: Tensor, motion: Tensor | None) -> Camera:
        camera = self._resting[name]
        if name not in self._mounts and motion is None:
            return camera
        pose = camera.world_to_camera
        if name in self._mounts:
            # At rest the pose is relative to the link.
            pose = pose @ rigid_inverse(body_to_world[:, self._mounts[name]])
        if motion is not None:
            pose = motion @ pose
        return Camera(pose.contiguous(), camera.K.expand(len(pose), 3, 3), camera.width, camera.height)


def _camera(config: CameraConfig) -> Camera:
    return from_sapien(
        config.position, config.rotation, config.fx, config.fy, config.cx, config.cy, config.width, config.height
    )


def _body(config: CameraConfig) -> int:
    if config.link not in LINKS:
        raise SimulationError(f"camera {config.name!r}: link {config.link!r}; allowed: {', '.join(LINKS)}")
    return LINKS.index(config.link)  # every task's bodies begin with the links
