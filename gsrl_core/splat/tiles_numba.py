"""Per-tile kernels of the CPU rasteriser: blending and its gradient.

A tile is 16 x 16 pixels, stored as two halves of 8 columns so that one row of a half is one 256-bit vector; the loops
over ``LANES`` become straight vector code. A tile's buffers live in one flat array at constant offsets, because
the compiler then sees that they do not overlap.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from gsrl_core.splat.constants import ALPHA_MAX, TILE_SIZE, TRANSMITTANCE_MIN
from gsrl_core.splat.kernels_numba import (
    BLUE,
    CROSS_B,
    DEPTH,
    EXTENT_X,
    EXTENT_Y,
    GRADIENT_WIDTH,
    GREEN,
    HALF_A,
    HALF_C,
    MEAN_X,
    MEAN_Y,
    OPACITY,
    RED,
    SIGMA_MAX,
    Compiler,
    Floats,
    inlined,
    kernel,
)
from gsrl_core.splat.lists_numba import Ints, Longs

LANES = 8
HALF = TILE_SIZE * LANES
PIXELS = TILE_SIZE * TILE_SIZE

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
# Backward only.
GRAD_R, GRAD_G, GRAD_B, GRAD_Z, GRAD_ALPHA = R, G, B, Z, FRONT
BEHIND = SURFACE  # sum of weight x gradient of everything behind
ACC = WEIGHT  # GRADIENT_WIDTH x LANES accumulators

F0, F1, F_THROUGH, F_ALPHA = np.float32(0), np.float32(1), np.float32(TRANSMITTANCE_MIN), np.float32(ALPHA_MAX)
F_HALF, F_EIGHTH, F_FLOOR = np.float32(0.5), np.float32(0.125), np.float32(-5.6)
# exp(y) on [-0.7, 0], least squares at Chebyshev nodes; exp(x) = exp(x / 8)^8 is good to 1e-6 for x in [-5.6, 0],
# which is all that is needed: alpha >= ALPHA_MIN means x >= -ln 255 = -5.54.
E0, E1, E2 = np.float32(0.99999994), np.float32(0.99999399), np.float32(0.4998985)
E3, E4, E5 = np.float32(0.16603589), np.float32(0.03987158), np.float32(0.00590244)

# No "nnan"/"ninf": a non-finite colour must stay visible in the picture.
FAST = {"contract", "reassoc", "nsz", "arcp"}
vectorized: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
vectorized_inlined: Compiler = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST, forceinline=True)


@inlined
def box_in_tile(records: Floats, g: int, x: float, y: float) -> tuple[int, int, int, int]:
    """Rows and halves of a tile that the Gaussian's box touches; (x, y) is its centre relative to the tile."""
    top = math.ceil(min(max(y - records[g, EXTENT_Y] - 0.5, 0.0), float(TILE_SIZE)))
    bottom = math.floor(min(max(y + records[g, EXTENT_Y] + 0.5, 0.0), float(TILE_SIZE)))
    first = 0 if x - records[g, EXTENT_X] <= LANES - 0.5 else 1
    last = 2 if x + records[g, EXTENT_X] >= LANES + 0.5 else 1
    return int(top), int(bottom), first, last


