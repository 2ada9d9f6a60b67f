"""What happens to pictures, states and actions between the environment and the network; frozen and invertible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from gsrl_core.errors import CheckpointError

EPS = 1e-6
STATISTICS = ("mean", "std", "q01", "q99")
NEEDED: Mapping[str, tuple[str, str]] = {"quantile": ("q01", "q99"), "mean_std": ("mean", "std")}
"""What each normalisation computes with."""
BINS = 256


@dataclass(frozen=True)
class FieldStats:
    """Statistics of one vector over the training data, each float32 [D]; NaN where the training run kept none."""

    mean: Tensor
    std: Tensor
    q01: Tensor
    q99: Tensor

    @classmethod
    def of(cls, data: Tensor) -> FieldStats:
        """Over the rows of [n, D]; exact for any n, in the memory of a few columns."""
        columns = [_column_stats(data[:, index].double()) for index in range(data.shape[1])]
        return cls(*torch.tensor(columns, dtype=torch.float64).T.float().contiguous())


@dataclass(frozen=True)
class Normalizer:
    """Map a vector to network units and back.

    quantile (pi0.5): y = 2 (x - q01) / (q99 - q01 + 1e-6) - 1; mean_std (pi0): y = (x - mean) / (std + 1e-6).
    """

    stats: FieldStats
    mode: Literal["quantile", "mean_std"] = "quantile"

    @property
    def width(self) -> int:
        """D, the number of real (unpadded) entries."""
        return self.stats.mean.numel()

    def normalize(self, x: Tensor) -> Tensor:
        """[..., D] in physical units -> [..., D] in network units."""
        offset, scale = self._affine(x)
        return (x - offset) / scale

    def denormalize(self, y: Tensor) -> Tensor:
        """[..., >= D] in network units -> [..., D] in physical units; padding is cut off."""
        offset, scale = self._affine(y)
        return y[..., : self.width] * scale + offset

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        stats = self.stats
        if self.mode == "mean_std":
            offset, scale = stats.mean, stats.std + EPS
        else:
            scale = 0.5 * (stats.q99 - stats.q01 + EPS)
            offset = stats.q01 + scale
        return offset.to(like), scale.to(like)


def norm_stats_to_json(state: FieldStats, actions: FieldStats) -> dict[str, Any]:
    """The content of openpi's norm_stats.json; statistics that are not known are left out."""
    fields = {"state": state, "actions": actions}
    return {
        "norm_stats": {
            name: {key: row.tolist() for key in STATISTICS if not (row := getattr(stats, key)).isnan().any()}
            for name, stats in fields.items()
        }
    }


def norm_stats_from_json(
    content: Any, source: str, needed: Sequence[str] = STATISTICS, padded_width: int | None = None
) -> tuple[FieldStats, FieldStats]:
    """State and action statistics of a parsed norm_stats.json.

    Args:
        content: openpi's: ``norm_stats`` -> ``state`` and ``actions`` -> statistic -> list of D numbers.
        source: what errors call it.
        needed: statistics that must be there; others become NaN where they are not.
        padded_width: openpi computes statistics of vectors padded with zeros to the network's width. Where D is that
            width, trailing all-zero entries are cut off.

    Raises:
        CheckpointError: a field or a needed statistic is missing, not numbers, of uneven length or not finite.
    """
    tree = content.get("norm_stats", content) if isinstance(content, Mapping) else None
    if not isinstance(tree, Mapping) or not {"state", "actions"} <= set(tree):
        raise CheckpointError(f"{source}: expected norm_stats with 'state' and 'actions'; compute the statistics again")
    state, actions = (_field(tree[name], f"{source}: {name}", needed, padded_width) for name in ("state", "actions"))
    return state, actions


