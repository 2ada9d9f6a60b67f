"""Where the tensors of a checkpoint folder are: one file under several names, or shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.files import load_tensors, tensor_header

WEIGHTS = (
    "model.safetensors", "full_weights.pt", "model_state_dict/full_weights.pt",
    "actor/model_state_dict/full_weights.pt",
)  # fmt: skip
"""Names that are looked for first, in this order: openpi's and lerobot's, then RLinf's."""
_OTHERS = re.compile(r"^(heads|policy_(pre|post)processor.*)\.safetensors$")
"""What is no weights: our critic, lerobot's statistics."""
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors$")


def weights_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights of ``folder``, all of them there, or the first name looked for if there is none.

    After ``WEIGHTS`` come shards, as transformers writes them with an index (``*.safetensors.index.json``), then shards
    without one, then a single safetensors file of any name.

    Raises:
        CheckpointError: a shard is missing, or it is not clear which file is meant.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return (folder / name,)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    found = sorted(path for path in folder.glob("*.safetensors") if not _OTHERS.match(path.name))
    if len(indices) == 1:
        found = [folder / name for name in _indexed(indices[0])]
    elif any(map(_shard, found)):
        found = _all_shards(found)
    if len(indices) > 1 or (len(found) > 1 and not indices and not any(map(_shard, found))):
        names = ", ".join(path.name for path in indices or found)
        raise CheckpointError(f"{folder} holds several weights ({names}); name the right one model.safetensors")
    if missing := [path.name for path in found if not path.is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; fetch it again")
    return tuple(found) or (folder / WEIGHTS[0],)


def load_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all ``files`` by name, mapped from them where that is possible. Raises CheckpointError."""
    return _joined(load_tensors, files)


def weights_header(files: Sequence[Path]) -> dict[str, Tensor]:
    """The same without numbers (meta device) but for single ones. Raises CheckpointError."""
    return _joined(tensor_header, files)


def _joined(read: Callable[[Path], dict[str, Tensor]], files: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        part = read(path)
        if twice := sorted(set(part) & set(tensors)):
            raise CheckpointError(f"{path} holds {twice[0]}, which another shard holds too; fetch the shards again")
        tensors |= part
    return tensors


def _indexed(index: Path) -> list[str]:
    """Names of the shards that an index lists."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); fetch it again") from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index} names {strange[0]!r}, which is no file beside it; fetch it again")
    return sorted(names)


def _shard(path: Path) -> re.Match[str] | None:
    return _SHARD.match(path.name)


def _all_shards(found: Sequence[Path]) -> list[Path]:
    """All shards of the one series in ``found``, those included that are not there."""
    series = {(match["stem"], match["count"]) for match in map(_shard, found) if match}
    if len(series) > 1 or not all(map(_shard, found)):
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{found[0].parent} holds several weights ({names}); keep one series of shards")
    ((stem, count),) = series
    return [found[0].with_name(f"{stem}-{i:05d}-of-{count}.safetensors") for i in range(1, int(count) + 1)]
