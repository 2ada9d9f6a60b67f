"""Lens distortion: a pinhole picture drawn with a margin, bent to what the lens would show.

The model is OpenCV's (calib3d, k1 k2 p1 p2 k3). With pinhole coordinates x, y = X/Z, Y/Z and r^2 = x^2 + y^2

    x' = x (1 + k1 r^2 + k2 r^4 + k3 r^6) + 2 p1 x y + p2 (r^2 + 2 x^2)
    y' = y (1 + k1 r^2 + k2 r^4 + k3 r^6) + p1 (r^2 + 2 y^2) + 2 p2 x y

and the pixel is K (x', y', 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera
from gsrl_core.sim.passes import passes
from gsrl_core.splat.frames import Frames

_NEWTON_STEPS = 30
_TOLERANCE = 1e-9
"""Largest error of an inverse, in pinhole coordinates: a millionth of a pixel."""
_CHECKS = 16
"""Places between a point and the middle at which the distortion must not fold."""
_ROUNDING = 1e-6
"""Pixels that a sampling position may lie outside without asking for a margin."""


def distort(points: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Where the lens shows pinhole coordinates [..., 2]; ``coefficients`` are k1, k2, p1, p2, k3."""
    k1, k2, p1, p2, k3 = coefficients
    x, y = points.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return torch.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        dim=-1,
    )


def undistort(points: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The inverse of :func:`distort` by Newton's method: pinhole coordinates [..., 2] (float64) of what the lens shows.

    Raises:
        SimulationError: some point has no inverse, because the distortion folds the picture over there.
    """
    seen = points.double()
    found = seen.clone()
    for _ in range(_NEWTON_STEPS):
        error = distort(found, coefficients) - seen
        if error.abs().max() < _TOLERANCE / 100:
            break
        (a, b, d), determinant, _ = _slopes(found, coefficients)
        step = torch.stack([d * error[..., 0] - b * error[..., 1], a * error[..., 1] - b * error[..., 0]], dim=-1)
        found = found - step / determinant[..., None]
    good = (distort(found, coefficients) - seen).abs().amax(-1) < _TOLERANCE
    # A fold on the way would let Newton's method arrive at another point that is shown at the same place.
    for i in range(1, _CHECKS + 1):
        _, determinant, radial = _slopes(found * (i / _CHECKS), coefficients)
        good &= (determinant > 0) & (radial > 0)
    if not good.all():
        raise SimulationError(
            f"camera distortion {tuple(coefficients)} folds the picture before its border; check the order k1, k2, p1, "
            "p2, k3 and that the coefficients belong to this focal length"
        )
    return found


class Lens:
    """One camera with distortion: the pinhole camera to draw instead, and the way from its picture to the lens's."""

    def __init__(self, camera: Camera, coefficients: Sequence[float]) -> None:
        """Precompute the way.

        Args:
            camera: size and intrinsics of the lens's own picture (C = 1).
            coefficients: k1, k2, p1, p2, k3.

        Raises:
            SimulationError: the distortion folds the picture.
        """
        focal, center = (camera.K[0].double()[:2].diagonal(), camera.K[0].double()[:2, 2])
        pinhole = undistort((pixel_centers(camera.width, camera.height) - center) / focal, coefficients)
        self.rays = pinhole.float()
        """float32 [h, w, 2]: X/Z and Y/Z that each pixel sees."""
        pixels = pinhole * focal + center
        size = (camera.width, camera.height)
        # Bilinear sampling needs a pixel centre on either side, and the first and last ones are half a pixel inside.
        low = [max(0, math.ceil(0.5 - float(pixels[..., i].min()) - _ROUNDING)) for i in (0, 1)]
        high = [max(0, math.ceil(float(pixels[..., i].max()) + 0.5 - size[i] - _ROUNDING)) for i in (0, 1)]
        self._margin = torch.tensor(low)
        self.width, self.height = (size[i] + low[i] + high[i] for i in (0, 1))
        drawn = pixels.new_tensor([self.width, self.height])
        self._grid = (2 * (pixels + self._margin) / drawn - 1).float()[None]

    def pinhole(self, camera: Camera) -> Camera:
        """``camera`` (C poses of the lens's camera) without distortion and large enough for every pixel."""
        K = camera.K.clone()
        K[:, :2, 2] += self._margin.to(K)
        return replace(camera, K=K, width=self.width, height=self.height)

    def bend(self, picture: Tensor, *, nearest: bool = False) -> Tensor:
        """What the lens shows of the pinhole's ``picture``.

        Args:
            picture: [b, H, W] or [b, H, W, C] of any type; whole numbers are rounded.
            nearest: take the nearest pixel instead of mixing four, for what cannot be mixed.

        Returns:
            [b, h, w] or [b, h, w, C] of the same type.
        """
        self._grid = self._grid.to(picture.device)
        with_channels = picture if picture.ndim == 4 else picture[..., None]
        channels = with_channels.shape[-1]
        out = picture.new_empty(len(picture), *self._grid.shape[1:3], channels)
        for part in passes(picture, self.width * self.height * channels):
            source = with_channels[part].permute(0, 3, 1, 2).float()
            bent = torch.nn.functional.grid_sample(
                source,
                self._grid.expand(len(source), -1, -1, -1),
                mode="nearest" if nearest else "bilinear",
                padding_mode="border",
                align_corners=False,
            ).permute(0, 2, 3, 1)
            out[part] = bent if picture.is_floating_point() else bent.round().to(picture.dtype)
        return out if picture.ndim == 4 else out[..., 0]

    def bend_frames(self, frames: Frames) -> Frames:
        """All pictures of one camera. Depth and body id are not mixed: between two surfaces there is none."""
        return Frames(
            rgb=self.bend(frames.rgb),
            depth=None if frames.depth is None else self.bend(frames.depth, nearest=True),
            alpha=None if frames.alpha is None else self.bend(frames.alpha),
            body_id=None if frames.body_id is None else self.bend(frames.body_id, nearest=True),
        )


def pixel_centers(width: int, height: int) -> Tensor:
    """Image coordinates of all pixel centres, float64 [h, w, 2] (px)."""
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def pinhole_rays(camera: Camera) -> Tensor:
    """X/Z and Y/Z that each pixel of a pinhole camera (C = 1) sees, float32 [h, w, 2]."""
    focal, center = camera.K[0].double()[:2].diagonal(), camera.K[0].double()[:2, 2]
    return ((pixel_centers(camera.width, camera.height) - center) / focal).float()


def _slopes(points: Tensor, coefficients: Sequence[float]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    # dx'/dx, dx'/dy = dy'/dx and dy'/dy; their determinant; the radial factor.
    k1, k2, p1, p2, k3 = coefficients
    x, y = points.unbind(-1)
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    growth = k1 + r2 * (2 * k2 + r2 * 3 * k3)
    a = radial + 2 * x * x * growth + 2 * p1 * y + 6 * p2 * x
    b = 2 * x * y * growth + 2 * p1 * x + 2 * p2 * y
    d = radial + 2 * y * y * growth + 6 * p1 * y + 2 * p2 * x
    return (a, b, d), a * d - b * b, radial
