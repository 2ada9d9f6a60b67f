"""Where a fit adds Gaussians and which it drops, under a fixed budget.

Kerbl et al. 2023 add a Gaussian wherever the gradient of its projected centre passes a threshold, which makes their
number a matter of luck. Here the budget is given and grows steadily (as in Mallick et al. 2024, Taming 3DGS): at each
densification the Gaussians with the largest accumulated gradient are cloned (small ones) or split (large ones).
The gradients are sums of absolute values per pixel (Ye et al. 2024, AbsGS), which do not cancel inside a blurred area.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.geometry.rotation import quat_to_matrix

MINIMUM_OPACITY = 0.005
SPLIT_SHRINK = 1.6
"""A split Gaussian is replaced by two that are this much smaller (Kerbl et al. 2023)."""
SMALL = 0.01
"""Gaussians whose largest axis is below this fraction of the scene's extent are cloned, larger ones are split."""
HUGE = 0.5
"""Gaussians whose largest axis exceeds this fraction of the extent are dropped."""


@dataclass
class Growth:
    """Accumulated evidence of where detail is missing."""

    gradient: Tensor
    """float32 [N]: summed absolute gradients of the projected centres."""
    seen: Tensor
    """float32 [N]: in how many pictures."""

    @staticmethod
    def empty(count: int, device: torch.device | str = "cpu") -> Growth:
        """Nothing seen yet of ``count`` Gaussians."""
        return Growth(torch.zeros(count, device=device), torch.zeros(count, device=device))

    def add(self, absolute_gradient: Tensor, radii: Tensor) -> None:
        """Count one picture: gradients [N, 2] (px) and radii [N] (px, 0 where not drawn)."""
        drawn = radii > 0
        self.gradient += torch.where(drawn, absolute_gradient.norm(dim=-1), self.gradient.new_zeros(()))
        self.seen += drawn

    def score(self) -> Tensor:
        """Mean gradient per picture [N]."""
        return self.gradient / self.seen.clamp_min(1)


def budget(step: int, last_step: int, start: int, limit: int) -> int:
    """How many Gaussians are allowed at ``step``: from ``start`` to ``limit`` along a concave curve."""
    progress = min(1.0, step / max(1, last_step))
    return start + int((limit - start) * math.sqrt(progress))


def kept(log_scales: Tensor, logit_opacities: Tensor, extent: float) -> Tensor:
    """Bool [N]: neither transparent, nor as large as the scene, nor non-finite."""
    largest = log_scales.amax(-1).exp()
    return (torch.sigmoid(logit_opacities) > MINIMUM_OPACITY) & (largest < HUGE * extent)


def grow(
    parameters: dict[str, Tensor], score: Tensor, count: int, extent: float, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Clone or split the ``count`` Gaussians with the largest score.

    Args:
        parameters: means [N, 3], quats [N, 4], log_scales [N, 3], logit_opacities [N], and harmonics, leading N.
        score: [N].
        count: how many to add.
        extent: radius of the scene.
        generator: of the places of the split halves.

    Returns:
        The parameters, longer by ``count``, and for every row the row it came from, or -1 for a new one (int64).
    """
    chosen = torch.topk(score, min(count, len(score))).indices
    large = parameters["log_scales"][chosen].amax(-1).exp() > SMALL * extent
    split, cloned = chosen[large], chosen[~large]
    grown = {name: value.clone() for name, value in parameters.items()}
    offsets = _sample(parameters, split, generator), _sample(parameters, split, generator)
    grown["means"][split] += offsets[0]
    grown["log_scales"][split] -= math.log(SPLIT_SHRINK)
    halves = {name: value[split].clone() for name, value in grown.items()}
    halves["means"] = parameters["means"][split] + offsets[1]
    # Two copies in place of one: each gets the opacity that together gives the old one (Rota Bulo et al. 2024).
    halved = torch.logit(1 - torch.sqrt(1 - torch.sigmoid(parameters["logit_opacities"][cloned]).clamp_max(0.999)))
    grown["logit_opacities"][cloned] = halved
    copies = {name: value[cloned].clone() for name, value in grown.items()}
    result = {name: torch.cat([grown[name], halves[name], copies[name]]) for name in parameters}
    origin = torch.arange(len(result["means"]), device=score.device)
    origin[len(score) :] = -1
    origin[split] = -1
    return result, origin


def _sample(parameters: dict[str, Tensor], rows: Tensor, generator: torch.Generator) -> Tensor:
    """A point of each Gaussian's own distribution, relative to its mean [n, 3]."""
    scales = parameters["log_scales"][rows].exp()
    normal = torch.randn(scales.shape, generator=generator).to(scales)
    rotation = quat_to_matrix(parameters["quats"][rows])
    return (rotation @ (normal * scales)[..., None])[..., 0]
