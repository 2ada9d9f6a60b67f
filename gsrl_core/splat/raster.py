"""Which rasteriser draws: chosen by name, imported only then."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.scene import Scene

NAMES = ("auto", "numba", "gsplat", "cuda")


logger = logging.getLogger(__name__)


class SceneRasterizer(Protocol):
    """Draws a posed scene; the same shape as ``interfaces.Rasterizer``, which lies a layer above."""

    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment."""
        ...


def make_rasterizer(name: str) -> SceneRasterizer:
    """The rasteriser ``name``: numba (CPU), cuda (our kernels), gsplat (the reference on CUDA), or auto.

    auto is numba without a CUDA device; with one it is cuda, or gsplat where our kernels can be neither built nor
    loaded (a warning says why).

    Raises:
        SceneError: unknown name, or a rasteriser asked for where it cannot run.
    """
    if name not in NAMES:
        raise SceneError(f"unknown rasteriser {name!r}; allowed: {', '.join(NAMES)}")
    if name == "numba" or (name == "auto" and not torch.cuda.is_available()):
        from gsrl_core.splat.raster_numba import NumbaRasterizer

        return NumbaRasterizer()
    if not torch.cuda.is_available():
        raise SceneError(f"rasteriser {name} needs a CUDA device and PyTorch sees none; use rasterizer=numba (CPU)")
    if name != "gsplat":
        from gsrl_core.splat.raster_cuda import CudaRasterizer

        try:
            return CudaRasterizer()
        except SceneError as error:
            if name == "cuda":
                raise
            logger.warning("%s; gsplat draws instead, many times slower", error)
    from gsrl_core.splat.raster_gsplat import GsplatRasterizer

    return GsplatRasterizer()
