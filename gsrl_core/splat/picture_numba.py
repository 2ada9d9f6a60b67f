"""One picture on all cores: projection, tile lists and blending, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsrl_core.splat.constants import TILE_SIZE
from gsrl_core.splat.gradients_numba import project_backward
from gsrl_core.splat.kernels_numba import (
    GRADIENT_WIDTH,
    RECORD_WIDTH,
    Doubles,
    Floats,
    covariances,
    project,
)
from gsrl_core.splat.lists_numba import depth_order, tile_lists
from gsrl_core.splat.parallel import run_chunks
from gsrl_core.splat.tiles_backward_numba import draw_tiles_backward
from gsrl_core.splat.tiles_numba import draw_tiles

GAUSSIAN_CHUNK = 2048
TILE_CHUNK = 4


class Picture(NamedTuple):
    """What one forward pass leaves for its backward pass."""

    rgb: Floats
    """[h, w, 3] over black."""
    depth: Floats
    """[h, w]: sum of weight x depth."""
    through: Floats
    """[h, w]: light left behind everything."""
    last: np.ndarray
    records: Floats
    order: np.ndarray
    tile_first: np.ndarray
    gaussian: np.ndarray
    slot: np.ndarray
    first_slot: np.ndarray


def draw(
    means: Floats,
    covariance: Floats,
    opacities: Floats,
    harmonics: Floats,
    view: Doubles,
    lens: Doubles,
    width: int,
    height: int,
) -> Picture:
    """One picture over black; arrays as in ``kernels_numba.project``, all C-contiguous float32."""
    count = means.shape[0]
    records, keys = np.empty((count, RECORD_WIDTH), np.float32), np.empty(count, np.uint32)

    def project_range(start: int, stop: int) -> None:
        project(start, stop, means, covariance, opacities, harmonics, view, lens, width, height, -1, records, keys)

    run_chunks(project_range, count, GAUSSIAN_CHUNK)
    tiles_x, tiles_y = -(-width // TILE_SIZE), -(-height // TILE_SIZE)
    order = depth_order(keys)
    tile_first, gaussian, slot, first_slot = tile_lists(order, records, tiles_x, tiles_y)
    rgb = np.empty((height, width, 3), np.float32)
    depth, through = np.empty((height, width), np.float32), np.empty((height, width), np.float32)
    last = np.empty((height, width), np.int32)

    def draw_range(start: int, stop: int) -> None:
        draw_tiles(start, stop, tiles_x, tile_first, gaussian, records, rgb, depth, through, last)

    run_chunks(draw_range, tiles_x * tiles_y, TILE_CHUNK)
    return Picture(rgb, depth, through, last, records, order, tile_first, gaussian, slot, first_slot)


def draw_backward(
    arrays: tuple[Floats, ...],
    covariance: Floats,
    picture: Picture,
    view: Doubles,
    lens: Doubles,
    upstream: tuple[Floats, ...],
) -> tuple[Floats, ...]:
    """Gradients of (means, quats, log_scales, logit_opacities, harmonics, means2d with absolute sums).

    ``arrays`` is (means, quats, scales, opacities, harmonics); ``upstream`` are the gradients of the picture's rgb,
    depth and of ``1 - through``.
    """
    means, quats, scales, opacities, harmonics = arrays
    height, width = picture.through.shape
    tiles_x = -(-width // TILE_SIZE)
    tile_gradients = np.empty((picture.slot.size, GRADIENT_WIDTH), np.float32)

    def tiles_range(start: int, stop: int) -> None:
        draw_tiles_backward(
            start, stop, tiles_x, picture.tile_first, picture.gaussian, picture.slot, picture.records, picture.through,
            picture.last, *upstream, tile_gradients,
        )  # fmt: skip

    run_chunks(tiles_range, picture.tile_first.size - 1, TILE_CHUNK)
    rank_of = np.full(means.shape[0], -1, np.int32)
    rank_of[picture.order] = np.arange(picture.order.size, dtype=np.int32)
    grads = (*(np.zeros_like(a) for a in arrays), np.zeros((means.shape[0], 4), np.float32))

    def gaussians_range(start: int, stop: int) -> None:
        project_backward(
            start, stop, rank_of, picture.first_slot, tile_gradients, means, quats, scales, covariance,
            opacities, harmonics, view, lens, width, height, picture.records, *grads,
        )  # fmt: skip

    run_chunks(gaussians_range, rank_of.size, GAUSSIAN_CHUNK)
    return grads


def covariance_array(quats: Floats, scales: Floats) -> Floats:
    """Sigma [N, 6] of unnormalised quaternions [N, 4] and scales [N, 3]."""
    out = np.empty((quats.shape[0], 6), np.float32)
    run_chunks(lambda start, stop: covariances(start, stop, quats, scales, out), quats.shape[0], GAUSSIAN_CHUNK)
    return out


def camera_arrays(world_to_camera: Tensor, K: Tensor) -> tuple[Doubles, Doubles]:
    """View [3, 4] and (fx, fy, cx, cy) as float64 arrays."""
    view = np.ascontiguousarray(world_to_camera.detach().double().numpy()[:3])
    k = K.detach().double()
    return view, torch.stack([k[0, 0], k[1, 1], k[0, 2], k[1, 2]]).numpy()


def float_array(tensor: Tensor) -> Floats:
    """A C-contiguous, writable float32 array that may share the tensor's memory."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
