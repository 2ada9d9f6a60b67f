"""Generalised advantage estimation over action chunks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def generalized_advantages(
    reward: Float[Tensor, "T B"],
    value: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    truncated: Bool[Tensor, "T B"],
    valid: Bool[Tensor, "T B"],
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "T B"], Float[Tensor, "T B"]]:
    """Advantages A and returns A + V, with the discount counted per chunk.

        δ_t = r_t + γ (1 - terminated_t) V'_t - V_t
        A_t = δ_t + γ λ (1 - terminated_t) (1 - truncated_t) valid_{t+1} A_{t+1}

    Schulman et al. 2016 (arXiv:1506.02438, eq. 16), with the two ends of an episode told apart (Pardo et al. 2018,
    arXiv:1712.00378): a terminated chunk has no future, a truncated one is worth the critic's value of the
    observation it ended in.

    Args:
        reward: summed over the executed actions of the chunk.
        value: V_t, critic of the observation the chunk was chosen in.
        next_value: V'_t, critic of the observation the chunk ended in; not read where ``terminated``.
        terminated: the task ended inside the chunk.
        truncated: the time limit was reached inside the chunk.
        valid: the environment was still running when the chunk was chosen.
        gamma: discount per chunk, in (0, 1].
        gae_lambda: in [0, 1].

    Returns:
        Advantages and returns; both are zero where not valid.
    """
    shapes = {tuple(tensor.shape) for tensor in (reward, value, next_value, terminated, truncated, valid)}
    if len(shapes) != 1 or reward.ndim != 2:
        raise ValueError(f"all inputs must share one shape [T, B]; given {sorted(shapes)}")
    zero = torch.zeros_like(value)
    # `where`, not a product: whatever stands in masked places (even a NaN) must not leak.
    bootstrap = torch.where(terminated, zero, next_value)
    delta = torch.where(valid, reward + gamma * bootstrap - value, zero)
    carries_on = ~(terminated | truncated)
    advantages = torch.zeros_like(value)
    future = torch.zeros_like(value[0])
    for t in range(len(reward) - 1, -1, -1):
        future = delta[t] + gamma * gae_lambda * torch.where(carries_on[t], future, zero[t])
        future = torch.where(valid[t], future, zero[t])
        advantages[t] = future
    return advantages, torch.where(valid, advantages + value, zero)
