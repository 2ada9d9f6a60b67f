"""Per-Gaussian kernels of the CPU rasteriser: covariance, EWA projection and spherical harmonics.

All kernels work on a range of Gaussians and write only there, so ranges may run in parallel. Helpers take an array and
an index, not a row: a row is a counted reference, and threads that count on the same array wait for each other.
Arithmetic on one Gaussian is float64 (it costs the same on scalars and keeps needles and large Gaussians well
conditioned); storage is float32. Formulas and names follow
``raster_torch.project``, which is the readable version of this file.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gsrl_core.splat.constants import ALPHA_MIN, EPS2D, FAR_PLANE, FRUSTUM_MARGIN, NEAR_PLANE
from gsrl_core.splat.harmonics import C0, C1, C2, C3
from gsrl_core.splat.jit import inlined, kernel

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

RECORD_WIDTH = 16
"""float32 values per projected Gaussian (one cache line), at the columns below."""
MEAN_X, MEAN_Y = 0, 1
HALF_A, CROSS_B, HALF_C = 2, 3, 4
"""sigma = HALF_A dx^2 + CROSS_B dx dy + HALF_C dy^2."""
OPACITY, SIGMA_MAX = 5, 6
"""Peak alpha, and the sigma at which alpha falls to ALPHA_MIN."""
RED, GREEN, BLUE, DEPTH = 7, 8, 9, 10
EXTENT_X, EXTENT_Y = 11, 12
"""Half size of the box outside which alpha is below ALPHA_MIN (px)."""
BODY = 13

GRADIENT_WIDTH = 12
"""float32 values per (Gaussian, tile): the gradient of mean x and y, their absolute sums, a, b, c, opacity, red, green,
blue, depth."""


@kernel
def covariances(start: int, stop: int, quats: Floats, scales: Floats, out: Floats) -> None:
    """Sigma = R S^2 R^T as (xx, xy, xz, yy, yz, zz) into ``out`` [N, 6]; ``quats`` [N, 4] wxyz of any length."""
    for i in range(start, stop):
        r = rotation(quats, i)
        s0 = float(scales[i, 0]) ** 2
        s1 = float(scales[i, 1]) ** 2
        s2 = float(scales[i, 2]) ** 2
        out[i, 0] = r[0] * r[0] * s0 + r[1] * r[1] * s1 + r[2] * r[2] * s2
        out[i, 1] = r[0] * r[3] * s0 + r[1] * r[4] * s1 + r[2] * r[5] * s2
        out[i, 2] = r[0] * r[6] * s0 + r[1] * r[7] * s1 + r[2] * r[8] * s2
        out[i, 3] = r[3] * r[3] * s0 + r[4] * r[4] * s1 + r[5] * r[5] * s2
        out[i, 4] = r[3] * r[6] * s0 + r[4] * r[7] * s1 + r[5] * r[8] * s2
        out[i, 5] = r[6] * r[6] * s0 + r[7] * r[7] * s1 + r[8] * r[8] * s2


@kernel
def project(
    start: int,
    stop: int,
    means: Floats,
    covariance: Floats,
    opacities: Floats,
    harmonics: Floats,
    view: Doubles,
    lens: Doubles,
    width: int,
    height: int,
    body: int,
    records: Floats,
    keys: NDArray[np.uint32],
) -> None:
    """Project Gaussians ``start .. stop - 1`` into ``records`` and set ``keys``; key 0 means not drawn.

    Shapes:
        means: [N, 3]; covariance: [N, 6]; opacities: [N]; harmonics: [N, K, 3], all in one frame.
        view: [3, 4], that frame to OpenCV camera axes (rigid).
        lens: (fx, fy, cx, cy) in pixels.
        body: stored in the records.
        records: [N, RECORD_WIDTH]. keys: [N], the bits of the float32 depth, which order as the depths do.
    """
    eye = camera_center(view)
    basis = np.empty(16, np.float64)
    bits = records.view(np.uint32)
    for i in range(start, stop):
        keys[i] = 0
        opacity = float(opacities[i])
        x, y, z = to_camera(view, means, i)
        if not (NEAR_PLANE <= z <= FAR_PLANE) or not opacity >= ALPHA_MIN:
            continue
        m, _, _ = screen_rows(view, lens, x, y, z, width, height)
        xx, xy, yy = screen_covariance(m, covariance, i)
        determinant = xx * yy - xy * xy
        mean_x = lens[0] * x / z + lens[2]
        mean_y = lens[1] * y / z + lens[3]
        sigma_max = math.log(opacity / ALPHA_MIN)
        # A little larger than exact, so that rounding never drops a pixel that the alpha test would keep.
        extent_x = 1.0001 * math.sqrt(2.0 * sigma_max * xx) + 1e-3
        extent_y = 1.0001 * math.sqrt(2.0 * sigma_max * yy) + 1e-3
        inside_x = mean_x + extent_x >= 0.5 and mean_x - extent_x <= width - 0.5
        inside_y = mean_y + extent_y >= 0.5 and mean_y - extent_y <= height - 0.5
        if not (determinant > 0.0 and inside_x and inside_y):
            continue
        records[i, MEAN_X] = mean_x
        records[i, MEAN_Y] = mean_y
        records[i, HALF_A] = 0.5 * yy / determinant
        records[i, CROSS_B] = -xy / determinant
        records[i, HALF_C] = 0.5 * xx / determinant
        records[i, OPACITY] = opacity
        records[i, SIGMA_MAX] = sigma_max
        records[i, DEPTH] = z
        records[i, EXTENT_X] = extent_x
        records[i, EXTENT_Y] = extent_y
        records[i, BODY] = body
        direction_basis(eye, means, i, basis, harmonics.shape[1])
        for channel in range(3):
            value = 0.5
            for k in range(harmonics.shape[1]):
                value += basis[k] * harmonics[i, k, channel]
            records[i, RED + channel] = max(value, 0.0)
        keys[i] = bits[i, DEPTH]


@inlined
def rotation(quats: Floats, i: int) -> tuple[float, ...]:
    """R of quaternion i, row by row."""
    w, x, y, z = float(quats[i, 0]), float(quats[i, 1]), float(quats[i, 2]), float(quats[i, 3])
    scale = 1.0 / math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    return (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip


@inlined
def symmetric(covariance: Floats, i: int) -> tuple[float, ...]:
    """Sigma of Gaussian i: xx, xy, xz, yy, yz, zz."""
    c = covariance
    return float(c[i, 0]), float(c[i, 1]), float(c[i, 2]), float(c[i, 3]), float(c[i, 4]), float(c[i, 5])


@inlined
def to_camera(view: Doubles, means: Floats, i: int) -> tuple[float, float, float]:
    """Centre of Gaussian i in camera axes."""
    return (
        view[0, 0] * means[i, 0] + view[0, 1] * means[i, 1] + view[0, 2] * means[i, 2] + view[0, 3],
        view[1, 0] * means[i, 0] + view[1, 1] * means[i, 1] + view[1, 2] * means[i, 2] + view[1, 3],
        view[2, 0] * means[i, 0] + view[2, 1] * means[i, 1] + view[2, 2] * means[i, 2] + view[2, 3],
    )


@inlined
def camera_center(view: Doubles) -> tuple[float, float, float]:
    """The optical centre in the Gaussians' frame."""
    return (
        -(view[0, 0] * view[0, 3] + view[1, 0] * view[1, 3] + view[2, 0] * view[2, 3]),
        -(view[0, 1] * view[0, 3] + view[1, 1] * view[1, 3] + view[2, 1] * view[2, 3]),
        -(view[0, 2] * view[0, 3] + view[1, 2] * view[1, 3] + view[2, 2] * view[2, 3]),
    )


