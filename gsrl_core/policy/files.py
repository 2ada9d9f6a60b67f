"""Files that appear whole or not at all: tensors, states of training, and checkpoint folders."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsrl_core.artifacts import link_or_copy
from gsrl_core.errors import CheckpointError


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dictionary in a ``.pt`` file, on the CPU.

    Raises:
        CheckpointError: missing, broken, or something else than tensors by name.
    """
    with _readable(path):
        return _state_dict(path, "cpu") if path.suffix == ".pt" else load_file(path)


def tensor_header(path: Path) -> dict[str, Tensor]:
    """The same without numbers (meta device), after the file's length was found to be right. Raises CheckpointError.

    Tensors of a single number do hold it: RLinf keeps settings in such.
    """
    if path.suffix == ".pt":
        with _readable(path):
            mapped = _state_dict(path, "cpu")
            return {name: tensor if tensor.numel() == 1 else tensor.to("meta") for name, tensor in mapped.items()}
    with _readable(path), safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        return {
            name: file.get_tensor(name) if math.prod(shape) == 1 else torch.empty(shape, device="meta")
            for name, shape in shapes.items()
        }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file({name: _whole(tensor) for name, tensor in tensors.items()}, temporary, {"format": "pt"})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _state_dict(path: Path, device: str) -> dict[str, Tensor]:
    # Only tensors and containers: a pickle of anything else could run code.
    content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it does not hold tensors by name")
    return dict(content)


def _whole(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous and with memory of its own (safetensors refuses views of one block)."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def require_replaceable(folder: Path) -> Path:
    """The folder behind ``folder`` (links followed), which can be exchanged for another by renaming.

    Raises:
        CheckpointError: it is a mount point or the working directory, or its parent cannot be written to.
    """
    folder = folder.resolve()
    if folder == Path.cwd() or folder.is_mount():
        raise CheckpointError(f"{folder} is the working directory or a mount point; name a folder inside it")
    parent = next(path for path in folder.parents if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} cannot be written to; choose another folder")
    return folder


@contextmanager
def replacing(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` when the block is done without an exception.

    What ``folder`` held beside the entries named ``own`` comes along. Killed at any moment, ``folder`` is the old one
    or the new one; between two renames it is missing for an instant, with both whole beside it under hidden names.

    Raises:
        CheckpointError: ``folder`` cannot be replaced (see :func:`require_replaceable`).
    """
    folder = require_replaceable(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in own:
                _bring(path, fresh / path.name)
        if folder.is_dir():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        for remains in (fresh, old):
            shutil.rmtree(remains, ignore_errors=True)


def _bring(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
    else:
        link_or_copy(source, target)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        kind = "state dictionary" if path.suffix == ".pt" else "safetensors file"
        raise CheckpointError(f"{path} is not a readable {kind} ({error}); fetch it again") from error
