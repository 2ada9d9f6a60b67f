"""The arrays that physics backends fill, laid out so that one block of shared memory can hold them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import numpy as np

from gsrl_core.sim import fr3

_MAX_ACTION_DIM = 8
# name -> (dtype, shape of one environment's entry); H: the longest action chunk, K: the objects, M: links and objects.
_FIELDS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "actions": ("f4", ("H", _MAX_ACTION_DIM)),
    "body_to_world": ("f4", ("M", 4, 4)),
    "tcp_to_world": ("f4", (4, 4)),
    "qpos": ("f4", (9,)),
    "qvel": ("f4", (9,)),
    "velocities": ("f4", ("K", 6)),
    "elapsed": ("i4", ()),
    "executed": ("i4", ()),
    "success": ("u1", ()),
    "success_seed": ("u1", ()),
    "parts": ("u1", (4,)),
    "busy": ("u1", ()),
    "lost": ("u1", ()),
}
_NOT_RECORDED = ("actions", "busy", "lost")
PARTS = ("inside", "resting", "released", "still")
"""Names of the columns of ``parts``."""


@dataclass(frozen=True)
class States:
    """One entry per environment in every array; the first axis is the environment."""

    actions: np.ndarray
    """float32 [B, H, 8]: the chunk to execute; unused columns are ignored."""
    body_to_world: np.ndarray
    """float32 [B, M, 4, 4], bodies in the order of ``task.body_names``."""
    tcp_to_world: np.ndarray
    """float32 [B, 4, 4]."""
    qpos: np.ndarray
    """float32 [B, 9]: rad, m."""
    qvel: np.ndarray
    """float32 [B, 9]: rad/s, m/s."""
    velocities: np.ndarray
    """float32 [B, K, 6]: of the task's objects, linear (m/s) and angular (rad/s)."""
    elapsed: np.ndarray
    """int32 [B]: control steps since the reset."""
    executed: np.ndarray
    """int32 [B]: control steps of the last chunk."""
    success: np.ndarray
    """uint8 [B]: strict success was reached."""
    success_seed: np.ndarray
    """uint8 [B]: the seed's success was met at some step."""
    parts: np.ndarray
    """uint8 [B, 4]: the parts of strict success now, see :data:`PARTS`."""
    busy: np.ndarray
    """uint8 [B]: a worker is stepping this environment; tells what a dead one was doing."""
    lost: np.ndarray
    """uint8 [B]: the simulation crashed in this episode; the rest of the entry is what it was before the chunk."""


def size_in_bytes(num_envs: int, horizon: int, objects: int) -> int:
    """Length of the block that :func:`view` needs for a task with so many objects."""
    return sum(_entry_bytes(name, num_envs, horizon, objects) for name in _FIELDS)


def view(block: mmap.mmap | bytearray, num_envs: int, horizon: int, objects: int) -> States:
    """The arrays on top of ``block``; writers and readers of the same block see each other."""
    arrays, offset = {}, 0
    for name, (dtype, _) in _FIELDS.items():
        shape = _shape(name, num_envs, horizon, objects)
        arrays[name] = np.frombuffer(block, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
        offset += _entry_bytes(name, num_envs, horizon, objects)
    return States(**arrays)


def snapshot(states: States) -> States:
    """A copy of what episodes record; actions and flags of the machinery are shared with ``states``."""
    recorded = [name for name in _FIELDS if name not in _NOT_RECORDED]
    return replace(states, **{name: getattr(states, name).copy() for name in recorded})


def restore(states: States, saved: States, which: np.ndarray) -> None:
    """Put back what :func:`snapshot` copied, in the environments ``which`` (bool [B])."""
    for name in _FIELDS:
        if name not in _NOT_RECORDED:
            getattr(states, name)[which] = getattr(saved, name)[which]


def _shape(name: str, num_envs: int, horizon: int, objects: int) -> tuple[int, ...]:
    sizes = {"H": horizon, "K": objects, "M": len(fr3.LINKS) + objects}
    return (num_envs, *(sizes[axis] if isinstance(axis, str) else axis for axis in _FIELDS[name][1]))


def _entry_bytes(name: str, num_envs: int, horizon: int, objects: int) -> int:
    size = int(np.prod(_shape(name, num_envs, horizon, objects))) * np.dtype(_FIELDS[name][0]).itemsize
    return -(-size // 64) * 64  # cache lines are not shared between arrays
