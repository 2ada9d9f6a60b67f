"""What stands between two attentions of a layer, as functions that torch.compile makes few kernels of.

Each kind of layer has its own functions, because a compiled function remembers the widths that it has seen. All work on
rows: R tokens of all samples, one after another; arguments that have rows come first. Norms are computed in float32,
projections in the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gsrl_core.policy.gemma import unit_rms


def vision_in(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Norm and projections: [R, W] -> queries, keys and values [R, 3 * W]."""
    return functional.linear(_layer_norm(x, scale, shift), weight, bias)


def vision_out(
    x: Tensor,
    mixed: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """Residual of the attention's output ``mixed`` [R, W], then norm and MLP with theirs."""
    x = x + functional.linear(mixed, out_weight, out_bias)
    hidden = functional.linear(_layer_norm(x, scale, shift), fc1_weight, fc1_bias)
    return x + functional.linear(functional.gelu(hidden, approximate="tanh"), fc2_weight, fc2_bias)


def prefix_in(x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Norm and projections: [R, W] -> rotated queries [R, Q, D], and keys (rotated) and values [R, 2, G, D].

    Args:
        x: hidden states.
        cos: of the rows' positions [R, 1, D / 2].
        sin: likewise.
        scale: 1 + weight of the norm, float32 [W].
        qkv: stacked projections [(Q + 2 G) D, W].
        heads: Q.
    """
    return _heads((unit_rms(x) * scale).to(x.dtype), qkv, cos, sin, heads)


def prefix_out(x: Tensor, mixed: Tensor, o: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Residual of the attention's output ``mixed`` [R, Q * D], then norm and gated MLP with theirs."""
    x = x + functional.linear(mixed, o)
    return x + _mlp((unit_rms(x) * scale).to(x.dtype), gate_up, down)


def prefix_end(x: Tensor, scale: Tensor) -> Tensor:
    """The final norm."""
    return (unit_rms(x) * scale).to(x.dtype)


def expert_in(
    x: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor, qkv: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """As :func:`prefix_in` with an adaptive norm; ``modulation`` float32 [3, W] is scale, shift and gate."""
    return _heads(_modulated(x, modulation), qkv, cos, sin, heads)


def expert_out(
    x: Tensor, mixed: Tensor, o: Tensor, before: Tensor, after: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As :func:`prefix_out`; ``before`` and ``after`` are the modulations of the layer's two norms."""
    x = x + functional.linear(mixed, o) * before[2].to(x.dtype)
    return x + _mlp(_modulated(x, after), gate_up, down) * after[2].to(x.dtype)


def expert_end(x: Tensor, modulation: Tensor) -> Tensor:
    """The final norm, float32."""
    return _modulated(x, modulation).float()


def _layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return functional.layer_norm(x.float(), x.shape[-1:], scale, shift, 1e-6).to(x.dtype)


def _modulated(x: Tensor, modulation: Tensor) -> Tensor:
    return (unit_rms(x) * (1.0 + modulation[0]) + modulation[1]).to(x.dtype)


def _heads(normed: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    width = 2 * cos.shape[-1]
    parts = functional.linear(normed, qkv).unflatten(-1, (-1, width))
    groups = (parts.shape[1] - heads) // 2
    q, k, v = parts.split((heads, groups, groups), dim=1)
    return _rotated(q, cos, sin), torch.stack([_rotated(k, cos, sin), v], dim=1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _mlp(normed: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = functional.linear(normed, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.gelu(gate, approximate="tanh") * up, down)


@dataclass(frozen=True)
class Functions:
    """The functions above, as they are or compiled."""

    vision_in: Callable[..., Tensor]
    vision_out: Callable[..., Tensor]
    prefix_in: Callable[..., tuple[Tensor, Tensor]]
    prefix_out: Callable[..., Tensor]
    prefix_end: Callable[..., Tensor]
    expert_in: Callable[..., tuple[Tensor, Tensor]]
    expert_out: Callable[..., Tensor]
    expert_end: Callable[..., Tensor]


PLAIN = Functions(vision_in, vision_out, prefix_in, prefix_out, prefix_end, expert_in, expert_out, expert_end)
_WITH_ROWS = (1, 2, 3, 2, 1, 3, 2, 1)
"""How many arguments of each have rows."""


@lru_cache(maxsize=1)
def compiled() -> Functions:
    """All of them, compiled at their first call, once for all layers and batch sizes."""
    pairs = zip(vars(PLAIN).items(), _WITH_ROWS, strict=True)
    return Functions(**{name: _compiled(function, rows) for (name, function), rows in pairs})


def _compiled(function: Callable[..., Any], with_rows: int) -> Callable[..., Any]:
    fast = torch.compile(function, fullgraph=True)

    def call(*arguments: Any) -> Any:
        # Otherwise the first batch size would be compiled in, and the second compile everything again.
        for tensor in arguments[:with_rows]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(*arguments)

    return call