@kernel
def clear_tile(s: Floats) -> None:
    """An empty tile: nothing drawn, all light left."""
    s[:] = F0
    for i in range(PIXELS):
        s[COLUMN + i] = (i // HALF) * LANES + i % LANES + 0.5
        s[ROW + i] = (i % HALF) // LANES + 0.5
        s[THROUGH + i] = F1
        s[LEFT + i] = F1
        s[FRONT + i] = F1
        s[LAST + i] = -F1
        s[BODY_ID + i] = -F1


@kernel
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


@vectorized
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
    s = np.empty(SCRATCH, np.float32)
    height, width = through.shape
    for tile in range(start, stop):
        clear_tile(s)
        left, top = (tile % tiles_x) * TILE_SIZE, (tile // tiles_x) * TILE_SIZE
        begin = tile_first[tile]
        for entry in range(begin, tile_first[tile + 1]):
            g = gaussian[entry]
            _blend(
                s,
                records,
                g,
                records[g, MEAN_X] - np.float32(left),
                records[g, MEAN_Y] - np.float32(top),
                np.float32(entry - begin),
            )
            if (entry - begin) % 16 == 15 and not alive(s):
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
    return (u // LANES) * HALF + v * LANES + u % LANES


@vectorized
def _blend_backward(
    s: Floats, records: Floats, g: int, x: np.float32, y: np.float32, position: np.float32, out: Floats, entry: int
) -> None:
    """Undo one Gaussian (back to front) and write its GRADIENT_WIDTH gradients in this tile."""
    top, bottom, first, last = box_in_tile(records, g, x, y)
    a, b, c, opacity, limit = (
        records[g, HALF_A],
        records[g, CROSS_B],
        records[g, HALF_C],
        records[g, OPACITY],
        records[g, SIGMA_MAX],
    )
    red, green, blue, depth = records[g, RED], records[g, GREEN], records[g, BLUE], records[g, DEPTH]
    for j in range(GRADIENT_WIDTH * LANES):
        s[ACC + j] = F0
    for half in range(first, last):
        for line in range(top, bottom):
            start = (half & 1) * HALF + (line & 15) * LANES
            for lane in range(LANES):
                i = start + lane
                dx, dy = x - s[COLUMN + i], y - s[ROW + i]
                e = falloff(dx, dy, a, b, c, limit)
                e = e if position <= s[LAST + i] else F0
                alpha = min(opacity * e, F_ALPHA)
                inverse = F1 / (F1 - alpha)
                through = s[LEFT + i] * inverse
                s[LEFT + i] = through
                weight = alpha * through
                value = red * s[GRAD_R + i] + green * s[GRAD_G + i] + blue * s[GRAD_B + i]
                value += depth * s[GRAD_Z + i] + s[GRAD_ALPHA + i]
                grad_alpha = through * value - s[BEHIND + i] * inverse
                s[BEHIND + i] += weight * value
                # slope = -dL/dsigma; a Gaussian at the alpha limit passes no gradient to its shape.
                slope = grad_alpha * opacity * e if opacity * e < F_ALPHA else F0
                gx, gy = -slope * (F1 + F1) * a * dx - slope * b * dy, -slope * (F1 + F1) * c * dy - slope * b * dx
                s[ACC + lane] += gx
                s[ACC + 1 * LANES + lane] += gy
                s[ACC + 2 * LANES + lane] += abs(gx)
                s[ACC + 3 * LANES + lane] += abs(gy)
                s[ACC + 4 * LANES + lane] -= F_HALF * slope * dx * dx
                s[ACC + 5 * LANES + lane] -= slope * dx * dy
                s[ACC + 6 * LANES + lane] -= F_HALF * slope * dy * dy
                s[ACC + 7 * LANES + lane] += slope
                s[ACC + 8 * LANES + lane] += weight * s[GRAD_R + i]
                s[ACC + 9 * LANES + lane] += weight * s[GRAD_G + i]
                s[ACC + 10 * LANES + lane] += weight * s[GRAD_B + i]
                s[ACC + 11 * LANES + lane] += weight * s[GRAD_Z + i]
    for k in range(GRADIENT_WIDTH):
        total = F0
        for lane in range(LANES):
            total += s[ACC + k * LANES + lane]
        out[entry, k] = total
    out[entry, 7] /= opacity


@kernel
def draw_tiles_backward(
    start: int,
    stop: int,
    tiles_x: int,
    tile_first: Longs,
    gaussian: Ints,
    slot: Ints,
    records: Floats,
    through: Floats,
    last: Ints,
    grad_rgb: Floats,
    grad_depth: Floats,
    grad_alpha: Floats,
    gradients: Floats,
) -> None:
    """Gradients of tiles ``start .. stop - 1`` into ``gradients[slot]`` [E, GRADIENT_WIDTH]; see :func:`draw_tiles`."""
    s = np.empty(SCRATCH, np.float32)
    height, width = through.shape
    for tile in range(start, stop):
        clear_tile(s)
        left, top = (tile % tiles_x) * TILE_SIZE, (tile // tiles_x) * TILE_SIZE
        deepest = -1
        s[GRAD_ALPHA : GRAD_ALPHA + PIXELS] = F0
        for v in range(top, min(top + TILE_SIZE, height)):
            for u in range(left, min(left + TILE_SIZE, width)):
                i = pixel_index(u - left, v - top)
                s[GRAD_R + i] = grad_rgb[v, u, 0]
                s[GRAD_G + i] = grad_rgb[v, u, 1]
                s[GRAD_B + i] = grad_rgb[v, u, 2]
                s[GRAD_Z + i] = grad_depth[v, u]
                s[GRAD_ALPHA + i] = grad_alpha[v, u]
                s[LEFT + i] = through[v, u]
                s[LAST + i] = last[v, u]
                deepest = max(deepest, last[v, u])
        begin = tile_first[tile]
        for entry in range(tile_first[tile + 1] - 1, begin - 1, -1):
            if entry - begin > deepest:
                for k in range(GRADIENT_WIDTH):
                    gradients[slot[entry], k] = F0
                continue
            g = gaussian[entry]
            x, y = records[g, MEAN_X] - np.float32(left), records[g, MEAN_Y] - np.float32(top)
            _blend_backward(s, records, g, x, y, np.float32(entry - begin), gradients, slot[entry])
