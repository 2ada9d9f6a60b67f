"""Batches of pictures cut into passes, so that temporary tensors stay small next to the pictures."""

from __future__ import annotations

from collections.abc import Iterator

PASS_VALUES = 1 << 25
"""Numbers in a temporary tensor of one pass: 128 MB in float32, 36 pictures of 640 x 480."""


def passes(count: int, values_each: int) -> Iterator[slice]:
    """Consecutive slices of ``range(count)`` for items of ``values_each`` numbers each."""
    together = max(1, PASS_VALUES // max(1, values_each))
    for start in range(0, count, together):
        yield slice(start, min(start + together, count))
