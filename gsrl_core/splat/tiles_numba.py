"""Per-tile kernels of the CPU rasteriser: blending.

A tile is 16 x 16 pixels, stored as two halves of 8 columns so that one row of a half is one 256-bit vector; the loops
over ``LANES`` become straight vector code. A tile's buffers live in one flat array at constant offsets, because
the compiler then sees that they do not overlap.
"""

from __future__ import annotations

import math

import numpy as np

from gsrl_core.splat.constants import ALPHA_MAX, TILE_SIZE, TRANSMITTANCE_MIN
from gsrl_core.splat.jit import inlined, kernel, vectorized, vectorized_inlined
from gsrl_core.splat.kernels_numba import (
    BLUE,
    CROSS_B,
    DEPTH,
    EXTENT_X,
    EXTENT_Y,
    GREEN,
    HALF_A,
    HALF_C,
    MEAN_X,
    MEAN_Y,
    OPACITY,
    RECORD_WIDTH,
    RED,
    SIGMA_MAX,
    Floats,
)
from gsrl_core.splat.lists_numba import Ints, Longs

LANES = 8
HALF = TILE_SIZE * LANES
PIXELS = TILE_SIZE * TILE_SIZE
BLOCK = 32
"""Entries of a tile's list that are fetched at a time."""

# Offsets of a tile's buffers in its flat scratch array.
COLUMN, ROW = 0, PIXELS  # pixel centres relative to the tile
THROUGH = 2 * PIXELS  # light that is left; 0 once the pixel is finished
R, G, B, Z = 3 * PIXELS, 4 * PIXELS, 5 * PIXELS, 6 * PIXELS
LEFT = 7 * PIXELS  # light that is left, kept when the pixel is finished
LAST = 8 * PIXELS  # position in the tile's list of the last Gaussian before the pixel was finished
FRONT = 9 * PIXELS  # light left in front of the static surface
SURFACE = 10 * PIXELS  # its depth
OPEN = 11 * PIXELS  # what it lets through
WEIGHT, BODY_ID = 12 * PIXELS, 13 * PIXELS
SCRATCH = 14 * PIXELS

F0, F1, F_THROUGH, F_ALPHA = np.float32(0), np.float32(1), np.float32(TRANSMITTANCE_MIN), np.float32(ALPHA_MAX)
F_HALF, F_EIGHTH, F_FLOOR = np.float32(0.5), np.float32(0.125), np.float32(-5.6)
# exp(y) on [-0.7, 0], least squares at Chebyshev nodes; exp(x) = exp(x / 8)^8 is good to 1e-6 for x in [-5.6, 0],
# which is all that is needed: alpha >= ALPHA_MIN means x >= -ln 255 = -5.54.
E0, E1, E2 = np.float32(0.99999994), np.float32(0.99999399), np.float32(0.4998985)
E3, E4, E5 = np.float32(0.16603589), np.float32(0.03987158), np.float32(0.00590244)


@kernel
def gather(block: int, end: int, gaussian: Ints, records: Floats, near: Floats) -> None:
    """Copy the records of entries ``block .. end - 1`` into ``near`` [BLOCK, RECORD_WIDTH].

    The copies do not wait for each other, so their memory is read ahead; blending straight from ``records``, which lie
    in no order, would wait for each.
    """
    for entry in range(block, end):
        for k in range(RECORD_WIDTH):
            near[entry - block, k] = records[gaussian[entry], k]


@inlined
def box_in_tile(records: Floats, g: int, x: float, y: float) -> tuple[int, int, int, int]:
    """Rows and halves of a tile that the Gaussian's box touches; (x, y) is its centre relative to the tile."""
    top = math.ceil(min(max(y - records[g, EXTENT_Y] - 0.5, 0.0), float(TILE_SIZE)))
    bottom = math.floor(min(max(y + records[g, EXTENT_Y] + 0.5, 0.0), float(TILE_SIZE)))
    first = 0 if x - records[g, EXTENT_X] <= LANES - 0.5 else 1
    last = 2 if x + records[g, EXTENT_X] >= LANES + 0.5 else 1
    return int(top), int(bottom), first, last


