"""The loss of flow matching on a batch of demonstrations. Axis legend: B batch, H horizon, A action width (padded)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.policy.flow import flow_matching_target, sample_training_time
from gsrl_core.policy.frames import FrameSet, augment, draw_augmentation, upload
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.prompt import pack


@dataclass(frozen=True)
class Batch:
    """Rows of the data and all that is random about them, on the host."""

    index: Tensor
    """int64 [B]."""
    noise: Tensor
    """Standard normal [B, H, A]."""
    t: Tensor
    """float32 [B] in (0, 1]."""
    changes: dict[str, Tensor]
    """slot -> draws of the augmentation, float32 [B, k]; empty for pictures as they are."""

    @classmethod
    def draw(cls, frames: FrameSet, index: Tensor, generator: torch.Generator, *, augmented: bool) -> Batch:
        """The rows ``index`` [B] of ``frames`` with noise, times and changes from ``generator`` (on the host)."""
        noise = torch.randn((len(index), *frames.chunks.shape[1:]), generator=generator)
        t = sample_training_time(len(index), generator)
        changes = draw_augmentation(frames.images, len(index), generator) if augmented else {}
        return cls(index, noise, t, changes)

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most ``size`` rows, in order."""
        for first in range(0, len(self.index), size):
            rows = slice(first, first + size)
            changes = {slot: draws[rows] for slot, draws in self.changes.items()}
            yield Batch(self.index[rows], self.noise[rows], self.t[rows], changes)


def matching_loss(network: Pi05, frames: FrameSet, batch: Batch) -> Tensor:
    """Mean squared error of the velocity over rows, horizon and padded width; float32 scalar."""
    device, index = network.action_in_proj.weight.device, batch.index
    pair = flow_matching_target(frames.chunks[index], batch.noise, batch.t)
    x_t, target = (upload(part, device) for part in pair)
    images = frames.pictures(index)
    if batch.changes:
        images = augment(images, batch.changes)
    masks = dict.fromkeys(images, torch.ones(len(index), dtype=torch.bool))
    prompt = pack(
        images, masks, upload(frames.tokens[index], device), frames.token_mask[index], network.config.image_tokens
    )
    # What the last layer makes of its keys and values reaches nobody here.
    prefix = network.run_prefix(prompt, features=False)
    if frames.state is not None:
        prefix = network.with_state(prefix, upload(frames.state[index], device))
    velocity = network.velocity(prefix, x_t, upload(batch.t, device))
    return (velocity - target).square().mean()