def _field(values: Any, source: str, needed: Sequence[str], padded_width: int | None) -> FieldStats:
    missing = [name for name in needed if not isinstance(values, Mapping) or name not in values]
    if missing:
        raise CheckpointError(f"{source} needs {', '.join(needed)} and lacks {', '.join(missing)}")
    given = [name for name in STATISTICS if name in values]
    listed = ", ".join(given)
    try:
        rows = torch.tensor([values[name] for name in given], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {listed} must be equally long lists of numbers") from error
    if rows.ndim != 2 or not rows.shape[1] or not rows.isfinite().all():
        raise CheckpointError(f"{source}: {listed} must be non-empty lists of finite numbers")
    if rows.shape[1] == padded_width and rows.any():
        rows = rows[:, : int(rows.abs().amax(dim=0).nonzero().amax()) + 1]
    found = dict.fromkeys(STATISTICS, torch.full_like(rows[0], torch.nan)) | dict(zip(given, rows, strict=True))
    if (found["q99"] < found["q01"]).any():
        raise CheckpointError(f"{source}: q99 is below q01; compute the statistics again")
    return FieldStats(**found)


def _column_stats(column: Tensor) -> tuple[float, float, float, float]:
    """Mean, standard deviation (of the population), 1 % and 99 % quantiles of float64 [n]."""
    # torch.quantile refuses more than 2^24 entries.
    order = column.sort().values
    return column.mean().item(), column.std(correction=0).item(), _quantile(order, 0.01), _quantile(order, 0.99)


def _quantile(order: Tensor, q: float) -> float:
    """Linear interpolation between the neighbours in a sorted column."""
    place = q * (len(order) - 1)
    low = int(place)
    high = min(low + 1, len(order) - 1)
    return torch.lerp(order[low], order[high], place - low).item()


def resize_with_pad(images: Tensor, size: int) -> Tensor:
    """Fit pictures into a square, keeping their shape, with black borders (openpi's resize_with_pad).

    The same as PIL's bilinear (antialiased) resize to within one level, on any device.

    Args:
        images: uint8 [B, h, w, 3].
        size: side of the square [px].

    Returns:
        uint8 [B, size, size, 3]
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    ratio = max(width / size, height / size)
    new_height, new_width = max(1, int(height / ratio)), max(1, int(width / ratio))
    top, left = (size - new_height) // 2, (size - new_width) // 2
    planes = images.permute(0, 3, 1, 2).contiguous().float()
    # PIL resizes along x, rounds to bytes, then along y.
    planes = _to_levels(planes @ _triangle_filter(width, new_width, images.device).T)
    planes = _to_levels(_triangle_filter(height, new_height, images.device) @ planes)
    out = images.new_zeros(images.shape[0], size, size, 3)
    out[:, top : top + new_height, left : left + new_width] = planes.permute(0, 2, 3, 1).to(torch.uint8)
    return out


@lru_cache(maxsize=64)
def _triangle_filter(old: int, new: int, device: torch.device) -> Tensor:
    """PIL's antialiased bilinear weights float32 [new, old]: a triangle as wide as the reduction, rows sum to 1."""
    scale = old / new
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    pixel = torch.arange(old, dtype=torch.float64) + 0.5
    weight = (1.0 - (pixel[None, :] - centre[:, None]).abs() / max(scale, 1.0)).clamp(min=0.0)
    return (weight / weight.sum(dim=1, keepdim=True)).float().to(device)


def _to_levels(planes: Tensor) -> Tensor:
    return planes.add_(0.5).floor_().clamp_(0, 255)


def to_network_range(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0


def discretize_state(state: Tensor) -> Tensor:
    """Normalised state [..., D] -> int64 bins: 0..255 over [-1, 1), 255 above, -1 below (as openpi's digitize)."""
    edges = torch.linspace(-1.0, 1.0, BINS + 1, dtype=torch.float64, device=state.device)[:-1]
    return torch.bucketize(state.double(), edges, right=True) - 1


def pad_last(x: Tensor, width: int) -> Tensor:
    """[..., D] -> [..., width] with zeros.

    Raises:
        CheckpointError: D is larger than ``width``.
    """
    if x.shape[-1] > width:
        raise CheckpointError(f"a vector of {x.shape[-1]} entries does not fit the network's {width}")
    return functional.pad(x, (0, width - x.shape[-1]))
