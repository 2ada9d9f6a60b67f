"""The gradient of blending: a tile's Gaussians are undone back to front (see ``tiles_numba``)."""

from __future__ import annotations

import numpy as np

from gsrl_core.splat.constants import TILE_SIZE
from gsrl_core.splat.jit import kernel, vectorized_inlined
from gsrl_core.splat.kernels_numba import (
    BLUE,
    CROSS_B,
    DEPTH,
    GRADIENT_WIDTH,
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
from gsrl_core.splat.tiles_numba import (
    BLOCK,
    COLUMN,
    F0,
    F1,
    F_ALPHA,
    F_HALF,
    FRONT,
    HALF,
    LANES,
    LAST,
    LEFT,
    PIXELS,
    ROW,
    SURFACE,
    WEIGHT,
    B,
    G,
    R,
    Z,
    box_in_tile,
    clear_tile,
    falloff,
    gather,
    new_tile,
    pixel_index,
)

# Buffers of the forward pass that mean something else here.
GRAD_R, GRAD_G, GRAD_B, GRAD_Z, GRAD_ALPHA = R, G, B, Z, FRONT
BEHIND = SURFACE  # sum of weight x gradient of everything behind
ACC = WEIGHT  # GRADIENT_WIDTH x LANES accumulators


@vectorized_inlined
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
    s, near = new_tile(), np.empty((BLOCK, RECORD_WIDTH), np.float32)
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
        drawn = begin + deepest + 1
        for entry in range(drawn, tile_first[tile + 1]):
            for k in range(GRADIENT_WIDTH):
                gradients[slot[entry], k] = F0
        for end in range(drawn, begin, -BLOCK):
            block = max(begin, end - BLOCK)
            gather(block, end, gaussian, records, near)
            for e in range(end - block - 1, -1, -1):
                x, y = near[e, MEAN_X] - np.float32(left), near[e, MEAN_Y] - np.float32(top)
                _blend_backward(s, near, e, x, y, np.float32(block + e - begin), gradients, slot[block + e])
