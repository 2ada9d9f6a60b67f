"""How disc-like or needle-like Gaussians are (effective rank, Hyung et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

NEEDLE_RANK = 1.02
"""Below this effective rank a Gaussian is a needle (the value of the paper)."""


def effective_rank(log_scales: Tensor) -> Tensor:
    """Exp of the entropy of the normalised squared scales: 1 for a needle, 2 for a disc, 3 for a ball.

    Args:
        log_scales: [N, 3], natural logarithm of the standard deviations.

    Returns:
        [N], differentiable.
    """
    share = torch.softmax(2 * log_scales, dim=-1)
    return (-(share * share.clamp_min(1e-12).log()).sum(-1)).exp()


def needle_penalty(log_scales: Tensor) -> Tensor:
    """Mean of max(0, -ln(rank - 1)): nothing for discs and balls, the more the closer to a needle.

    A needle shows only in the photos that it was fitted to; from elsewhere it sticks out of the surface.
    """
    return (-(effective_rank(log_scales) - 1 + 1e-5).log()).clamp_min(0).mean()
