"""Training batches for flow matching: pictures resident on the device as bytes, augmented there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gsrl_core.errors import TrainingError
from gsrl_core.policy.config import IMAGE_SLOTS, Pi05Config
from gsrl_core.policy.demonstrations import Demonstrations, action_chunks
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import Normalizer, discretize_state, pad_last, resize_with_pad, to_network_range

MAX_ZOOM, MAX_SHIFT, MAX_TURN = 0.04, 0.04, math.radians(2.0)
"""Augmentation of fixed cameras: scale and shift as fractions of the side, rotation [rad]."""
MAX_COLOR = 0.2
"""Brightness, contrast and saturation change by at most this fraction (openpi: 0.3, 0.4, 0.5)."""
_RESIZE_BATCH = 256


@dataclass(frozen=True)
class FrameSet:
    """n training samples."""

    images: dict[str, Tensor]
    """slot -> uint8 [n, S, S, 3] on the training device."""
    tokens: Tensor
    """int64 [n, T] on the host."""
    token_mask: Tensor
    """bool [n, T] on the host."""
    chunks: Tensor
    """Normalised, padded actions float32 [n, H, A] on the host."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls,
        demonstrations: Demonstrations,
        config: Pi05Config,
        tokenizer: PromptTokenizer,
        normalizers: tuple[Normalizer, Normalizer],
        device: torch.device | str,
    ) -> FrameSet:
        """Resize, normalise and tokenise everything once; ``normalizers`` of state and action.

        Raises:
            TrainingError: more cameras than the network has slots.
        """
        if len(demonstrations.rgb) > len(IMAGE_SLOTS):
            raise TrainingError(f"{len(demonstrations.rgb)} cameras recorded; allowed: 1 to {len(IMAGE_SLOTS)}")
        state, action = normalizers
        episodes = demonstrations.episodes()
        images = {
            slot: _resized(demonstrations, camera, episodes, config.image_size, device)
            for slot, camera in zip(IMAGE_SLOTS, demonstrations.rgb, strict=False)
        }
        sentences = [demonstrations.instructions[seed] for seed in demonstrations.seed.tolist()]
        tokens, token_mask = tokenizer.encode(sentences, discretize_state(state.normalize(demonstrations.state)))
        chunks = action.normalize(action_chunks(demonstrations.action, episodes, config.horizon))
        return cls(images, tokens, token_mask, pad_last(chunks, config.action_dim))

    def pictures(self, index: Tensor) -> dict[str, Tensor]:
        """Pictures by slot, float32 [B, 3, S, S] in [-1, 1], of rows ``index`` (int64 [B] on the host)."""
        return {slot: to_network_range(frames[index.to(frames.device)]) for slot, frames in self.images.items()}


def _resized(
    demonstrations: Demonstrations, camera: str, episodes: Sequence[slice], side: int, device: torch.device | str
) -> Tensor:
    out = torch.empty(len(demonstrations), side, side, 3, dtype=torch.uint8, device=device)
    for episode in episodes:
        for first in range(episode.start, episode.stop, _RESIZE_BATCH):
            rows = slice(first, min(first + _RESIZE_BATCH, episode.stop))
            out[rows] = resize_with_pad(torch.from_numpy(demonstrations.frames(camera, rows)).to(device), side)
    return out


def augment(images: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Randomly move (fixed cameras only) and recolour pictures float32 [B, 3, S, S] in [-1, 1].

    All slots of a sample keep their own draw; random numbers come from ``generator`` on its device.
    """
    return {
        slot: _recolored(image if "wrist" in slot else _moved(image, generator), generator)
        for slot, image in images.items()
    }


def _moved(image: Tensor, generator: torch.Generator) -> Tensor:
    draw = _uniform((len(image), 4), generator, image.device)
    zoom, turn, shift = 1.0 + MAX_ZOOM * draw[:, 0], MAX_TURN * draw[:, 1], 2.0 * MAX_SHIFT * draw[:, 2:]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(rows, list(image.shape), align_corners=False)
    # Sampled as (x + 1), so that what comes from outside is black (-1), as the letterbox is.
    return functional.grid_sample(image + 1.0, grid, mode="bilinear", align_corners=False) - 1.0


def _recolored(image: Tensor, generator: torch.Generator) -> Tensor:
    factors = 1.0 + MAX_COLOR * _uniform((len(image), 3), generator, image.device)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    unit = (image + 1.0) * 0.5 * brightness
    mean = unit.mean(dim=(1, 2, 3), keepdim=True)
    unit = mean + contrast * (unit - mean)
    gray = unit.mean(dim=1, keepdim=True)
    return ((gray + saturation * (unit - gray)).clamp(0.0, 1.0)) * 2.0 - 1.0


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0).to(device)
