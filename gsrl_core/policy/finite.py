"""Non-finite numbers in training: noticed without waiting for the device, and named."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FirstFailure:
    """Remembers, on the device, the first step whose numbers were not finite.

    Reading a number of every step on the host would keep it from preparing the next one while the device works. So
    the optimizer is told on the device to leave the weights alone from that step on, and the host looks when it
    reports or saves.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros((), dtype=torch.int64, device=device)

    def note(self, step: int, *numbers: Tensor) -> Tensor:
        """Look at the scalars ``numbers`` of ``step`` (from 1).

        Returns:
            Float32 scalar: 1 if now or before something was not finite, else 0; fused optimizers that find it as
            their ``found_inf`` leave weights and moments as they are.
        """
        failed = ~torch.stack(numbers).isfinite().all()
        self._step = torch.where((self._step == 0) & failed, step, self._step)
        return (self._step > 0).float()

    def step(self) -> int:
        """The first step that failed, 0 if none did. Waits for the device."""
        return int(self._step)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a number that is not finite."""
    if not tensors:
        return []
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, fine in zip(tensors, finite, strict=True) if not fine]
