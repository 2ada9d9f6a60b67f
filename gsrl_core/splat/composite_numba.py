"""Moving bodies drawn over a ready picture of the static part, per pixel in front of or behind its surface."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gsrl_core.splat.constants import TILE_SIZE
from gsrl_core.splat.jit import kernel, vectorized_inlined
from gsrl_core.splat.kernels_numba import (
    BLUE,
    BODY,
    CROSS_B,
    DEPTH,
    GREEN,
    HALF_A,
    HALF_C,
    MEAN_X,
    MEAN_Y,
    OPACITY,
    RECORD_WIDTH,
    RED,
    SIGMA_MAX,
    Doubles,
    Floats,
    project,
)
from gsrl_core.splat.lists_numba import Ints, Longs, depth_order, tile_lists
from gsrl_core.splat.tiles_numba import (
    BLOCK,
    BODY_ID,
    COLUMN,
    F0,
    F1,
    F_ALPHA,
    F_HALF,
    F_THROUGH,
    FRONT,
    HALF,
    LANES,
    LEFT,
    OPEN,
    ROW,
    SURFACE,
    THROUGH,
    WEIGHT,
    B,
    G,
    R,
    Z,
    alive,
    box_in_tile,
    clear_tile,
    falloff,
    gather,
    new_tile,
    pixel_index,
)

Bytes = NDArray[np.uint8]
Shorts = NDArray[np.int16]


@kernel
def project_bodies(
    means: Floats,
    covariance: Floats,
    opacities: Floats,
    harmonics: Floats,
    body_first: Longs,
    views: Doubles,
    lens: Doubles,
    width: int,
    height: int,
) -> tuple[Floats, Longs, Ints]:
    """Project all bodies of one environment and list them by tile.

    Gaussians of body m are ``body_first[m] .. body_first[m + 1] - 1``; ``views`` [M, 3, 4] maps their frame to the
    camera. Returns records [N, RECORD_WIDTH], tile_first and gaussian (see ``tile_lists``).
    """
    records = np.empty((means.shape[0], RECORD_WIDTH), np.float32)
    keys = np.empty(means.shape[0], np.uint32)
    for body in range(views.shape[0]):
        project(
            body_first[body], body_first[body + 1], means, covariance, opacities, harmonics, views[body], lens, width,
            height, body, records, keys,
        )  # fmt: skip
    tiles_x, tiles_y = (width + TILE_SIZE - 1) // TILE_SIZE, (height + TILE_SIZE - 1) // TILE_SIZE
    tile_first, gaussian, _, _ = tile_lists(depth_order(keys), records, tiles_x, tiles_y)
    return records, tile_first, gaussian


@kernel
def composite_tiles(
    start: int,
    stop: int,
    records: Floats,
    tile_first: Longs,
    gaussian: Ints,
    static_rgb: Floats,
    static_surface: Floats,
    static_open: Floats,
    static_bytes: Bytes,
    background: Floats,
    out: Bytes,
) -> None:
    """Draw tiles ``start .. stop - 1`` of one picture.

    Shapes:
        static_rgb: [h, w, 3] of the static part over black.
        static_surface: [h, w] depth of its surface, beyond which moving Gaussians count as hidden (m).
        static_open: [h, w] light that it lets through.
        static_bytes: [h, w, 3] the finished picture without moving bodies.
        background: [3].
        out: uint8 [h, w, 3].
    """
    s, near = new_tile(), np.empty((BLOCK, RECORD_WIDTH), np.float32)
    height, width = static_open.shape
    tiles_x = (width + TILE_SIZE - 1) // TILE_SIZE
    for tile in range(start, stop):
        left, top = (tile % tiles_x) * TILE_SIZE, (tile // tiles_x) * TILE_SIZE
        right, bottom = min(left + TILE_SIZE, width), min(top + TILE_SIZE, height)
        begin, end = tile_first[tile], tile_first[tile + 1]
        if begin == end:
            out[top:bottom, left:right] = static_bytes[top:bottom, left:right]
            continue
        _load(s, left, top, right, bottom, static_surface, static_open)
        for block in range(begin, end, BLOCK):
            count = min(BLOCK, end - block)
            gather(block, block + count, gaussian, records, near)
            for e in range(count):
                _blend_over(s, near, e, near[e, MEAN_X] - np.float32(left), near[e, MEAN_Y] - np.float32(top))
            if not alive(s):
                break
        for v in range(top, bottom):
            for u in range(left, right):
                i = pixel_index(u - left, v - top)
                front, beyond = s[FRONT + i], s[LEFT + i] * s[OPEN + i]
                for channel in range(3):
                    value = s[R + channel * (G - R) + i] + front * static_rgb[v, u, channel]
                    value += beyond * background[channel]
                    out[v, u, channel] = np.uint8(min(max(value, F0), F1) * np.float32(255) + F_HALF)


@kernel
def composite_extras(
    start: int,
    stop: int,
    records: Floats,
    tile_first: Longs,
    gaussian: Ints,
    static_depth: Floats,
    static_surface: Floats,
    static_open: Floats,
    depth: Floats,
    alpha: Floats,
    body: Shorts,
) -> None:
    """Depth (weighted mean of what was hit, 0 for nothing), alpha and body id of tiles ``start .. stop - 1``.

    A pixel belongs to the body (-1: the static part) at which its alpha first reaches one half; -1 if it never does.
    ``static_depth`` [h, w] is the static part's own weighted mean depth. Outputs are [h, w].
    """
    s, near = new_tile(), np.empty((BLOCK, RECORD_WIDTH), np.float32)
    height, width = static_open.shape
    tiles_x = (width + TILE_SIZE - 1) // TILE_SIZE
    for tile in range(start, stop):
        left, top = (tile % tiles_x) * TILE_SIZE, (tile // tiles_x) * TILE_SIZE
        right, bottom = min(left + TILE_SIZE, width), min(top + TILE_SIZE, height)
        _load(s, left, top, right, bottom, static_surface, static_open)
        begin, end = tile_first[tile], tile_first[tile + 1]
        for block in range(begin, end, BLOCK):
            count = min(BLOCK, end - block)
            gather(block, block + count, gaussian, records, near)
            for e in range(count):
                _blend_extras(s, near, e, near[e, MEAN_X] - np.float32(left), near[e, MEAN_Y] - np.float32(top))
        for v in range(top, bottom):
            for u in range(left, right):
                i = pixel_index(u - left, v - top)
                static = s[FRONT + i] * (F1 - s[OPEN + i])
                total = s[WEIGHT + i] + static
                alpha[v, u] = total
                depth[v, u] = (s[Z + i] + static * static_depth[v, u]) / total if total > F0 else F0
                body[v, u] = np.int16(s[BODY_ID + i])


@kernel
def _load(s: Floats, left: int, top: int, right: int, bottom: int, static_surface: Floats, static_open: Floats) -> None:
    clear_tile(s)
    for v in range(top, bottom):
        for u in range(left, right):
            i = pixel_index(u - left, v - top)
            s[SURFACE + i] = static_surface[v, u]
            s[OPEN + i] = static_open[v, u]


@vectorized_inlined
def _blend_over(s: Floats, records: Floats, g: int, x: np.float32, y: np.float32) -> None:
    """Draw one moving Gaussian; behind the static surface it gets only what that lets through."""
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
                left, front, opening = s[LEFT + i], s[FRONT + i], s[OPEN + i]
                open_ = F1 if after > F_THROUGH else F0
                left = after if after > F_THROUGH else left
                behind = depth > s[SURFACE + i]
                weight = alpha * through * open_ * (opening if behind else F1)
                s[THROUGH + i] = after * open_
                s[LEFT + i] = left
                s[FRONT + i] = front if behind else left
                s[R + i] += weight * red
                s[G + i] += weight * green
                s[B + i] += weight * blue


@vectorized_inlined
def _blend_extras(s: Floats, records: Floats, g: int, x: np.float32, y: np.float32) -> None:
    """As :func:`_blend_over`, for depth, total weight and body id."""
    top, bottom, first, last = box_in_tile(records, g, x, y)
    a, b, c, opacity, limit = (
        records[g, HALF_A],
        records[g, CROSS_B],
        records[g, HALF_C],
        records[g, OPACITY],
        records[g, SIGMA_MAX],
    )
    depth, body = records[g, DEPTH], records[g, BODY]
    for half in range(first, last):
        for line in range(top, bottom):
            start = (half & 1) * HALF + (line & 15) * LANES
            for lane in range(LANES):
                i = start + lane
                e = falloff(x - s[COLUMN + i], y - s[ROW + i], a, b, c, limit)
                alpha = min(opacity * e, F_ALPHA)
                through = s[THROUGH + i]
                after = through - through * alpha
                open_ = after > F_THROUGH
                behind = depth > s[SURFACE + i]
                left, front, opening = s[LEFT + i], s[FRONT + i], s[OPEN + i]
                left = after if open_ else left
                static = front * (F1 - opening)
                weight = alpha * through if open_ else F0
                weight = weight * opening if behind else weight
                before = s[WEIGHT + i] + (static if behind else F0)
                owner = s[BODY_ID + i]
                s[THROUGH + i] = after * open_
                s[LEFT + i] = left
                s[FRONT + i] = front if behind else left
                s[WEIGHT + i] += weight
                s[Z + i] += weight * depth
                s[BODY_ID + i] = body if (before < F_HALF) & (before + weight >= F_HALF) else owner
