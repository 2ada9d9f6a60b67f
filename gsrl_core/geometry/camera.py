"""Pinhole cameras: OpenCV axes (x right, y down, z forward), full intrinsics.

Pixel (row i, column j) has its centre at image coordinates (j + 0.5, i + 0.5): the image plane spans [0, width] x
[0, height], as in COLMAP and gsplat. Scaling an image then scales all of K by the same factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsrl_core.errors import CaptureError
from gsrl_core.geometry.rotation import make_rigid, rigid_inverse, transform_points

# Columns: OpenCV axes written in the other convention's axes.
_OPENGL_FROM_OPENCV = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
_SAPIEN_FROM_OPENCV = ((0.0, 0.0, 1.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0))


@dataclass(frozen=True)
class Camera:
    """C pinhole cameras of one image size."""

    world_to_camera: Tensor
    """float32 [C, 4, 4]: world points to OpenCV camera axes."""
    K: Tensor
    """float32 [C, 3, 3]: intrinsics in pixels, principal point included."""
    width: int
    height: int

    def __post_init__(self) -> None:
        count = self.world_to_camera.shape[0] if self.world_to_camera.ndim == 3 else -1
        if self.world_to_camera.shape != (count, 4, 4) or self.K.shape != (count, 3, 3):
            raise CaptureError(
                f"camera: world_to_camera {tuple(self.world_to_camera.shape)} and K {tuple(self.K.shape)} must be "
                "[C, 4, 4] and [C, 3, 3] with the same C; add a leading axis for a single camera"
            )
        if self.width < 1 or self.height < 1:
            raise CaptureError(f"camera: image size {self.width} x {self.height} must be at least 1 x 1")

    def __len__(self) -> int:
        return self.world_to_camera.shape[0]

    def scaled(self, factor: float) -> Camera:
        """The cameras of images resized by ``factor``; width and height are rounded and K follows the rounded size.

        Raises:
            CaptureError: ``factor`` is not positive.
        """
        if not factor > 0:
            raise CaptureError(f"camera: scale factor {factor} must be positive")
        return self.resized(max(1, round(self.width * factor)), max(1, round(self.height * factor)))

    def resized(self, width: int, height: int) -> Camera:
        """The cameras of the same pictures resized to ``width`` x ``height`` pixels."""
        stretch = self.K.new_tensor([[width / self.width], [height / self.height], [1.0]])
        return replace(self, K=self.K * stretch, width=width, height=height)

    def select(self, index: int | slice | Tensor) -> Camera:
        """The chosen cameras; a single integer keeps the leading axis (C = 1)."""
        if isinstance(index, int):
            return replace(self, world_to_camera=self.world_to_camera[index][None], K=self.K[index][None])
        return replace(self, world_to_camera=self.world_to_camera[index], K=self.K[index])

    def to(self, device: torch.device | str) -> Camera:
        """The same cameras with tensors on ``device``."""
        return replace(self, world_to_camera=self.world_to_camera.to(device), K=self.K.to(device))

    @property
    def centers(self) -> Tensor:
        """Optical centres in the world frame, [C, 3]."""
        return rigid_inverse(self.world_to_camera)[:, :3, 3]

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Image coordinates [C, N, 2] (px) and depths along z [C, N] (m) of world points [N, 3] or [C, N, 3]."""
        in_camera = transform_points(self.world_to_camera, points)
        homogeneous = in_camera @ self.K.transpose(-1, -2)
        depth = in_camera[..., 2]
        return homogeneous[..., :2] / depth[..., None], depth

    def unproject(self, pixels: Tensor, depth: Tensor) -> Tensor:
        """World points [C, N, 3] at image coordinates [C, N, 2] (px) and depths along z [C, N] (m)."""
        homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        rays = homogeneous @ torch.linalg.inv(self.K).transpose(-1, -2)
        return transform_points(rigid_inverse(self.world_to_camera), rays * depth[..., None])


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    """K, float32 [3, 3], from focal lengths and principal point (px)."""
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float32)


