"""States of unfinished training on disk: whole or not at all, and a torn one is no reason to stop."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gsrl_core.errors import TrainingError

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

    Raises:
        TrainingError: it is whole and lacks an entry, so that another version wrote it: hours of work may be in it.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it is no state")
    except Exception as error:  # torch.load raises a dozen classes for torn files
        logger.warning("%s cannot be read (%s): this work starts anew", path, error)
        return None
    if lacking := [name for name in entries if name not in state]:
        raise TrainingError(
            f"{path} was written by another version of this program (it lacks {', '.join(lacking)}); go on with that "
            "version, or delete the file to start anew"
        )
    return state
