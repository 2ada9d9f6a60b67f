"""Which Gaussians each tile must draw, front to back."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gsrl_core.splat.constants import TILE_SIZE
from gsrl_core.splat.jit import inlined, kernel
from gsrl_core.splat.kernels_numba import (
    CROSS_B,
    EXTENT_X,
    EXTENT_Y,
    HALF_A,
    HALF_C,
    MEAN_X,
    MEAN_Y,
    SIGMA_MAX,
    Floats,
)

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@kernel
def depth_order(keys: NDArray[np.uint32]) -> Ints:
    """Indices of the non-zero ``keys``, ascending by key, ties by index (radix sort, 11 bits a pass)."""
    count = 0
    for key in keys:
        count += key != 0
    order, other = np.empty(count, np.int32), np.empty(count, np.int32)
    n = 0
    for i in range(keys.size):
        if keys[i] != 0:
            order[n] = i
            n += 1
    heads = np.empty(2049, np.int64)
    for shift in (0, 11, 22):
        heads[:] = 0
        for i in order:
            heads[((keys[i] >> np.uint32(shift)) & np.uint32(2047)) + 1] += 1
        for digit in range(2048):
            heads[digit + 1] += heads[digit]
        for i in order:
            digit = (keys[i] >> np.uint32(shift)) & np.uint32(2047)
            other[heads[digit]] = i
            heads[digit] += 1
        order, other = other, order
    return order


@kernel
def tile_lists(order: Ints, records: Floats, tiles_x: int, tiles_y: int) -> tuple[Longs, Ints, Ints, Longs]:
    """Front-to-back lists of the Gaussians that touch each tile.

    Returns:
        tile_first [tiles + 1], members: entry e belongs to the tile with ``tile_first[t] <= e < tile_first[t + 1]``;
        gaussian [E] and slot [E] of each entry; first_slot [V + 1]: the slots of rank r (position in ``order``) are
        consecutive, so a Gaussian's gradients can be summed without atomics.
    """
    capacity = 0
    for i in order:
        x0, x1, y0, y1 = _tile_box(records, i, tiles_x, tiles_y)
        capacity += (x1 - x0) * (y1 - y0)
    tile_of_slot = np.empty(capacity, np.int32)
    first_slot = np.empty(order.size + 1, np.int64)
    tile_first = np.zeros(tiles_x * tiles_y + 1, np.int64)
    slots = 0
    for rank in range(order.size):
        first_slot[rank] = slots
        g = order[rank]
        x0, x1, y0, y1 = _tile_box(records, g, tiles_x, tiles_y)
        single = (x1 - x0 == 1) or (y1 - y0 == 1)  # the box is tight along its axes
        for ty in range(y0, y1):
            for tx in range(x0, x1):
                if single or _touches(records, g, tx * TILE_SIZE, ty * TILE_SIZE):
                    tile_of_slot[slots] = ty * tiles_x + tx
                    tile_first[ty * tiles_x + tx + 1] += 1
                    slots += 1
    first_slot[order.size] = slots
    for tile in range(tiles_x * tiles_y):
        tile_first[tile + 1] += tile_first[tile]
    head = tile_first[:-1].copy()
    gaussian, slot = np.empty(slots, np.int32), np.empty(slots, np.int32)
    for rank in range(order.size):
        for s in range(first_slot[rank], first_slot[rank + 1]):
            entry = head[tile_of_slot[s]]
            head[tile_of_slot[s]] = entry + 1
            gaussian[entry] = order[rank]
            slot[entry] = s
    return tile_first, gaussian, slot, first_slot


@inlined
def _tile_box(records: Floats, g: int, tiles_x: int, tiles_y: int) -> tuple[int, int, int, int]:
    # Clamped as floats first: a huge extent does not fit an integer.
    x0 = math.floor(min(max(records[g, MEAN_X] - records[g, EXTENT_X] - 0.5, 0.0), 1e6)) // TILE_SIZE
    y0 = math.floor(min(max(records[g, MEAN_Y] - records[g, EXTENT_Y] - 0.5, 0.0), 1e6)) // TILE_SIZE
    x1 = math.floor(min(max(records[g, MEAN_X] + records[g, EXTENT_X] - 0.5, 0.0), 1e6)) // TILE_SIZE + 1
    y1 = math.floor(min(max(records[g, MEAN_Y] + records[g, EXTENT_Y] - 0.5, 0.0), 1e6)) // TILE_SIZE + 1
    return min(x0, tiles_x), min(x1, tiles_x), min(y0, tiles_y), min(y1, tiles_y)


@inlined
def _touches(records: Floats, g: int, left: int, top: int) -> bool:
    """Whether sigma falls to SIGMA_MAX on a tile's pixel centres: the minimum of a convex quadratic over a box."""
    low_x, low_y = left + 0.5 - records[g, MEAN_X], top + 0.5 - records[g, MEAN_Y]
    high_x, high_y = low_x + (TILE_SIZE - 1), low_y + (TILE_SIZE - 1)
    limit = records[g, SIGMA_MAX] * 1.0002 + 1e-3
    outside_x, outside_y = low_x > 0 or high_x < 0, low_y > 0 or high_y < 0
    if not (outside_x or outside_y):
        return True
    a, b, c = records[g, HALF_A], records[g, CROSS_B], records[g, HALF_C]
    if outside_x:
        dx = low_x if low_x > 0 else high_x
        dy = min(max(-0.5 * b * dx / c, low_y), high_y)
        if a * dx * dx + b * dx * dy + c * dy * dy <= limit:
            return True
    if outside_y:
        dy = low_y if low_y > 0 else high_y
        dx = min(max(-0.5 * b * dy / a, low_x), high_x)
        if a * dx * dx + b * dx * dy + c * dy * dy <= limit:
            return True
    return False
