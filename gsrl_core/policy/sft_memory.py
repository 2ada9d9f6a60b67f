"""What supervised fine-tuning keeps in memory, and whether its pictures fit beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import TrainingError
from gsrl_core.policy.storage import GIB, HOST_SHARE, Memory

PICTURE_SHARE = 0.5
"""Pictures may take this much of the device memory that the training state leaves; the rest is for activations."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that stay for the whole training; activations come on top and depend on the batch."""

    weights: int
    gradients: int
    moments: int
    """Two of AdamW, float32."""
    average: int
    pictures: int

    @classmethod
    def of(cls, parameters: Iterable[Tensor], trained: Iterable[Tensor], pictures: int) -> Footprint:
        """Of a network with these ``parameters``, of which ``trained`` (float32) change; ``pictures`` in bytes."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in trained)
        return cls(sum(tensor.numel() * tensor.element_size() for tensor in parameters), own, 2 * own, own, pictures)

    @property
    def state(self) -> int:
        """Bytes that training adds to the weights."""
        return self.gradients + self.moments + self.average

    def __str__(self) -> str:
        """All parts in GiB."""
        parts = ", ".join(f"{name} {size / GIB:.3g}" for name, size in vars(self).items())
        return f"{parts}: {(self.weights + self.state + self.pictures) / GIB:.3g} GiB"


def picture_device(needed: Footprint, free: Memory, device: torch.device) -> torch.device:
    """Where the pictures wait: on the training device if they fit there, else on the host.

    Args:
        needed: of the whole training.
        free: when the weights, and nothing else, are in their place.
        device: where training happens.

    Raises:
        TrainingError: they fit nowhere.
    """
    if device.type == "cuda" and needed.pictures <= PICTURE_SHARE * (free.device - needed.state):
        return device
    if needed.pictures > HOST_SHARE * free.host:
        raise TrainingError(
            f"the pictures take {needed.pictures / GIB:.3g} GiB; {free.device / GIB:.3g} GiB on the device and "
            f"{free.host / GIB:.3g} GiB on the host are free: train on fewer episodes"
        )
    return torch.device("cpu")
