"""Demonstrations on disk: shards of memory-mapped arrays, one row a control step.

<folder>/demos.json                 cameras, control rate, counts
<folder>/settings.json              what the shards were made from
<folder>/shard-<first seed>/        rgb.<camera>.npy uint8 [n, h, w, 3]   state.npy float32 [n, S]
                                    action.npy float32 [n, A]             seed.npy int64 [n]
                                    instructions.json  episode seed -> sentence
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsrl_core.artifacts import write_json
from gsrl_core.errors import TrainingError

HELD_OUT_EVERY = 20
"""Every n-th episode measures the loss and is not trained on."""
_CAMERA = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Episode:
    """One successful episode of n control steps; the action of row i was chosen from its picture and state."""

    seed: int
    instruction: str
    rgb: Mapping[str, np.ndarray]
    """Camera name -> uint8 [n, h, w, 3]."""
    state: np.ndarray
    """float32 [n, S]."""
    action: np.ndarray
    """float32 [n, A], control units, without the disturbance."""


@dataclass(frozen=True)
class Demonstrations:
    """All shards side by side; n rows in all."""

    rgb: Mapping[str, tuple[np.ndarray, ...]]
    """Camera name -> one memory map per shard, uint8 [n_k, h, w, 3]."""
    state: Tensor
    """float32 [n, S]."""
    action: Tensor
    """float32 [n, A]."""
    seed: Tensor
    """int64 [n]: the episode that a row belongs to."""
    instructions: Mapping[int, str]
    """Episode seed -> sentence."""

    def __len__(self) -> int:
        return len(self.seed)

    def episodes(self) -> list[slice]:
        """The rows of each episode, in order."""
        starts = [0, *((self.seed[1:] != self.seed[:-1]).nonzero().squeeze(1) + 1).tolist(), len(self)]
        return [slice(first, last) for first, last in pairwise(starts)]

    def frames(self, camera: str, rows: slice) -> np.ndarray:
        """uint8 [len(rows), h, w, 3] of a contiguous range of rows."""
        pieces, first = [], 0
        for shard in self.rgb[camera]:
            low, high = max(rows.start - first, 0), min(rows.stop - first, len(shard))
            if low < high:
                pieces.append(shard[low:high])
            first += len(shard)
        return np.concatenate(pieces)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Say in a new ``folder`` what its shards are made from, so that shards of different origin do not mix.

    Args:
        folder: of demonstrations; exists.
        settings: plain JSON that decides the content of the shards.

    Raises:
        TrainingError: it was claimed with other settings.
    """
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    elif json.loads(path.read_text()) != settings:
        raise TrainingError(
            f"{folder} holds demonstrations of another scene, another dataset or other settings; choose another folder "
            "or delete it"
        )


def shard_folder(folder: Path, first_seed: int) -> Path:
    """Where the shard that begins at this seed is."""
    return folder / f"shard-{first_seed:010d}"


def check_camera_names(names: Iterable[str], where: str) -> None:
    """Raise TrainingError for a name that cannot be part of a file's name; ``where`` begins its message."""
    if strange := [name for name in names if not _CAMERA.fullmatch(name)]:
        raise TrainingError(
            f"{where}: {strange[0]!r} cannot be a camera's name here: only letters, digits, '_', '.' and '-'"
        )


def write_shard(folder: Path, first_seed: int, episodes: Sequence[Episode]) -> None:
    """Write a shard whole or not at all; a shard without episodes is legal (all attempts failed).

    Raises:
        TrainingError: a camera's name cannot be part of a file's name.
    """
    check_camera_names(episodes[0].rgb if episodes else (), str(folder))
    temporary = folder / f".shard-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        for camera in episodes[0].rgb if episodes else ():
            np.save(temporary / f"rgb.{camera}.npy", np.concatenate([episode.rgb[camera] for episode in episodes]))
        for name in ("state", "action") if episodes else ():
            rows = np.concatenate([getattr(episode, name) for episode in episodes])
            np.save(temporary / f"{name}.npy", rows.astype(np.float32))
        seeds = [np.full(len(episode.action), episode.seed, np.int64) for episode in episodes]
        np.save(temporary / "seed.npy", np.concatenate(seeds) if seeds else np.zeros(0, np.int64))
        sentences = {str(episode.seed): episode.instruction for episode in episodes}
        (temporary / "instructions.json").write_text(json.dumps(sentences))
        temporary.rename(shard_folder(folder, first_seed))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_demonstrations(folder: Path) -> Demonstrations:
    """Open all shards of a folder; pictures stay on disk.

    Raises:
        TrainingError: no shards, no successful episode, or a broken shard.
    """
    shards = sorted(folder.glob("shard-*"))
    if not shards:
        raise TrainingError(f"no demonstrations in {folder}; make them with `real2sim2real demos` or `dataset import`")
    rgb: dict[str, list[np.ndarray]] = {}
    state, action, seed, instructions = [], [], [], {}
    for shard in shards:
        try:
            seeds = np.load(shard / "seed.npy")
            if not len(seeds):
                continue
            arrays = [np.load(shard / "state.npy"), np.load(shard / "action.npy")]
            pictures = {path.name[4:-4]: np.load(path, mmap_mode="r") for path in sorted(shard.glob("rgb.*.npy"))}
            sentences = json.loads((shard / "instructions.json").read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"demonstrations in {shard} are broken ({error}); delete the shard and run again"
            ) from error
        if any(len(array) != len(seeds) for array in (*arrays, *pictures.values())) or (
            rgb and set(rgb) != set(pictures)
        ):
            raise TrainingError(f"the arrays of {shard} do not belong together; delete the shard and run again")
        for camera, frames in pictures.items():
            rgb.setdefault(camera, []).append(frames)
        state.append(arrays[0])
        action.append(arrays[1])
        seed.append(seeds)
        instructions |= {int(key): text for key, text in sentences.items()}
    if not seed:
        raise TrainingError(f"no episode in {folder} succeeded; look at the expert in this scene before training")
    return Demonstrations(
        {camera: tuple(parts) for camera, parts in rgb.items()},
        *(torch.from_numpy(np.concatenate(parts)) for parts in (state, action, seed)),
        instructions,
    )


def split_rows(demonstrations: Demonstrations) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to measure on, int64 each: none of a handful of episodes, too few to hold any out."""
    rows = torch.arange(len(demonstrations))
    episodes = demonstrations.episodes()
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    for episode in episodes[::HELD_OUT_EVERY] if len(episodes) >= HELD_OUT_EVERY else ():
        held_out[episode] = True
    return rows[~held_out], rows[held_out]


def action_chunks(action: Tensor, episodes: Sequence[slice], horizon: int) -> Tensor:
    """The next ``horizon`` actions at each row, [n, A] -> [n, H, A].

    Past the end of an episode the robot stands still: zero motion and the last gripper command (last entry).
    """
    chunks = action.new_zeros(len(action), horizon, action.shape[1])
    for rows in episodes:
        own = action[rows]
        still = torch.zeros_like(own[-1])
        still[-1] = own[-1, -1]
        padded = torch.cat([own, still.expand(horizon, -1)])
        chunks[rows] = padded.unfold(0, horizon, 1)[: len(own)].transpose(1, 2)
    return chunks
