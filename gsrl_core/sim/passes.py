"""Batches of pictures cut into passes, so that temporary tensors stay small next to the pictures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PASS_VALUES = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Numbers in a temporary tensor of one pass: what fits a core's cache, and 128 MB (36 pictures of 640 x 480)."""


def passes(pictures: Tensor, values_each: int) -> Iterator[slice]:
    """Consecutive slices of the leading axis of ``pictures``, for work with ``values_each`` numbers for each."""
    count = len(pictures)
    together = max(1, PASS_VALUES.get(pictures.device.type, PASS_VALUES["cuda"]) // max(1, values_each))
    for start in range(0, count, together):
        yield slice(start, min(start + together, count))
