"""How well a picture matches a photo: PSNR, SSIM and the loss that fitting minimises.

SSIM is that of Wang et al. 2004 with an 11 x 11 Gaussian window (sigma 1.5), C1 = 0.01^2, C2 = 0.03^2, each colour
channel by itself, averaged over the windows that lie inside the picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.splat.jit import vectorized, vectorized_inlined
from gsrl_core.splat.kernels_numba import Floats
from gsrl_core.splat.parallel import run_chunks

WINDOW = 11
WINDOW_SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
_BORDER = WINDOW // 2
_BAND = 24
LPIPS_REASON = "LPIPS needs the weights of a pretrained network, which are not part of this installation"
"""Why ``quality.json`` has no LPIPS."""


def _taps() -> Floats:
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    return (weights / weights.sum()).astype(np.float32)


_TAPS = _taps()
W0, W1, W2, W3, W4, W5 = _TAPS[5:]  # from the centre outwards
F0, F1, F2, FC1, FC2 = np.float32(0), np.float32(1), np.float32(2), np.float32(C1), np.float32(C2)


def psnr(picture: Tensor, photo: Tensor) -> float:
    """Peak signal-to-noise ratio of two pictures [h, w, 3] with values 0 to 1 (dB); infinite when they are equal."""
    _check(picture, photo)
    error = float((picture.double() - photo.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(picture: Tensor, photo: Tensor) -> Tensor:
    """Structural similarity of two pictures [h, w, 3] with values 0 to 1: a differentiable scalar, 1 when equal.

    Raises:
        SceneError: shapes differ or a side is smaller than the window.
    """
    _check(picture, photo)
    x, y = (image.permute(2, 0, 1)[:, None] for image in (picture, photo))
    mean_x, mean_y = _filtered(x), _filtered(y)
    variance_x = _filtered(x * x) - mean_x**2
    variance_y = _filtered(y * y) - mean_y**2
    covariance = _filtered(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (similar / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))).mean()


def photometric_loss(picture: Tensor, photo: Tensor, ssim_weight: float) -> Tensor:
    """``(1 - ssim_weight) mean|picture - photo| + ssim_weight (1 - SSIM)``, a scalar differentiable in ``picture``.

    On the CPU value and gradient come from one fused pass (the same numbers as :func:`ssim` with autograd).

    Args:
        picture: [h, w, 3], values around 0 to 1.
        photo: [h, w, 3], values 0 to 1.
        ssim_weight: 0 to 1.

    Raises:
        SceneError: shapes differ or a side is smaller than the window.
    """
    _check(picture, photo)
    if picture.device.type == "cpu" and picture.dtype == torch.float32:
        return _FusedLoss.apply(picture, photo, ssim_weight)
    return (1 - ssim_weight) * (picture - photo).abs().mean() + ssim_weight * (1 - ssim(picture, photo))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, picture: Tensor, photo: Tensor, ssim_weight: float) -> Tensor:
        x, y = (np.ascontiguousarray(image.detach().numpy()) for image in (picture, photo))
        value, gradient = _loss_and_gradient(x, y, ssim_weight)
        ctx.gradient = torch.from_numpy(gradient)
        return torch.tensor(value, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad_outputs[0], None, None


def _loss_and_gradient(x: Floats, y: Floats, ssim_weight: float) -> tuple[float, Floats]:
    height, width, channels = x.shape
    x, y = x.reshape(height, -1), y.reshape(height, -1)  # a row is one vector; neighbours in u are `channels` apart
    slopes = np.empty((3, *x.shape), np.float32)
    gradient = np.empty_like(x)
    similarity, difference = np.zeros(height), np.zeros(height)
    run_chunks(lambda a, b: _ssim_band(a, b, x, y, slopes, similarity), height, _BAND)
    windows = (height - 2 * _BORDER) * (width - 2 * _BORDER) * channels
    scale = (1 - ssim_weight) / x.size, -ssim_weight / windows
    run_chunks(lambda a, b: _loss_band(a, b, x, y, slopes, *scale, gradient, difference), height, _BAND)
    value = (1 - ssim_weight) * difference.sum() / x.size + ssim_weight * (1 - similarity.sum() / windows)
    return float(value), gradient.reshape(height, width, channels)


@vectorized_inlined
def _across(a: Floats, v: int, u: int) -> np.float32:
    """The window's row applied at (v, u); pixels are three values apart."""
    outer = W5 * (a[v, u] + a[v, u + 30]) + W4 * (a[v, u + 3] + a[v, u + 27]) + W3 * (a[v, u + 6] + a[v, u + 24])
    inner = W2 * (a[v, u + 9] + a[v, u + 21]) + W1 * (a[v, u + 12] + a[v, u + 18]) + W0 * a[v, u + 15]
    return outer + inner


@vectorized_inlined
def _down(a: Floats, m: int, v: int, u: int) -> np.float32:
    """The window's column applied to map ``m`` with its first row at ``v``."""
    outer = W5 * (a[m, v, u] + a[m, v + 10, u]) + W4 * (a[m, v + 1, u] + a[m, v + 9, u])
    middle = W3 * (a[m, v + 2, u] + a[m, v + 8, u]) + W2 * (a[m, v + 3, u] + a[m, v + 7, u])
    return outer + middle + W1 * (a[m, v + 4, u] + a[m, v + 6, u]) + W0 * a[m, v + 5, u]


