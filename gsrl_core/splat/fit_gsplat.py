"""gsplat's rasteriser behind the signature that the fit uses (CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor


def rasterize(
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
    """Draw Gaussians for one camera; arguments and results as :func:`raster_numba.rasterize`."""
    import gsplat

    rgb, alpha, info = gsplat.rasterization(
        means,
        torch.nn.functional.normalize(quats, dim=-1),
        log_scales.exp(),
        torch.sigmoid(logit_opacities),
        harmonics,
        world_to_camera[None],
        K[None],
        width,
        height,
        sh_degree=int(harmonics.shape[1] ** 0.5) - 1,
        backgrounds=torch.cat([background, background.new_zeros(1)])[None],
        render_mode="RGB+ED",
        packed=False,
        absgrad=True,
    )
    radii = info["radii"][0]
    means2d = _Projected(info["means2d"])
    return (
        rgb[0, ..., :3],
        alpha[0, ..., 0],
        rgb[0, ..., 3],
        {"means2d": means2d, "radii": radii.amax(-1).float() if radii.ndim == 2 else radii.float()},  # type: ignore[dict-item]
    )


class _Projected:
    """Projected centres whose ``absgrad`` gsplat fills in during backward, without the camera axis."""

    def __init__(self, means2d: Tensor) -> None:
        self._means2d = means2d

    @property
    def absgrad(self) -> Tensor:
        """float32 [N, 2]."""
        return self._means2d.absgrad[0]  # type: ignore[attr-defined]
