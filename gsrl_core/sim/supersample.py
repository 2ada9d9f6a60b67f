"""Pictures drawn n times as large on each side and averaged: what a camera's pixel does, at n^2 times the pixels.

Splats drawn at a small size are another picture, not a rounding of the large one (28.6 dB against 224 x 168 from
640 x 480), because each is widened by about a pixel, whatever a pixel's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gsrl_core.sim.passes import passes
from gsrl_core.splat.frames import Frames


def averaged(frames: Frames, n: int) -> Frames:
    """Frames of h x w pixels from frames of nh x nw; the same object for n = 1.

    Colour and alpha are means over n x n pixels, depth is the mean weighted by alpha. A body id cannot be averaged: it
    is that of the pixel right below and right of the centre.
    """
    if n == 1:
        return frames
    rgb = _mean_levels(frames.rgb, n)
    if frames.depth is None or frames.alpha is None or frames.body_id is None:
        return Frames(rgb)
    alpha = _blocks(frames.alpha, n).mean(dim=(2, 4))
    weighted = _blocks(frames.alpha * frames.depth, n).mean(dim=(2, 4))
    depth = torch.where(alpha > 0, weighted / alpha.clamp_min(1e-10), 0.0)
    return Frames(rgb, depth, alpha, frames.body_id[:, n // 2 :: n, n // 2 :: n].contiguous())


def _mean_levels(rgb: Tensor, n: int) -> Tensor:
    batch, height, width, channels = rgb.shape
    out = rgb.new_empty(batch, height // n, width // n, channels)
    for part in passes(rgb, rgb[0].numel()):
        out[part] = _blocks(rgb[part], n).float().mean(dim=(2, 4)).round().to(torch.uint8)
    return out


def _blocks(image: Tensor, n: int) -> Tensor:
    """[b, nh, nw, ...] -> [b, h, n, w, n, ...]."""
    batch, height, width = image.shape[:3]
    return image.reshape(batch, height // n, n, width // n, n, *image.shape[3:])
