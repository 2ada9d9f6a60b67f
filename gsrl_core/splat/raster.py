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


def make_rasterizer(name: str, device: torch.device | str | None = None) -> SceneRasterizer:
    """The rasteriser ``name``: numba (CPU), cuda (our kernels), gsplat (the reference on CUDA), or auto.

    auto is numba without a CUDA device; with one it is the first of cuda, gsplat and numba that can be built and loaded
    (a warning says why not the first).

    Args:
        name: one of ``NAMES``.
        device: the CUDA device to draw on; none, or one that is not CUDA, means the current one.

    Raises:
        SceneError: unknown name, or a rasteriser asked for where it cannot run.
    """
    if name not in NAMES:
        raise SceneError(f"unknown rasteriser {name!r}; allowed: {', '.join(NAMES)}")
    if name == "numba" or (name == "auto" and not torch.cuda.is_available()):
        return _numba()
    if not torch.cuda.is_available():
        raise SceneError(f"rasteriser {name} needs a CUDA device and PyTorch sees none; use rasterizer=numba (CPU)")
    chosen = _cuda_device(device)
    if name == "auto":
        return _first_that_works(chosen)
    return _cuda(chosen) if name == "cuda" else _gsplat(chosen)


def _first_that_works(device: torch.device) -> SceneRasterizer:
    try:
        return _cuda(device)
    except SceneError as error:
        ours = error
    try:
        rasterizer = _gsplat(device)
    except SceneError as error:
        logger.warning("%s; %s; the CPU draws instead (numba), far slower", ours, error)
        return _numba()
    logger.warning("%s; gsplat draws instead, many times slower", ours)
    return rasterizer


def _cuda_device(device: torch.device | str | None) -> torch.device:
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda" or chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if chosen.index >= torch.cuda.device_count():
        raise SceneError(f"there is no CUDA device {chosen}; this machine has {torch.cuda.device_count()}")
    return chosen


def _numba() -> SceneRasterizer:
    from gsrl_core.splat.raster_numba import NumbaRasterizer

    return NumbaRasterizer()


def _cuda(device: torch.device) -> SceneRasterizer:
    from gsrl_core.splat.raster_cuda import CudaRasterizer

    return CudaRasterizer(device)


def _gsplat(device: torch.device) -> SceneRasterizer:
    from gsrl_core.splat.raster_gsplat import GsplatRasterizer

    return GsplatRasterizer(device)
