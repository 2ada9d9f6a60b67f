"""The readable rasteriser: plain torch, differentiable, every pixel against every Gaussian.

It specifies what the fast rasterisers must draw (values and gradients); memory grows with pixels x Gaussians, so it is
for small scenes. Formulas: EWA splatting (Zwicker et al. 2001) as used by 3D Gaussian Splatting (Kerbl et al. 2023),
with the constants of gsplat.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gsrl_core.geometry.rotation import quat_to_matrix, transform_points
from gsrl_core.splat.constants import (
    ALPHA_MAX,
    ALPHA_MIN,
    EPS2D,
    FAR_PLANE,
    FRUSTUM_MARGIN,
    NEAR_PLANE,
    TRANSMITTANCE_MIN,
)
from gsrl_core.splat.harmonics import sh_colors


class Projection(NamedTuple):
    """N Gaussians seen by one camera."""

    means2d: Tensor
    """[N, 2] image coordinates of the centres (px); pixel (i, j) has its centre at (j + 0.5, i + 0.5)."""
    covariances2d: Tensor
    """[N, 2, 2] in the image, low-pass included (px^2)."""
    depths: Tensor
    """[N] along the camera's z axis (m)."""
    visible: Tensor
    """bool [N]: between the near and far plane."""


def rasterize_reference(
    means: Tensor,
    quats: Tensor,
    log_scales: Tensor,
    logit_opacities: Tensor,
    harmonics: Tensor,
    world_to_camera: Tensor,
    K: Tensor,
    width: int,
    height: int,
    background: Tensor,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Draw Gaussians for one camera.

    Args:
        means: [N, 3] centres in the world frame (m).
        quats: [N, 4] wxyz, any non-zero length.
        log_scales: [N, 3] logarithms of the standard deviations (m).
        logit_opacities: [N].
        harmonics: [N, K, 3].
        world_to_camera: [4, 4], OpenCV axes.
        K: [3, 3] intrinsics (px).
        width: image width (px).
        height: image height (px).
        background: [3] colour behind everything.

    Returns:
        rgb [height, width, 3] with the background added (premultiplied: ``sum_i w_i c_i + (1 - alpha) background``),
        alpha [height, width], depth [height, width] (m, mean along z of what was hit, weighted by ``w_i``; 0 where
        nothing was), and ``info`` with the fields of :class:`Projection`.
    """
    seen = project(means, quats, log_scales, world_to_camera, K, width, height)
    center = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
    colors = sh_colors(harmonics, means - center)

    order = torch.argsort(seen.depths.detach(), stable=True)
    order = order[seen.visible[order]]
    alpha = _pixel_alphas(
        seen.means2d[order], seen.covariances2d[order], torch.sigmoid(logit_opacities[order]), width, height
    )
    weights = _compositing_weights(alpha)
    total = weights.sum(-1)
    rgb = weights @ colors[order] + (1 - total)[:, None] * background
    depth = weights @ seen.depths[order] / total.clamp_min(1e-10)
    shape = (height, width)
    return rgb.reshape(*shape, 3), total.reshape(shape), depth.reshape(shape), seen._asdict()


def project(
    means: Tensor, quats: Tensor, log_scales: Tensor, world_to_camera: Tensor, K: Tensor, width: int, height: int
) -> Projection:
    """EWA projection of N Gaussians: ``J W Sigma W^T J^T + EPS2D I`` (arguments as in :func:`rasterize_reference`)."""
    in_camera = transform_points(world_to_camera, means)
    x, y, depths = in_camera.unbind(-1)
    visible = (depths >= NEAR_PLANE) & (depths <= FAR_PLANE)
    z = torch.where(visible, depths, torch.ones_like(depths))  # keeps gradients finite behind the camera
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)

    # The linearisation explodes far outside the image: it is taken at the nearest point of an enlarged frustum.
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    tx = z * torch.clamp(x / z, -cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = z * torch.clamp(y / z, -cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [torch.stack([fx / z, zero, -fx * tx / z**2], -1), torch.stack([zero, fy / z, -fy * ty / z**2], -1)], dim=-2
    )
    axes = quat_to_matrix(quats) * log_scales.exp()[:, None, :]
    screen_axes = jacobian @ world_to_camera[:3, :3] @ axes
    low_pass = EPS2D * torch.eye(2, dtype=means.dtype, device=means.device)
    return Projection(means2d, screen_axes @ screen_axes.transpose(-1, -2) + low_pass, depths, visible)


def _pixel_alphas(means2d: Tensor, covariances2d: Tensor, opacities: Tensor, width: int, height: int) -> Tensor:
    """Coverage [height * width, N] of each pixel centre by each Gaussian, zero below ALPHA_MIN."""
    rows = torch.arange(height, dtype=means2d.dtype, device=means2d.device) + 0.5
    columns = torch.arange(width, dtype=means2d.dtype, device=means2d.device) + 0.5
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 1, 2)
    offset = pixels - means2d
    conic = torch.linalg.inv(covariances2d)
    sigma = 0.5 * torch.einsum("pni,nij,pnj->pn", offset, conic, offset)
    alpha = (opacities * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
    return torch.where(alpha >= ALPHA_MIN, alpha, torch.zeros_like(alpha))


def _compositing_weights(alpha: Tensor) -> Tensor:
    """Front-to-back weights ``w_i = alpha_i prod_{j<i} (1 - alpha_j)`` [P, N], cut where the light runs out."""
    through = torch.cumprod(1 - alpha, dim=-1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    return torch.where(through > TRANSMITTANCE_MIN, alpha * before, torch.zeros_like(alpha))
