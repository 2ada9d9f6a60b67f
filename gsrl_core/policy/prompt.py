"""The prefix before it is computed: pictures and tokens without what nobody attends to.

Slots that no sample uses and text columns that no sample fills are dropped. That is exact: masked tokens are attended
by nobody and positions count valid tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gsrl_core.policy.config import IMAGE_SLOTS


@dataclass(frozen=True)
class Prompt:
    """What the network computes for B observations. Axis legend: N prefix tokens, T text columns, S image side."""

    images: tuple[Tensor, ...]
    """float [B, 3, S, S] in [-1, 1], one for each slot that some sample uses, in openpi's order."""
    tokens: Tensor
    """int64 [B, T]: the columns that some sample fills."""
    valid: Tensor
    """bool [B, N] over pictures, then text, on the device of ``tokens``."""
    complete: bool
    """Nothing is masked (the faster attention)."""
    on_host: Tensor | None = None
    """``valid`` on the host, where somebody needs to keep it there."""
    state: Tensor | None = None
    """float32 [B, A] in network units, for pi0 only: it goes to the expert, not into the prefix."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def key_mask(self) -> Tensor | None:
        """``valid`` if anything is masked, else None."""
        return None if self.complete else self.valid

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        images = {f"image{slot}": image for slot, image in enumerate(self.images)}
        state = {} if self.state is None else {"state": self.state}
        return images | {"tokens": self.tokens, "valid": self.valid} | state

    def holding(self, tensors: Mapping[str, Tensor]) -> Prompt:
        """The same with other tensors of these names."""
        images = tuple(tensors[f"image{slot}"] for slot in range(len(self.images)))
        return replace(
            self, images=images, tokens=tensors["tokens"], valid=tensors["valid"], on_host=None,
            state=tensors.get("state"),
        )  # fmt: skip


def pack(
    images: Mapping[str, Tensor], masks: Mapping[str, Tensor], tokens: Tensor, token_mask: Tensor, image_tokens: int
) -> Prompt:
    """Drop what is masked everywhere.

    What is masked decides shapes, so the masks are read on the host: keep them there, and the device is not waited for.

    Args:
        images: slot -> float [B, 3, S, S] in [-1, 1]; slots not given count as masked.
        masks: slot -> bool [B], on the host.
        tokens: int64 [B, T], padded on the right.
        token_mask: bool [B, T], on the host.
        image_tokens: of one picture.
    """
    slots = [slot for slot in IMAGE_SLOTS if slot in images and bool(masks[slot].any())]
    filled = int(token_mask.any(dim=0).sum())
    shown = [masks[slot][:, None].expand(-1, image_tokens) for slot in slots]
    valid = torch.cat([*shown, token_mask[:, :filled]], dim=1)
    shown_images = tuple(images[slot] for slot in slots)
    placed = valid.to(tokens.device, non_blocking=True)
    return Prompt(shown_images, tokens[:, :filled], placed, bool(valid.all()), on_host=valid)
