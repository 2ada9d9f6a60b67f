"""Gradients of the per-Gaussian kernels (see ``kernels_numba``): from a Gaussian's picture back to its parameters."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gsrl_core.splat.harmonics import C1, C2, C3
from gsrl_core.splat.jit import inlined, kernel
from gsrl_core.splat.kernels_numba import (
    GRADIENT_WIDTH,
    RED,
    Doubles,
    Floats,
    camera_center,
    direction_basis,
    rotation,
    screen_covariance,
    screen_rows,
    symmetric,
    to_camera,
)


@kernel
def project_backward(
    start: int,
    stop: int,
    rank_of: NDArray[np.int32],
    first_slot: NDArray[np.int64],
    tile_gradients: Floats,
    means: Floats,
    quats: Floats,
    scales: Floats,
    covariance: Floats,
    opacities: Floats,
    harmonics: Floats,
    view: Doubles,
    lens: Doubles,
    width: int,
    height: int,
    records: Floats,
    grad_means: Floats,
    grad_quats: Floats,
    grad_log_scales: Floats,
    grad_logits: Floats,
    grad_harmonics: Floats,
    grad_means2d: Floats,
) -> None:
    """Sum the gradients of Gaussians ``start .. stop - 1`` over their tiles and carry them to the parameters.

    ``rank_of`` [N] is a Gaussian's place in depth order, -1 if it is not drawn; rank r owns
    ``tile_gradients[first_slot[r]:first_slot[r + 1]]``. The ``grad_`` arrays start as zeros.
    ``grad_means2d`` [N, 4] gets (d/dx, d/dy, sum |d/dx|, sum |d/dy|) of the projected centre (per pixel).
    """
    eye = camera_center(view)
    basis = np.empty(16, np.float64)
    grad_basis = np.empty(16, np.float64)
    total = np.empty(GRADIENT_WIDTH, np.float64)
    for i in range(start, stop):
        rank = rank_of[i]
        if rank < 0:
            continue
        for k in range(GRADIENT_WIDTH):
            total[k] = 0.0
        for slot in range(first_slot[rank], first_slot[rank + 1]):
            for k in range(GRADIENT_WIDTH):
                total[k] += tile_gradients[slot, k]
        for k in range(4):
            grad_means2d[i, k] = total[k]
        opacity = float(opacities[i])
        grad_logits[i] = total[7] * opacity * (1.0 - opacity)
        _color_backward(i, eye, means, harmonics, records, total, basis, grad_basis, grad_means, grad_harmonics)
        _shape_backward(
            i, means, quats, scales, covariance, view, lens, width, height, total, grad_means, grad_quats,
            grad_log_scales,
        )  # fmt: skip


@inlined
def _color_backward(
    i: int,
    eye: tuple[float, float, float],
    means: Floats,
    harmonics: Floats,
    records: Floats,
    total: Doubles,
    basis: Doubles,
    grad_basis: Doubles,
    grad_means: Floats,
    grad_harmonics: Floats,
) -> None:
    count = harmonics.shape[1]
    length = direction_basis(eye, means, i, basis, count)
    for k in range(count):
        grad_basis[k] = 0.0
    for channel in range(3):
        if records[i, RED + channel] > 0.0:  # the clamp at zero passes no gradient
            grad = total[8 + channel]
            for k in range(count):
                grad_harmonics[i, k, channel] = grad * basis[k]
                grad_basis[k] += grad * harmonics[i, k, channel]
    if count > 1:
        x = (means[i, 0] - eye[0]) / length
        y = (means[i, 1] - eye[1]) / length
        z = (means[i, 2] - eye[2]) / length
        gx, gy, gz = _basis_backward(x, y, z, grad_basis, count)
        radial = x * gx + y * gy + z * gz
        grad_means[i, 0] += (gx - radial * x) / length
        grad_means[i, 1] += (gy - radial * y) / length
        grad_means[i, 2] += (gz - radial * z) / length


@inlined
def _shape_backward(
    i: int,
    means: Floats,
    quats: Floats,
    scales: Floats,
    covariance: Floats,
    view: Doubles,
    lens: Doubles,
    width: int,
    height: int,
    total: Doubles,
    grad_means: Floats,
    grad_quats: Floats,
    grad_log_scales: Floats,
) -> None:
    x, y, z = to_camera(view, means, i)
    m, tx, ty = screen_rows(view, lens, x, y, z, width, height)
    xx, xy, yy = screen_covariance(m, covariance, i)
    determinant = xx * yy - xy * xy
    a, b, c = yy / determinant, -xy / determinant, xx / determinant
    # d inverse(V) = -inverse(V) dV inverse(V); total[4:7] holds the gradients of a, b, c, where
    # sigma = (a dx^2 + 2 b dx dy + c dy^2) / 2.
    ga, gb, gc = total[4], 0.5 * total[5], total[6]
    vxx = -(a * a * ga + 2 * a * b * gb + b * b * gc)
    vxy = -(a * b * ga + (a * c + b * b) * gb + b * c * gc)
    vyy = -(b * b * ga + 2 * b * c * gb + c * c * gc)

    # V = M Sigma M^T: gradients of M (2x3) and of Sigma (symmetric).
    s = symmetric(covariance, i)
    p0 = _times_symmetric(s, m[0], m[1], m[2])
    p1 = _times_symmetric(s, m[3], m[4], m[5])
    g0 = (2 * (vxx * p0[0] + vxy * p1[0]), 2 * (vxx * p0[1] + vxy * p1[1]), 2 * (vxx * p0[2] + vxy * p1[2]))
    g1 = (2 * (vxy * p0[0] + vyy * p1[0]), 2 * (vxy * p0[1] + vyy * p1[1]), 2 * (vxy * p0[2] + vyy * p1[2]))

    # M = J W with J = [[fx/z, 0, -fx tx/z^2], [0, fy/z, -fy ty/z^2]].
    fx, fy = lens[0], lens[1]
    j00 = g0[0] * view[0, 0] + g0[1] * view[0, 1] + g0[2] * view[0, 2]
    j02 = g0[0] * view[2, 0] + g0[1] * view[2, 1] + g0[2] * view[2, 2]
    j11 = g1[0] * view[1, 0] + g1[1] * view[1, 1] + g1[2] * view[1, 2]
    j12 = g1[0] * view[2, 0] + g1[1] * view[2, 1] + g1[2] * view[2, 2]
    # Where x/z is clamped, tx = z * limit moves with z only.
    free_x, free_y = tx == x, ty == y
    cx = fx / z * total[0] - (fx / (z * z) * j02 if free_x else 0.0)
    cy = fy / z * total[1] - (fy / (z * z) * j12 if free_y else 0.0)
    cz = total[11] - fx * x / (z * z) * total[0] - fy * y / (z * z) * total[1]
    cz -= (fx * j00 + fy * j11) / (z * z)
    cz += (2.0 if free_x else 1.0) * fx * tx / (z * z * z) * j02
    cz += (2.0 if free_y else 1.0) * fy * ty / (z * z * z) * j12
    for k in range(3):
        grad_means[i, k] += view[0, k] * cx + view[1, k] * cy + view[2, k] * cz

    _covariance_backward(i, m, vxx, vxy, vyy, quats, scales, grad_quats, grad_log_scales)


@inlined
def _covariance_backward(
    i: int,
    m: tuple[float, ...],
    vxx: float,
    vxy: float,
    vyy: float,
    quats: Floats,
    scales: Floats,
    grad_quats: Floats,
    grad_log_scales: Floats,
) -> None:
    # Sigma = N N^T with N = R S: dL/dN = 2 G N with G = M^T V' M; then dL/dR = dL/dN S and dL/dS = diag(R^T dL/dN).
    r = rotation(quats, i)
    g00 = vxx * m[0] * m[0] + 2 * vxy * m[0] * m[3] + vyy * m[3] * m[3]
    g11 = vxx * m[1] * m[1] + 2 * vxy * m[1] * m[4] + vyy * m[4] * m[4]
    g22 = vxx * m[2] * m[2] + 2 * vxy * m[2] * m[5] + vyy * m[5] * m[5]
    g01 = vxx * m[0] * m[1] + vxy * (m[0] * m[4] + m[1] * m[3]) + vyy * m[3] * m[4]
    g02 = vxx * m[0] * m[2] + vxy * (m[0] * m[5] + m[2] * m[3]) + vyy * m[3] * m[5]
    g12 = vxx * m[1] * m[2] + vxy * (m[1] * m[5] + m[2] * m[4]) + vyy * m[4] * m[5]
    s0, s1, s2 = float(scales[i, 0]) ** 2, float(scales[i, 1]) ** 2, float(scales[i, 2]) ** 2
    # h[row][column] = (2 G R)[row][column]
    g = (2 * g00, 2 * g01, 2 * g02, 2 * g11, 2 * g12, 2 * g22)
    h00, h10, h20 = _times_symmetric(g, r[0], r[3], r[6])
    h01, h11, h21 = _times_symmetric(g, r[1], r[4], r[7])
    h02, h12, h22 = _times_symmetric(g, r[2], r[5], r[8])
    grad_log_scales[i, 0] = s0 * (r[0] * h00 + r[3] * h10 + r[6] * h20)
    grad_log_scales[i, 1] = s1 * (r[1] * h01 + r[4] * h11 + r[7] * h21)
    grad_log_scales[i, 2] = s2 * (r[2] * h02 + r[5] * h12 + r[8] * h22)
    h00, h10, h20 = h00 * s0, h10 * s0, h20 * s0
    h01, h11, h21 = h01 * s1, h11 * s1, h21 * s1
    h02, h12, h22 = h02 * s2, h12 * s2, h22 * s2
    w, x, y, z = float(quats[i, 0]), float(quats[i, 1]), float(quats[i, 2]), float(quats[i, 3])
    length = math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w / length, x / length, y / length, z / length
    gw = 2 * (x * (h21 - h12) + y * (h02 - h20) + z * (h10 - h01))
    gx = 2 * (w * (h21 - h12) - 2 * x * (h11 + h22) + y * (h01 + h10) + z * (h02 + h20))
    gy = 2 * (w * (h02 - h20) + x * (h01 + h10) - 2 * y * (h00 + h22) + z * (h12 + h21))
    gz = 2 * (w * (h10 - h01) + x * (h02 + h20) + y * (h12 + h21) - 2 * z * (h00 + h11))
    radial = w * gw + x * gx + y * gy + z * gz
    grad_quats[i, 0] = (gw - radial * w) / length
    grad_quats[i, 1] = (gx - radial * x) / length
    grad_quats[i, 2] = (gy - radial * y) / length
    grad_quats[i, 3] = (gz - radial * z) / length


@inlined
def _times_symmetric(s: tuple[float, ...], x: float, y: float, z: float) -> tuple[float, float, float]:
    """The matrix (xx, xy, xz, yy, yz, zz) times a vector."""
    return s[0] * x + s[1] * y + s[2] * z, s[1] * x + s[3] * y + s[4] * z, s[2] * x + s[4] * y + s[5] * z


@inlined
def _basis_backward(x: float, y: float, z: float, g: Doubles, count: int) -> tuple[float, float, float]:
    """Gradient with respect to the unit direction, given the gradient ``g`` of the basis values."""
    dx, dy, dz = -C1 * g[3], -C1 * g[1], C1 * g[2]
    if count > 4:
        dx += C2[0] * y * g[4] - 2 * C2[2] * x * g[6] + C2[3] * z * g[7] + 2 * C2[4] * x * g[8]
        dy += C2[0] * x * g[4] + C2[1] * z * g[5] - 2 * C2[2] * y * g[6] - 2 * C2[4] * y * g[8]
        dz += C2[1] * y * g[5] + 4 * C2[2] * z * g[6] + C2[3] * x * g[7]
    if count > 9:
        xx, yy, zz = x * x, y * y, z * z
        dx += 6 * C3[0] * x * y * g[9] + C3[1] * y * z * g[10] - 2 * C3[2] * x * y * g[11] - 6 * C3[3] * x * z * g[12]
        dx += C3[4] * (4 * zz - 3 * xx - yy) * g[13] + 2 * C3[5] * x * z * g[14] + 3 * C3[6] * (xx - yy) * g[15]
        dy += 3 * C3[0] * (xx - yy) * g[9] + C3[1] * x * z * g[10] + C3[2] * (4 * zz - xx - 3 * yy) * g[11]
        dy += -6 * C3[3] * y * z * g[12] - 2 * C3[4] * x * y * g[13] - 2 * C3[5] * y * z * g[14]
        dy += -6 * C3[6] * x * y * g[15]
        dz += C3[1] * x * y * g[10] + 8 * C3[2] * y * z * g[11] + 3 * C3[3] * (2 * zz - xx - yy) * g[12]
        dz += 8 * C3[4] * x * z * g[13] + C3[5] * (xx - yy) * g[14]
    return dx, dy, dz
