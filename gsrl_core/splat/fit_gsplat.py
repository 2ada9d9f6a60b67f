"""The CUDA rasteriser of the fit: gsplat behind the signature of ``raster_numba.rasterize``."""

from __future__ import annotations

import torch
from torch import Tensor

from gsrl_core.splat.constants import EPS2D, FAR_PLANE, NEAR_PLANE, TILE_SIZE
from gsrl_core.splat.harmonics import sh_degree


def rasterize_gsplat(
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
    """Draw Gaussians for one camera on a CUDA device; arguments and results as ``raster_numba.rasterize``."""
    from gsplat import rasterization

    drawn, alpha, meta = rasterization(
        means,
        quats,
        log_scales.exp(),
        torch.sigmoid(logit_opacities),
        harmonics,
        world_to_camera[None],
        K[None],
        width,
        height,
        near_plane=NEAR_PLANE,
        far_plane=FAR_PLANE,
        eps2d=EPS2D,
        sh_degree=sh_degree(harmonics.shape[1]),
        packed=False,
        tile_size=TILE_SIZE,
        render_mode="RGB+ED",
        absgrad=True,
    )
    alpha = alpha[0, ..., 0]
    rgb = drawn[0, ..., :3] + (1 - alpha)[..., None] * background
    return rgb, alpha, drawn[0, ..., 3], {"means2d": meta["means2d"], "radii": meta["radii"][0].amax(-1).float()}
