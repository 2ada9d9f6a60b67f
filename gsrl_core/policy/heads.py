"""What reinforcement learning adds to the network: the critic, and the noise head of Flow-Noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.config import Pi05Config
from gsrl_core.policy.flow import NoiseHead
from gsrl_core.policy.keys import check_names
from gsrl_core.policy.value import ValueHead

_BOUNDS = ("logvar_min", "logvar_max")


def fresh_heads(
    config: Pi05Config, noise_method: str, noise_std_range: tuple[float, float] = (0.08, 0.16)
) -> tuple[ValueHead, NoiseHead | None]:
    """Critic and, for Flow-Noise, noise head; always the same, and without touching the global random state."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        value_head = ValueHead(config.width, config.value_hidden)
        if noise_method != "flow_noise":
            return value_head, None
        return value_head, NoiseHead(config.expert_width, config.noise_hidden, config.action_dim, noise_std_range)


def load_head(head: nn.Module, prefix: str, heads: Mapping[str, Tensor], folder: Path) -> None:
    """Fill a head with the tensors under ``prefix``, if there are any. Raises CheckpointError."""
    if given := check_head(head, prefix, heads, folder):
        head.load_state_dict({name: tensor.float() for name, tensor in given.items()})


def check_head(head: nn.Module, prefix: str, heads: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The head's own tensors; none is legal (it starts fresh). Raises CheckpointError."""
    given = {name.removeprefix(prefix): tensor for name, tensor in heads.items() if name.startswith(prefix)}
    bounds = {name: given.pop(name) for name in _BOUNDS if name in given}
    if isinstance(head, NoiseHead) and bounds:
        _check_range(head, bounds, folder)
    if given:
        check_names(given, head.state_dict(), f"{prefix[:-1]} of {folder}")
    return given


def _check_range(head: NoiseHead, bounds: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError unless RLinf's buffers, log(std^2) at both ends, are the head's range."""
    if len(bounds) < len(_BOUNDS) or any(bound.numel() != 1 for bound in bounds.values()):
        raise CheckpointError(
            f"the noise head of {folder} must bring {' and '.join(_BOUNDS)} as one number each, or neither; fetch the "
            "checkpoint again"
        )
    low, high = (bounds[name].double().mul(0.5).exp().item() for name in _BOUNDS)
    if not all(map(partial(math.isclose, rel_tol=1e-4), (low, high), head.std_range)):
        raise CheckpointError(
            f"the noise head of {folder} was trained for standard deviations of {low:.4g} to {high:.4g}; set "
            "policy.noise_std_range to that"
        )
