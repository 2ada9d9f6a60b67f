"""Weights on their way from those who train to those who infer: only tensors that changed, with version numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import WorkerError
from gsrl_core.sharding import whole


@dataclass(frozen=True)
class WeightUpdate:
    """Tensors that differ between two versions; ``base`` None means that all are here."""

    version: int
    base: int | None
    tensors: Mapping[str, Tensor]
    """On the CPU."""


class WeightPublisher:
    """Remembers (in host memory) what was sent last, and sends what differs from it bit by bit."""

    def __init__(self) -> None:
        self._sent: dict[str, Tensor] = {}
        self._version = 0

    def changes(self, weights: Mapping[str, Tensor]) -> WeightUpdate:
        """The tensors that changed since the last call; the first time all. Sharded ones are sent whole."""
        changed = {}
        for name, tensor in weights.items():
            now = whole(tensor.detach()).to("cpu", copy=True)
            if name not in self._sent or not torch.equal(now, self._sent[name]):
                changed[name] = self._sent[name] = now
        base = self._version or None
        self._version += 1
        return WeightUpdate(self._version, base, changed)

    def everything(self) -> WeightUpdate:
        """The state after the last :meth:`changes`, for a receiver that starts anew."""
        return WeightUpdate(self._version, None, dict(self._sent))


class WeightReceiver:
    """Writes updates into the weights of a policy, in order."""

    def __init__(self) -> None:
        self.version = 0

    def apply(self, update: WeightUpdate, weights: Mapping[str, Tensor]) -> None:
        """Copy the update into ``weights`` in place.

        Raises:
            WorkerError: an update in between was missed, or names or shapes differ.
        """
        if update.base is not None and update.base != self.version:
            raise WorkerError(
                f"weights of version {update.version} change version {update.base}, but this worker has "
                f"{self.version}; send it all weights"
            )
        misfits = [
            name
            for name, tensor in update.tensors.items()
            if name not in weights or weights[name].shape != tensor.shape
        ]
        if misfits:
            raise WorkerError(f"weights {', '.join(sorted(misfits)[:5])} do not exist here in that shape")
        with torch.no_grad():
            for name, tensor in update.tensors.items():
                weights[name].copy_(tensor)
        self.version = update.version
