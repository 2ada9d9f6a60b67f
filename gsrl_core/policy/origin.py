"""What a checkpoint's file held, for the next checkpoint: what was not trained is written back bit by bit."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """The files that a policy was read from, if any.

    Weights that are computed with in fewer bits than they are stored in cannot be made again from the network. Their
    originals stay mapped from the file: that takes address space but no memory (11 GB for the float32 weights of the
    full size), and lasts even if the file is deleted or replaced, because the mapping keeps the old content. It does
    not outlive a change of the file in place, nor do carried tensors, which stay mapped likewise.
    """

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Of all tensors in the files, by canonical name."""
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    """Mapped tensors that the network holds rounded, by canonical name."""
    stamps: Mapping[Path, tuple[int, int, int]] = field(default_factory=dict)
    """Inode, size [bytes] and modification time [ns] of the files when they were read."""
    kept: Sequence[mmap.mmap] = ()
    """A byte of each file, so that no other file gets its inode when it is deleted."""

    def __deepcopy__(self, memo: object) -> Origin:
        # A copy of the network has the same origin; copied tensors would be memory.
        return self

    @classmethod
    def of(cls, files: Sequence[Path], stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> Origin:
        """Remember ``stored``, mapped from ``files``, where the network's ``dtypes`` cannot hold all of its bits.

        To be called before the tensors are copied, so that a change of the files meanwhile is found.
        """
        originals = {
            name: tensor
            for name, tensor in stored.items()
            if torch.promote_types(tensor.dtype, dtypes[name]) != dtypes[name]
        }
        stamps, kept = {}, []
        for path in files:
            with path.open("rb") as file:
                stamps[path] = _stamp(path)
                kept.append(mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ))
        return cls({name: tensor.dtype for name, tensor in stored.items()}, originals, stamps, kept)

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The original of a tensor of the network if it was not trained, else in the fewest bits that hold it exactly.

        To be called after :meth:`require_unchanged`.
        """
        if name in self.originals:
            original = self.originals[name]
            return original if torch.equal(original.to(tensor), tensor) else tensor
        narrow = tensor.to(self.dtypes.get(name, tensor.dtype))
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

    def require_unchanged(self) -> None:
        """Raise CheckpointError if a file was written to since it was read, so that what is mapped from it is lost."""
        for path, stamp in self.stamps.items():
            try:
                now = _stamp(path)
            except OSError:
                continue  # deleted: the mapping keeps the content
            if now[0] == stamp[0] and now != stamp:
                raise CheckpointError(
                    f"{path} was written to while a policy that was read from it was trained; put the original back "
                    "and run again: training goes on from its last saved state"
                )


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
