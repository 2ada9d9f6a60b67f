"""Blocks of the Gemma decoder as pi0.5 uses them: RMS norms (plain and adaptive), rotary positions, attention, MLP.

Axis legend: B batch, N tokens, W width, G key/value heads, Q query heads, D head width.
Parameters may be stored wider than the activations (float32 masters under bfloat16 activations): every projection
follows the dtype of what flows through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Linear):
    """A linear map that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``input``."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.linear(input, self.weight.to(input.dtype), bias)


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table of zeros: its numbers come from a checkpoint or from ``initialise``.

    nn.Embedding would draw them, which on the meta device makes torch import its compiler (4 s).
    """
    return nn.Embedding.from_pretrained(torch.zeros(rows, width), freeze=False)


class RmsNorm(nn.Module):
    """y = x / rms(x) * (1 + weight), variance in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, N, W] -> the same, and no gate (``condition`` is for the adaptive twin)."""
        return (unit_rms(x) * (1.0 + self.weight.float())).to(x.dtype), None


class AdaptiveRmsNorm(nn.Module):
    """adaRMS: (scale, shift, gate) = dense(condition); y = x / rms(x) * (1 + scale) + shift."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.dense = Projection(condition_width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, W] with float32 condition [B, C] -> normalised [B, N, W] and gate [B, 1, W]."""
        scale, shift, gate = self.dense(condition).unsqueeze(1).chunk(3, dim=-1)
        return (unit_rms(x) * (1.0 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def unit_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """X / rms(x) over the last axis, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def rotary(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables float32 [B, 1, N, D] for integer positions [B, N] (RoFormer, halves convention)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions.float()[:, None, :, None] * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [B, heads, N, D] by its positions, in the dtype of ``x``."""
    cos, sin = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def grouped_attention(queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None) -> Tensor:
    """Softmax attention in which every query sees every valid key.

    Args:
        queries: [B, Q, N, D]; the Q heads are split evenly over the G key heads.
        keys: [B, G, M, D].
        values: [B, G, M, D].
        key_mask: bool [B, M], or None when all keys are valid.

    Returns:
        [B, N, Q * D]
    """
    batch, heads, length, width = queries.shape
    groups = keys.shape[1]
    # The mask depends on the key alone, so the heads of a group become further queries: nothing is repeated.
    folded = queries.reshape(batch, groups, heads // groups * length, width)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return mixed.reshape(batch, heads, length, width).transpose(1, 2).reshape(batch, length, heads * width)


@dataclass(frozen=True)
class GemmaSize:
    """Sizes of a decoder. ``condition_width`` > 0 makes its norms adaptive."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    condition_width: int = 0

    def norm(self) -> RmsNorm | AdaptiveRmsNorm:
        """A norm of this decoder."""
        return AdaptiveRmsNorm(self.width, self.condition_width) if self.condition_width else RmsNorm(self.width)


class GemmaAttention(nn.Module):
    """Projections of one attention layer."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.q_proj = Projection(size.width, size.heads * size.head_dim, bias=False)
        self.k_proj = Projection(size.width, size.kv_heads * size.head_dim, bias=False)
        self.v_proj = Projection(size.width, size.kv_heads * size.head_dim, bias=False)
        self.o_proj = Projection(size.heads * size.head_dim, size.width, bias=False)

    def heads(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, Q, N, D], rotated keys [B, G, N, D] and values [B, G, N, D] of [B, N, W]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return apply_rotary(q, table), apply_rotary(k, table), v

    def keys_values(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same without queries."""
        shape = (*x.shape[:2], -1, self.head_dim)
        k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return apply_rotary(k, table), v


class GemmaMlp(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.gate_proj = Projection(size.width, size.mlp, bias=False)
        self.up_proj = Projection(size.width, size.mlp, bias=False)
        self.down_proj = Projection(size.mlp, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        return self.down_proj(functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    """One decoder layer over its own tokens and, optionally, cached keys and values before them."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(size)
        self.mlp = GemmaMlp(size)
        self.input_layernorm = size.norm()
        self.post_attention_layernorm = size.norm()

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        condition: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance [B, N, W] by one layer.

        Args:
            x: hidden states of this layer's tokens.
            table: rotary tables of their positions.
            key_mask: bool [B, M + N] over past and own keys, or None when all are valid.
            condition: float32 [B, C] of the adaptive norms.
            past: keys and values [B, G, M, D] seen by these tokens in addition to themselves.

        Returns:
            Hidden states [B, N, W], and this layer's own keys and values [B, G, N, D].
        """
        normed, gate = self.input_layernorm(x, condition)
        queries, keys, values = self.self_attn.heads(normed, table)
        seen = (keys, values)
        if past is not None:
            seen = tuple(torch.cat([old.to(new.dtype), new], dim=2) for old, new in zip(past, seen, strict=True))
        x = _gated(x, self.self_attn.o_proj(grouped_attention(queries, *seen, key_mask)), gate)
        normed, gate = self.post_attention_layernorm(x, condition)
        return _gated(x, self.mlp(normed), gate), keys, values

    def keys_values(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, N, D] alone, of hidden states [B, N, W] under plain norms."""
        return self.self_attn.keys_values(self.input_layernorm(x)[0], table)


def _gated(x: Tensor, update: Tensor, gate: Tensor | None) -> Tensor:
    return x + update if gate is None else x + update * gate


class Gemma(nn.Module):
    """A stack of decoder layers and the final norm; ``vocab_size`` 0 leaves the embedding out."""

    def __init__(self, size: GemmaSize, vocab_size: int = 0) -> None:
        super().__init__()
        if vocab_size:
            self.embed_tokens = embedding(vocab_size, size.width)
        self.layers = nn.ModuleList(GemmaLayer(size) for _ in range(size.depth))
        self.norm = size.norm()