@inlined
def screen_rows(
    view: Doubles, lens: Doubles, x: float, y: float, z: float, width: int, height: int
) -> tuple[tuple[float, ...], float, float]:
    """M = J W [2x3, row by row], and the (possibly clamped) point at which J is taken."""
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    low_x, high_x = -cx / fx - margin_x, (width - cx) / fx + margin_x
    low_y, high_y = -cy / fy - margin_y, (height - cy) / fy + margin_y
    tx, ty = x, y
    if x < low_x * z:
        tx = low_x * z
    elif x > high_x * z:
        tx = high_x * z
    if y < low_y * z:
        ty = low_y * z
    elif y > high_y * z:
        ty = high_y * z
    jx, jxz = fx / z, -fx * tx / (z * z)
    jy, jyz = fy / z, -fy * ty / (z * z)
    rows = (
        jx * view[0, 0] + jxz * view[2, 0], jx * view[0, 1] + jxz * view[2, 1], jx * view[0, 2] + jxz * view[2, 2],
        jy * view[1, 0] + jyz * view[2, 0], jy * view[1, 1] + jyz * view[2, 1], jy * view[1, 2] + jyz * view[2, 2],
    )  # fmt: skip
    return rows, tx, ty


@inlined
def screen_covariance(m: tuple[float, ...], covariance: Floats, i: int) -> tuple[float, float, float]:
    """M Sigma M^T + EPS2D I as (xx, xy, yy)."""
    s = symmetric(covariance, i)
    p0 = m[0] * s[0] + m[1] * s[1] + m[2] * s[2]
    p1 = m[0] * s[1] + m[1] * s[3] + m[2] * s[4]
    p2 = m[0] * s[2] + m[1] * s[4] + m[2] * s[5]
    q0 = m[3] * s[0] + m[4] * s[1] + m[5] * s[2]
    q1 = m[3] * s[1] + m[4] * s[3] + m[5] * s[4]
    q2 = m[3] * s[2] + m[4] * s[4] + m[5] * s[5]
    xx = p0 * m[0] + p1 * m[1] + p2 * m[2] + EPS2D
    yy = q0 * m[3] + q1 * m[4] + q2 * m[5] + EPS2D
    return xx, p0 * m[3] + p1 * m[4] + p2 * m[5], yy


@inlined
def direction_basis(eye: tuple[float, float, float], means: Floats, i: int, basis: Doubles, count: int) -> float:
    """The first ``count`` basis values towards ``mean``; returns its distance from the eye."""
    basis[0] = C0
    if count == 1:
        return 1.0
    x, y, z = means[i, 0] - eye[0], means[i, 1] - eye[1], means[i, 2] - eye[2]
    length = max(math.sqrt(x * x + y * y + z * z), 1e-12)
    x, y, z = x / length, y / length, z / length
    basis[1], basis[2], basis[3] = -C1 * y, C1 * z, -C1 * x
    if count > 4:
        xx, yy, zz = x * x, y * y, z * z
        basis[4] = C2[0] * x * y
        basis[5] = C2[1] * y * z
        basis[6] = C2[2] * (2 * zz - xx - yy)
        basis[7] = C2[3] * x * z
        basis[8] = C2[4] * (xx - yy)
        if count > 9:
            basis[9] = C3[0] * y * (3 * xx - yy)
            basis[10] = C3[1] * x * y * z
            basis[11] = C3[2] * y * (4 * zz - xx - yy)
            basis[12] = C3[3] * z * (2 * zz - 3 * xx - 3 * yy)
            basis[13] = C3[4] * x * (4 * zz - xx - yy)
            basis[14] = C3[5] * z * (xx - yy)
            basis[15] = C3[6] * x * (xx - 3 * yy)
    return length