@kernel
def new_tile() -> Floats:
    """Buffers of a tile, with the centres of its pixels; ``clear_tile`` before each use."""
    s = np.zeros(SCRATCH, np.float32)
    for i in range(PIXELS):
        s[COLUMN + i] = (i // HALF) * LANES + i % LANES + 0.5
        s[ROW + i] = (i % HALF) // LANES + 0.5
    return s


@kernel
def clear_tile(s: Floats) -> None:
    """An empty tile: nothing drawn, all light left."""
    for i in range(2 * PIXELS, SCRATCH):
        s[i] = F0
    for channel in (THROUGH, LEFT, FRONT):
        for i in range(PIXELS):
            s[channel + i] = F1
    for channel in (LAST, BODY_ID):
        for i in range(PIXELS):
            s[channel + i] = -F1


@vectorized
def alive(s: Floats) -> bool:
    """Whether any pixel of the tile is unfinished."""
    left = F0
    for i in range(PIXELS):
        left = max(left, s[THROUGH + i])
    return bool(left > F0)


@vectorized_inlined
def falloff(
    dx: np.float32, dy: np.float32, a: np.float32, b: np.float32, c: np.float32, limit: np.float32
) -> np.float32:
    """exp(-sigma) at an offset from the centre, 0 where alpha would be below ALPHA_MIN."""
    sigma = a * dx * dx + c * dy * dy + b * dx * dy
    y = max(-sigma, F_FLOOR) * F_EIGHTH
    e = E0 + y * (E1 + y * (E2 + y * (E3 + y * (E4 + y * E5))))
    e = e * e
    e = e * e
    e = e * e
    return e * (F1 if (sigma <= limit) & (sigma >= F0) else F0)


@vectorized_inlined
def _blend(s: Floats, records: Floats, g: int, x: np.float32, y: np.float32, position: np.float32) -> None:
    """Draw one Gaussian into the tile (front to back).

    Every buffer is read before any choice: a read inside a conditional expression would keep the loop scalar.
    """
    top, bottom, first, last = box_in_tile(records, g, x, y)
    a, b, c, opacity, limit = (
        records[g, HALF_A],
        records[g, CROSS_B],
        records[g, HALF_C],
        records[g, OPACITY],
        records[g, SIGMA_MAX],
    )
    red, green, blue, depth = records[g, RED], records[g, GREEN], records[g, BLUE], records[g, DEPTH]
    for half in range(first, last):
        for line in range(top, bottom):
            start = (half & 1) * HALF + (line & 15) * LANES
            for lane in range(LANES):
                i = start + lane
                e = falloff(x - s[COLUMN + i], y - s[ROW + i], a, b, c, limit)
                alpha = min(opacity * e, F_ALPHA)
                through = s[THROUGH + i]
                after = through - through * alpha
                left, drawn = s[LEFT + i], s[LAST + i]
                open_ = F1 if after > F_THROUGH else F0
                weight = alpha * through * open_
                s[THROUGH + i] = after * open_
                s[LEFT + i] = after if after > F_THROUGH else left
                s[LAST + i] = max(drawn, position * open_)
                s[R + i] += weight * red
                s[G + i] += weight * green
                s[B + i] += weight * blue
                s[Z + i] += weight * depth


@kernel
def draw_tiles(
    start: int,
    stop: int,
    tiles_x: int,
    tile_first: Longs,
    gaussian: Ints,
    records: Floats,
    rgb: Floats,
    depth: Floats,
    through: Floats,
    last: Ints,
) -> None:
    """Blend tiles ``start .. stop - 1`` over black.

    Writes rgb [h, w, 3], depth [h, w] (sum of weight x depth), through [h, w] (light left) and last [h, w] (the
    position in the tile's list of the last entry before the pixel was finished, -1 for none).
    """
    s, near = new_tile(), np.empty((BLOCK, RECORD_WIDTH), np.float32)
    height, width = through.shape
    for tile in range(start, stop):
        clear_tile(s)
        left, top = (tile % tiles_x) * TILE_SIZE, (tile // tiles_x) * TILE_SIZE
        begin = tile_first[tile]
        for block in range(begin, tile_first[tile + 1], BLOCK):
            end = min(block + BLOCK, tile_first[tile + 1])
            gather(block, end, gaussian, records, near)
            for e in range(end - block):
                x, y = near[e, MEAN_X] - np.float32(left), near[e, MEAN_Y] - np.float32(top)
                _blend(s, near, e, x, y, np.float32(block + e - begin))
            if not alive(s):
                break
        for v in range(top, min(top + TILE_SIZE, height)):
            for u in range(left, min(left + TILE_SIZE, width)):
                i = pixel_index(u - left, v - top)
                rgb[v, u, 0] = s[R + i]
                rgb[v, u, 1] = s[G + i]
                rgb[v, u, 2] = s[B + i]
                depth[v, u] = s[Z + i]
                through[v, u] = s[LEFT + i]
                last[v, u] = np.int32(s[LAST + i])


@inlined
def pixel_index(u: int, v: int) -> int:
    """Place of column u and row v of a tile in its buffers."""
    # u + (HALF - LANES) for the second half: no division, which would cost more than the copy it is for.
    return v * LANES + u + (HALF - LANES if u >= LANES else 0)
