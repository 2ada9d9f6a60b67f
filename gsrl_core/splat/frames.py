"""What a rasteriser hands back. It lives below ``interfaces`` so that the rasterisers themselves may use it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """One camera's pictures of a batch of environments."""

    rgb: Tensor
    """uint8 [B, h, w, 3]."""
    depth: Tensor | None = None
    """float32 [B, h, w]: expected depth along the camera's z axis in metres, 0 where nothing was hit."""
    alpha: Tensor | None = None
    """float32 [B, h, w] in [0, 1]."""
    body_id: Tensor | None = None
    """int16 [B, h, w]: index into ``Scene.names``, -1 for the static part."""