@vectorized
def _similarity_row(v: int, r: int, rows: Floats, filtered: Floats, slopes: Floats) -> np.float32:
    """Sum of SSIM over the windows centred in row ``v``, whose first row of ``rows`` is ``r``; sets their slopes."""
    count = filtered.shape[1]
    for m in range(5):
        for u in range(count):
            filtered[m, u] = _down(rows, m, r, u)
    for u in range(count):
        mx, my = filtered[0, u], filtered[1, u]
        a1, a2 = F2 * mx * my + FC1, F2 * (filtered[4, u] - mx * my) + FC2
        b1 = mx * mx + my * my + FC1
        b2 = filtered[2, u] - mx * mx + filtered[3, u] - my * my + FC2
        inverse_1, inverse_2 = F1 / b1, F1 / b2
        inverse = inverse_1 * inverse_2
        value = a1 * a2 * inverse
        filtered[0, u] = F2 * (my * (a2 - a1) * inverse + mx * value * (inverse_2 - inverse_1))
        filtered[1, u] = -value * inverse_2
        filtered[2, u] = F2 * a1 * inverse
        filtered[3, u] = value
    for m in range(3):
        for u in range(count):
            slopes[m, v, u + 15] = filtered[m, u]
    total = F0
    for u in range(count):
        total += filtered[3, u]
    return total


@vectorized
def _ssim_band(start: int, stop: int, x: Floats, y: Floats, slopes: Floats, similarity: np.ndarray) -> None:
    """SSIM summed over each row's windows; slopes [3, h, 3 w] by the filtered x, x^2 and x y, 0 at the border."""
    height, columns = x.shape
    slopes[:, start:stop] = F0
    first, last = max(start, _BORDER), min(stop, height - _BORDER)
    count = columns - 30  # window centres in a row
    products = np.empty((3, columns), np.float32)
    filtered = np.empty((5, count), np.float32)
    rows = np.empty((5, max(last - first, 0) + 2 * _BORDER, count), np.float32)
    for r in range(rows.shape[1] if last > first else 0):
        v = first - _BORDER + r
        for u in range(columns):
            products[0, u] = x[v, u] * x[v, u]
        for u in range(columns):
            products[1, u] = y[v, u] * y[v, u]
        for u in range(columns):
            products[2, u] = x[v, u] * y[v, u]
        for u in range(count):
            rows[0, r, u] = _across(x, v, u)
        for u in range(count):
            rows[1, r, u] = _across(y, v, u)
        for m in range(3):
            for u in range(count):
                rows[2 + m, r, u] = _across(products, m, u)
    for v in range(first, last):
        similarity[v] = _similarity_row(v, v - first, rows, filtered, slopes)


@vectorized
def _loss_band(
    start: int,
    stop: int,
    x: Floats,
    y: Floats,
    slopes: Floats,
    scale_l1: float,
    scale_ssim: float,
    gradient: Floats,
    difference: np.ndarray,
) -> None:
    """The loss's gradient [h, 3 w], and |x - y| summed over each row.

    The window is symmetric, so the transpose of filtering is filtering; beyond the picture there is no slope.
    """
    height, columns = x.shape
    l1, structure = np.float32(scale_l1), np.float32(scale_ssim)
    padded = np.zeros((3, columns + 30), np.float32)
    rows = np.zeros((3, stop - start + 2 * _BORDER, columns), np.float32)
    for r in range(rows.shape[1]):
        v = start - _BORDER + r
        if 0 <= v < height:
            for m in range(3):
                for u in range(columns):
                    padded[m, u + 15] = slopes[m, v, u]
                for u in range(columns):
                    rows[m, r, u] = _across(padded, m, u)
    for v in range(start, stop):
        r = v - start
        total = F0
        for u in range(columns):
            a, b = x[v, u], y[v, u]
            slope = _down(rows, 0, r, u) + F2 * a * _down(rows, 1, r, u) + b * _down(rows, 2, r, u)
            sign = (F1 if a > b else F0) - (F1 if a < b else F0)
            gradient[v, u] = l1 * sign + structure * slope
            total += abs(a - b)
        difference[v] = total


def _filtered(image: Tensor) -> Tensor:
    taps = torch.from_numpy(_TAPS).to(image)
    rows = torch.nn.functional.conv2d(image, taps.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, taps.view(1, 1, 1, -1))


def _check(picture: Tensor, photo: Tensor) -> None:
    if picture.shape != photo.shape or picture.ndim != 3 or picture.shape[-1] != 3:
        raise SceneError(
            f"quality: pictures of shape {tuple(picture.shape)} and {tuple(photo.shape)} cannot be compared; both must "
            "be [h, w, 3] of one size"
        )
    if min(picture.shape[:2]) < WINDOW:
        raise SceneError(
            f"quality: a picture of {picture.shape[1]}x{picture.shape[0]} px is smaller than the {WINDOW} px window of "
            "SSIM; raise capture.max_image_side"
        )