def from_sapien(
    position: Sequence[float],
    rotation: Sequence[Sequence[float]],
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    width: int,
    height: int,
) -> Camera:
    """One camera (C = 1) from a SAPIEN pose.

    Args:
        position: optical centre in the world frame (m).
        rotation: 3x3; its columns are the camera's x (forward), y (left) and z (up) axes in the world frame.
        fx: horizontal focal length (px).
        fy: vertical focal length (px).
        cx: horizontal principal point (px).
        cy: vertical principal point (px).
        width: image width (px).
        height: image height (px).

    Raises:
        CaptureError: ``rotation`` is not a rotation matrix (tolerance 1e-3).
    """
    world_from_sapien = _checked_rotation(torch.tensor(rotation, dtype=torch.float64))
    world_from_camera = make_rigid(
        world_from_sapien @ world_from_sapien.new_tensor(_SAPIEN_FROM_OPENCV),
        torch.tensor(position, dtype=torch.float64),
    )
    world_to_camera = rigid_inverse(world_from_camera).float()
    return Camera(world_to_camera[None], intrinsics(fx, fy, cx, cy)[None], width, height)


def sapien_to_world_to_camera(world_from_sapien: Tensor) -> Tensor:
    """world_to_camera [..., 4, 4] (OpenCV axes) from SAPIEN camera poses [..., 4, 4] (x forward, y left, z up)."""
    return rigid_inverse(_turn_axes(world_from_sapien, _SAPIEN_FROM_OPENCV))


def to_sapien_pose(world_to_camera: Tensor) -> Tensor:
    """SAPIEN camera poses [..., 4, 4] (x forward, y left, z up) from world_to_camera [..., 4, 4] (OpenCV axes)."""
    return _turn_axes(rigid_inverse(world_to_camera), tuple(zip(*_SAPIEN_FROM_OPENCV, strict=True)))


def to_opengl_c2w(world_to_camera: Tensor) -> Tensor:
    """Camera-to-world [..., 4, 4] with OpenGL axes (y up, z backward), as nerfstudio and Blender store it."""
    # The axis flip is its own inverse, so OpenGL-from-OpenCV serves in both directions.
    return _turn_axes(rigid_inverse(world_to_camera), _OPENGL_FROM_OPENCV)


def from_opengl_c2w(camera_to_world: Tensor) -> Tensor:
    """world_to_camera [..., 4, 4] (OpenCV axes) from OpenGL camera-to-world [..., 4, 4]."""
    return rigid_inverse(_turn_axes(camera_to_world, _OPENGL_FROM_OPENCV))


def look_at(eye: Tensor, target: Tensor, up: Sequence[float] = (0.0, 0.0, 1.0)) -> Tensor:
    """world_to_camera [..., 4, 4] of cameras at ``eye`` [..., 3] that look at ``target`` [..., 3] with ``up`` upward.

    Raises:
        CaptureError: a viewing direction is parallel to ``up`` or eye and target coincide.
    """
    forward = target - eye
    right = torch.linalg.cross(forward, forward.new_tensor(up).expand_as(forward))
    if (right.norm(dim=-1) < 1e-8 * forward.norm(dim=-1).clamp_min(1.0)).any():
        raise CaptureError("look_at: the viewing direction is zero or parallel to `up`; choose another `up`")
    forward = torch.nn.functional.normalize(forward, dim=-1)
    right = torch.nn.functional.normalize(right, dim=-1)
    down = torch.linalg.cross(forward, right)
    return rigid_inverse(make_rigid(torch.stack([right, down, forward], dim=-1), eye))


def _turn_axes(pose: Tensor, axes: tuple[tuple[float, ...], ...]) -> Tensor:
    return make_rigid(pose[..., :3, :3] @ pose.new_tensor(axes), pose[..., :3, 3])


def _checked_rotation(rotation: Tensor) -> Tensor:
    identity = torch.eye(3, dtype=rotation.dtype)
    proper = rotation.shape == (3, 3) and torch.linalg.det(rotation) > 0
    if not proper or (rotation.T @ rotation - identity).abs().max() > 1e-3:
        raise CaptureError(f"camera: {rotation.tolist()} is not a rotation matrix; its columns must be orthonormal")
    # Published poses are rounded; the nearest rotation keeps later inverses exact.
    u, _, vh = torch.linalg.svd(rotation)
    return u @ vh
