"""PPO's losses and diagnostics, element by element: every function maps numbers of a shape to numbers of the same one.

That shape is [N] samples; for what is made of log-probabilities also [N, H] or [N, H, A], where a sample has several
ratios. Averaging is the caller's business, because a batch is spread over microbatches and processes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# exp(20) = 5e8: far outside any clip range, yet finite, so that 0 * inf cannot put NaN into the gradient of the
# branch that the clipped surrogate did not choose.
MAX_LOG_RATIO = 20.0


def log_ratio(log_prob: Float[Tensor, " N *E"], old_log_prob: Float[Tensor, " N *E"]) -> Float[Tensor, " N *E"]:
    """Log π_new(a|s) - log π_old(a|s), limited to ±20."""
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(
    log_ratio: Float[Tensor, " N *E"],
    advantages: Float[Tensor, " N *E"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, " N *E"]:
    """Clipped surrogate, to be minimised.

        L = max(-A ρ, -A clip(ρ, 1 - ε_low, 1 + ε_high)),   ρ = exp(log_ratio)
        L = min(L, -c A)  where A < 0, if ``dual_clip`` c > 1 is given

    Schulman et al. 2017 (arXiv:1707.06347, eq. 7); two-sided range as in DAPO (arXiv:2503.14476, eq. 8); dual clip
    Ye et al. 2020 (arXiv:1912.09729, eq. 5).
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def policy_clipped(
    log_ratio: Float[Tensor, " N *E"], advantages: Float[Tensor, " N *E"], *, clip_low: float, clip_high: float
) -> Bool[Tensor, " N *E"]:
    """Where the clip is active, that is, where it takes the gradient away (the seed's ``pg_clipfrac`` is its mean)."""
    ratio = log_ratio.exp()
    return torch.where(advantages > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (advantages < 0))


def huber(error: Float[Tensor, " N"], delta: float) -> Float[Tensor, " N"]:
    """e²/2 for |e| <= δ, δ (|e| - δ/2) outside (Huber 1964)."""
    size = error.abs()
    return torch.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))


def value_loss(
    value: Float[Tensor, " N"],
    old_value: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    *,
    value_clip: float,
    huber_delta: float,
) -> Float[Tensor, " N"]:
    """The worse of the huber losses of V and of V limited to V_old ± ``value_clip`` (PPO2's clipped objective)."""
    limited = old_value + (value - old_value).clamp(-value_clip, value_clip)
    return torch.maximum(huber(value - returns, huber_delta), huber(limited - returns, huber_delta))


def value_clipped(
    value: Float[Tensor, " N"], old_value: Float[Tensor, " N"], *, value_clip: float
) -> Bool[Tensor, " N"]:
    """Where V moved further than ``value_clip`` from V_old, measured before anything is limited."""
    return (value - old_value).abs() > value_clip


def kl_k1(log_ratio: Float[Tensor, " N *E"]) -> Float[Tensor, " N *E"]:
    """-log ρ: unbiased estimate of KL(old || new) from samples of old, of any sign (joschu.net/blog/kl-approx.html)."""
    return -log_ratio


def kl_k3(log_ratio: Float[Tensor, " N *E"]) -> Float[Tensor, " N *E"]:
    """(ρ - 1) - log ρ: unbiased estimate of KL(old || new) that is never negative (same source)."""
    return log_ratio.expm1() - log_ratio
