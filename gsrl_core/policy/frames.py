"""Training samples for flow matching: pictures as bytes, converted and augmented on the training device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    """slot -> uint8 [n, S, S, 3], on the training device or on the host."""
    tokens: Tensor
    """int64 [n, T] on the host."""
    token_mask: Tensor
    """bool [n, T] on the host."""
    chunks: Tensor
    """Normalised, padded actions float32 [n, H, A] on the host."""
    state: Tensor | None
    """Normalised, padded states float32 [n, A] on the host, for pi0 only: pi0.5 reads them in its prompt."""
    device: torch.device
    """Where training happens."""

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
        images_on: torch.device | str | None = None,
    ) -> FrameSet:
        """Resize, normalise and tokenise everything once.

        Args:
            demonstrations: the data.
            config: of the network.
            tokenizer: of its prompt.
            normalizers: of state and action.
            device: where training happens.
            images_on: where the pictures wait: ``device`` if not given, or the host where they are too many for it.

        Raises:
            TrainingError: more cameras than the network has slots.
        """
        if len(demonstrations.rgb) > len(IMAGE_SLOTS):
            raise TrainingError(f"{len(demonstrations.rgb)} cameras recorded; allowed: 1 to {len(IMAGE_SLOTS)}")
        state, action = normalizers
        episodes = demonstrations.episodes()
        images = {
            slot: _resized(demonstrations, camera, episodes, config.image_size, device, images_on or device)
            for slot, camera in zip(IMAGE_SLOTS, demonstrations.rgb, strict=False)
        }
        sentences = [demonstrations.instructions[seed] for seed in demonstrations.seed.tolist()]
        states = state.normalize(demonstrations.state)
        tokens, token_mask = tokenizer.encode(sentences, discretize_state(states))
        chunks = action.normalize(action_chunks(demonstrations.action, episodes, config.horizon))
        seen = pad_last(states, config.action_dim) if config.family == "pi0" else None
        chunks = pad_last(chunks, config.action_dim)
        return cls(images, tokens, token_mask, chunks, seen, torch.device(device))

    def pictures(self, index: Tensor) -> dict[str, Tensor]:
        """Pictures by slot, float32 [B, 3, S, S] in [-1, 1], of rows ``index`` (int64 [B] on the host)."""
        return {slot: to_network_range(self._rows(frames, index)) for slot, frames in self.images.items()}

    def _rows(self, frames: Tensor, index: Tensor) -> Tensor:
        return upload(frames[upload(index, frames.device)], self.device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without making the host wait for what the device has to do before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From other memory the copy begins when the device comes to it, and until then the host stands still.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def picture_bytes(demonstrations: Demonstrations, config: Pi05Config) -> int:
    """What the pictures of a :class:`FrameSet` take."""
    return len(demonstrations) * len(demonstrations.rgb) * config.image_size**2 * 3


def _resized(
    demonstrations: Demonstrations,
    camera: str,
    episodes: Sequence[slice],
    side: int,
    device: torch.device | str,
    images_on: torch.device | str,
) -> Tensor:
    out = torch.empty(len(demonstrations), side, side, 3, dtype=torch.uint8, device=images_on)
    for episode in episodes:
        for first in range(episode.start, episode.stop, _RESIZE_BATCH):
            rows = slice(first, min(first + _RESIZE_BATCH, episode.stop))
            out[rows] = resize_with_pad(torch.from_numpy(demonstrations.frames(camera, rows)).to(device), side)
    return out


def draw_augmentation(slots: Iterable[str], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What :func:`augment` does to each picture, uniform in [-1, 1].

    Returns:
        slot -> float32 [batch, 7] on the generator's device: zoom, turn, two shifts, brightness, contrast, saturation;
        the last three alone for cameras on the wrist.
    """
    counts = {slot: (3,) if _on_wrist(slot) else (4, 3) for slot in slots}
    return {
        slot: torch.cat([_uniform((batch, count), generator) for count in parts], dim=1)
        for slot, parts in counts.items()
    }


def augment(images: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move (fixed cameras only) and recolour pictures float32 [B, 3, S, S] in [-1, 1] by :func:`draw_augmentation`."""
    changed = {}
    for slot, image in images.items():
        draw = upload(draws[slot], image.device)
        moved = image if _on_wrist(slot) else _moved(image, draw[:, :4])
        changed[slot] = _recolored(moved, draw[:, -3:])
    return changed


def _moved(image: Tensor, draw: Tensor) -> Tensor:
    zoom, turn, shift = 1.0 + MAX_ZOOM * draw[:, 0], MAX_TURN * draw[:, 1], 2.0 * MAX_SHIFT * draw[:, 2:]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    rows = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(rows, list(image.shape), align_corners=False)
    # Sampled as (x + 1), so that what comes from outside is black (-1), as the letterbox is.
    return functional.grid_sample(image + 1.0, grid, mode="bilinear", align_corners=False) - 1.0


def _recolored(image: Tensor, draw: Tensor) -> Tensor:
    factors = 1.0 + MAX_COLOR * draw
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    unit = (image + 1.0) * 0.5 * brightness
    mean = unit.mean(dim=(1, 2, 3), keepdim=True)
    unit = mean + contrast * (unit - mean)
    gray = unit.mean(dim=1, keepdim=True)
    return ((gray + saturation * (unit - gray)).clamp(0.0, 1.0)) * 2.0 - 1.0


def _on_wrist(slot: str) -> bool:
    return "wrist" in slot


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0
