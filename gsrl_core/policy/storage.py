"""Where the prefixes of a rollout stay until the update: on the device, pinned on the host, or nowhere.

The frozen part gives the same keys, values and pooled features in every update epoch. At full size they take 5 MB a
sample, 51 GB for 10,240 samples. Where that does not fit, they wait in host memory; where that is too small as well,
pictures and tokens are kept instead, and every look at a sample runs the vision-language model again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gsrl_core.policy.pi05 import PrefixCache
from gsrl_core.policy.prompt import Prompt

logger = logging.getLogger(__name__)

Place = Literal["device", "host", "recompute"]
GIB = 1 << 30
SHARE = 0.9
"""Of the free device memory that may be planned with; the rest is lost between blocks."""
HOST_SHARE = 0.6
"""Of the free host memory: pinned blocks are rounded up, and others need some as well."""


@dataclass(frozen=True)
class Extent:
    """How much of a batch of rows is used. Read on the host, so that the device is not waited for."""

    columns: int
    """Up to the last valid one of any row."""
    complete: bool
    """All of them are valid in all rows."""


@dataclass(frozen=True)
class Memory:
    """Free bytes."""

    device: int
    host: int


def choose(wanted: Literal["auto"] | Place, needed: int, reserve: int, free: Memory, *, on_host: bool) -> Place:
    """The first place that is large enough, or the one that is wanted.

    Args:
        wanted: ``auto`` or a place.
        needed: bytes of all prefixes that are kept at once.
        reserve: bytes that the update will need beside them on the device.
        free: before any of both was allocated.
        on_host: the device is the CPU, so that there is one memory.
    """
    if wanted != "auto":
        return wanted
    if on_host:
        return "device" if needed + reserve <= HOST_SHARE * free.host else "recompute"
    if needed + reserve <= SHARE * free.device:
        return "device"
    return "host" if needed <= HOST_SHARE * free.host else "recompute"


class PrefixStore:
    """Turns the prefixes of a batch into rows of a chain, and rows back into prefixes."""

    def __init__(
        self, wanted: Literal["auto"] | Place = "device", samples: int = 0, micro_batch: int = 0, trained: int = 0
    ) -> None:
        """Plan.

        Args:
            wanted: as for :func:`choose`.
            samples: rows that are kept at once.
            micro_batch: rows that are fetched at once.
            trained: parameters that the update has gradients and moments of.
        """
        self._wanted, self._samples, self._micro_batch, self._trained = wanted, samples, micro_batch, trained
        self.place: Place | None = None
        """Decided with the first batch, whose rows have a size."""

    def keep(self, prompt: Prompt, found: Mapping[str, Tensor], columns: int) -> dict[str, Tensor]:
        """Rows of a chain; their mask stays on the host, where :meth:`extent` reads it.

        Args:
            prompt: what was inferred, from :func:`~gsrl_core.policy.prompt.pack`.
            found: ``keys``, ``values`` [B, L, G, N, D] and ``pooled`` [B, W].
            columns: length that all rows are padded to, so that those of different batches can be stacked.
        """
        missing = columns - prompt.valid.shape[1]
        keys, values = found["keys"], found["values"]
        if self.place is None:
            row = 2 * keys[0].numel() // keys.shape[-2] * columns * keys.element_size()
            self.place = self._choose(row, keys.device)
        assert prompt.on_host is not None
        rows = {"prefix_valid": functional.pad(prompt.on_host, (0, missing)), "pooled": found["pooled"]}
        if self.place == "recompute":
            # The pictures were bytes.
            images = {name: _bytes(tensor) for name, tensor in prompt.tensors().items() if name.startswith("image")}
            return rows | images | {"tokens": functional.pad(prompt.tokens, (0, missing))}
        rows |= {
            f"prefix_{name}": functional.pad(t, (0, 0, 0, missing)) for name, t in (("keys", keys), ("values", values))
        }
        return rows if self.place == "device" else {name: _pinned(tensor) for name, tensor in rows.items()}

    @staticmethod
    def extent(rows: Mapping[str, Tensor]) -> Extent:
        """Of rows as they were kept."""
        valid = rows["prefix_valid"]
        columns = int(valid.any(dim=0).nonzero().amax()) + 1
        return Extent(columns, bool(valid[:, :columns].all()))

    @staticmethod
    def fetch(rows: Mapping[str, Tensor], extent: Extent, run_prefix: Callable[[Prompt], PrefixCache]) -> PrefixCache:
        """The prefixes of rows that are on the device again; ``run_prefix`` computes those that were not kept."""
        columns = extent.columns
        valid = rows["prefix_valid"][:, :columns]
        if "prefix_keys" in rows:
            keys, values = (rows[f"prefix_{name}"][..., :columns, :] for name in ("keys", "values"))
            return PrefixCache.restore(keys, values, valid, complete=extent.complete)
        images = tuple(rows[name].float() / 255.0 * 2.0 - 1.0 for name in sorted(rows) if name.startswith("image"))
        text = rows["tokens"].shape[1] - (rows["prefix_valid"].shape[1] - columns)
        with torch.no_grad():
            return run_prefix(Prompt(images, rows["tokens"][:, :text], valid, extent.complete))

    def _choose(self, row: int, device: torch.device) -> Place:
        needed, free = row * self._samples, free_memory(device)
        reserve = update_bytes(self._trained, self._micro_batch, row)
        place = choose(self._wanted, needed, reserve, free, on_host=device.type != "cuda")
        logger.info(
            "prefixes of %d samples: %.3g MiB each, %.3g GiB in all, and %.3g GiB for the update; free are %.3g GiB on "
            "the device and %.3g GiB on the host: %s", self._samples, row / (1 << 20), needed / GIB,
            reserve / GIB, free.device / GIB, free.host / GIB, place,
        )  # fmt: skip
        return place


def update_bytes(trained: int, micro_batch: int, row: int) -> int:
    """What an update takes on the device beside the prefixes: gradients, two moments, copies and activations.

    Args:
        trained: float32 parameters. The copies are at most one of them all at any time: weights in the activations'
            dtype during a pass, gradients on their way to other processes after it.
        micro_batch: samples of a pass.
        row: bytes of a prefix. A pass gathers it and joins it with the expert's own keys and values for autograd, and
            what else autograd keeps of the full-size expert is three quarters of it (measured with chunks of 5).
    """
    return trained * 16 + micro_batch * row * 4


def free_memory(device: torch.device) -> Memory:
    """Free bytes of a device (with what torch has cached) and of the host."""
    host = _free_on_host()
    if device.type != "cuda":
        return Memory(0, host)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(torch.cuda.mem_get_info(device)[0] + cached, host)


def _free_on_host() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()).isdigit():
        free = min(free, int(bound) - int(used.read_text()))
    return max(0, free)


def _bytes(image: Tensor) -> Tensor:
    return ((image + 1.0) * 127.5).round().to(torch.uint8)


def _pinned(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
