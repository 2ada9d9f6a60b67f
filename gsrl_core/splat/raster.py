"""Which rasteriser draws: chosen by name, imported only then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.scene import Scene

NAMES = ("auto", "numba", "gsplat")


class SceneRasterizer(Protocol):
    """Draws a posed scene; the same shape as ``interfaces.Rasterizer``, which lies a layer above."""

    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment."""
        ...


def make_rasterizer(name: str) -> SceneRasterizer:
    """The rasteriser ``name``: numba (CPU), gsplat (CUDA), or auto (gsplat when a CUDA device is there).

    Raises:
        SceneError: unknown name, or gsplat asked for where it cannot run.
    """
    if name not in NAMES:
        raise SceneError(f"unknown rasteriser {name!r}; allowed: {', '.join(NAMES)}")
    if name == "auto":
        name = "gsplat" if torch.cuda.is_available() else "numba"
    if name == "numba":
        from gsrl_core.splat.raster_numba import NumbaRasterizer

        return NumbaRasterizer()
    if not torch.cuda.is_available():
        raise SceneError("rasteriser gsplat needs a CUDA device and PyTorch sees none; use rasterizer=numba (CPU)")
    from gsrl_core.splat.raster_gsplat import GsplatRasterizer

    return GsplatRasterizer()
