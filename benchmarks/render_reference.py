"""The picture that our CUDA kernels must draw, from gsplat's own list of what touches which pixel.

gsplat projects, bins and sorts the moving bodies and says which Gaussian reaches which pixel, nearest first; what this
file adds is the rule of hiding, applied to each of these contributions in float64. (``raster_gsplat`` decides by a
pixel's mean depth instead, which is quick and differs where a body passes through the surface.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.constants import (
    ALPHA_MAX,
    CONTACT_TOLERANCE,
    EPS2D,
    FAR_PLANE,
    NEAR_PLANE,
    SURFACE_ALPHA,
    TILE_SIZE,
)
from gsrl_core.splat.raster_gsplat import GsplatRasterizer, Layer, posed
from gsrl_core.splat.scene import Scene


class Contributions(NamedTuple):
    """M pairs of a Gaussian and a pixel that it reaches; nearer ones first within a pixel."""

    pixel: Tensor
    """int64 [M], row-major."""
    alpha: Tensor
    """[M]."""
    depth: Tensor
    """[M] of the Gaussian's centre along the camera's z axis (m)."""
    color: Tensor
    """[M, 3]."""


def render(scene: Scene, poses: Tensor, camera: Camera) -> Tensor:
    """uint8 [B, h, w, 3] of ``scene`` with bodies at ``poses`` [B, M, 4, 4], on the GPU."""
    rasterizer = GsplatRasterizer()
    rasterizer._load(scene)
    camera = camera.to(rasterizer.device)
    static = rasterizer._static_layer("reference", camera)
    pictures = []
    for i, pose in enumerate(poses.to(rasterizer.device)):
        at = 0 if len(camera) == 1 else i
        layer = Layer(*(tensor[min(i, len(tensor) - 1)] for tensor in static))
        pictures.append(blend(_contributions(rasterizer, pose[None], camera.select(slice(at, at + 1))), layer))
    return torch.stack(pictures)


def blend(found: Contributions, static: Layer) -> Tensor:
    """uint8 [h, w, 3]: contributions in front of the static surface, and behind it as far as that lets light through.

    Args:
        found: of the moving bodies.
        static: rgb [h, w, 3] (premultiplied), alpha and depth (sum of weight times depth) [h, w].
    """
    rgb, alpha = static.rgb.reshape(-1, 3).double(), static.alpha.reshape(-1).double()
    surface = static.depth.reshape(-1).double() / alpha.clamp_min(1e-10) + CONTACT_TOLERANCE
    surface = torch.where(alpha > SURFACE_ALPHA, surface, torch.inf)
    pixel, order = torch.sort(found.pixel, stable=True)
    each_alpha, depth, color = (t[order].double() for t in (found.alpha, found.depth, found.color))
    kept = torch.log1p(-each_alpha)
    total = torch.zeros_like(alpha).index_add(0, pixel, kept)
    # Light before each contribution: a running sum over the whole list, less its value where the pixel begins.
    begins = (total.cumsum(0) - total)[pixel]
    before = torch.exp(kept.cumsum(0) - kept - begins)
    behind = depth > surface[pixel]
    weight = each_alpha * before * torch.where(behind, (1 - alpha)[pixel], 1.0)
    in_front = torch.zeros_like(alpha).index_add(0, pixel, torch.where(behind, 0.0, kept))
    value = torch.zeros_like(rgb).index_add(0, pixel, weight[:, None] * color) + torch.exp(in_front)[:, None] * rgb
    return (value.clamp(0, 1) * 255 + 0.5).to(torch.uint8).reshape(static.rgb.shape)


def _contributions(rasterizer: GsplatRasterizer, pose: Tensor, camera: Camera) -> Contributions:
    """Of one environment, pose [1, M, 4, 4], seen by one camera."""
    from gsplat import rasterization
    from gsplat.cuda._wrapper import rasterize_to_indices_in_range

    bodies, body = rasterizer._bodies, rasterizer._body
    assert bodies is not None and body is not None
    means, quats, colors = posed(bodies, body, pose, camera.world_to_camera)
    width, height = camera.width, camera.height
    opacities = torch.sigmoid(bodies.logit_opacities)
    _, _, seen = rasterization(
        means[0], quats[0], bodies.log_scales.exp(), opacities, colors[0], camera.world_to_camera, camera.K, width,
        height, near_plane=NEAR_PLANE, far_plane=FAR_PLANE, eps2d=EPS2D, packed=False, tile_size=TILE_SIZE,
    )  # fmt: skip
    light = torch.ones(1, height, width, device=rasterizer.device)
    gaussian, pixel, _ = rasterize_to_indices_in_range(
        0, 1 << 30, light, seen["means2d"], seen["conics"], opacities[None], width, height, TILE_SIZE,
        seen["isect_offsets"], seen["flatten_ids"],
    )  # fmt: skip
    center = torch.stack([pixel % width, pixel // width], dim=-1) + 0.5
    x, y = (center - seen["means2d"][0, gaussian]).unbind(-1)
    a, b, c = seen["conics"][0, gaussian].unbind(-1)
    alpha = opacities[gaussian] * torch.exp(-(0.5 * (a * x * x + c * y * y) + b * x * y))
    return Contributions(pixel, alpha.clamp_max(ALPHA_MAX), seen["depths"][0, gaussian], colors[0, gaussian])
