"""States of unfinished training on disk: whole or not at all, and a torn one is no reason to stop."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def save_state(path: Path, state: object) -> None:
    """``torch.save`` whole or not at all, on the disk when it returns; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, entries: Collection[str], device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What :func:`save_state` wrote, or None with a warning if it is damaged, and None if there is nothing.

    Args:
        path: the file.
        entries: keys that must be there.
        device: where tensors go.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not set(entries) <= set(state):
            raise ValueError("it lacks entries")
    except Exception as error:  # torch.load raises a dozen classes for torn files
        logger.warning("%s cannot be read (%s): this work starts anew", path, error)
        return None
    return state
