"""The network for sampling on a GPU: the numbers of :mod:`gsrl_core.policy.pi05` up to rounding, several times as fast.

- Projections that read the same input are one matrix product.
- What stands between matrix products and attention is compiled into single kernels: one function for all layers of a
  kind, over [tokens, width], so that any batch size uses the same code.
- The adaptive norms depend on the denoising step alone, which is the same for all samples: they are tables.
- The expert writes its own keys and values behind those of the prefix instead of joining the two.
- Weights are held in the dtype of the activations. The trained ones are copied, and copied again when they have
  changed; the frozen ones are moved: the network's own parameters become views of them.

Axis legend as in pi05.py; R rows (tokens of all samples).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from gsrl_core.policy import fused
from gsrl_core.policy.flow import timesteps
from gsrl_core.policy.gemma import GemmaLayer, rotary
from gsrl_core.policy.pi05 import Denoiser, Pi05, PrefixCache
from gsrl_core.policy.prompt import Prompt
from gsrl_core.policy.siglip import VisionLayer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FastPrefix(PrefixCache):
    """A prefix with room behind it for the expert's own keys and values."""

    joint: Tensor
    """[B, L, 2, G, N + H, D]; ``keys`` and ``values`` are views of it."""


@dataclass(frozen=True)
class _Layer:
    """Weights of a decoder layer in the dtype of the activations."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class FastNetwork:
    """The fast twin of a network that denoises in a fixed number of steps.

    The frozen part of the network must keep its weights; changes of the rest are noticed.
    """

    def __init__(self, network: Pi05, denoise_steps: int, *, compiled: bool = True) -> None:
        """Pack the weights; ``compiled`` false runs the same functions as they are written (for tests)."""
        self._network, self._steps = network, denoise_steps
        self._functions = fused.compiled() if compiled and has_compiler() else fused.PLAIN
        dtype = network.compute_dtype
        with torch.no_grad():
            vision = network.paligemma.vision_tower.vision_model.encoder.layers
            self._vision = [_vision_weights(layer, dtype) for layer in vision]
            language = network.paligemma.language_model
            self._prefix = [_frozen(layer, dtype) for layer in language.layers]
            self._prefix_norms = [_scales(layer) for layer in language.layers]
            self._final_scale = 1.0 + language.norm.weight.float()
            self._expert = [_copied(layer, dtype) for layer in network.expert.layers]
            norms = 2 * network.config.depth + 1
            self._modulation = torch.empty(
                denoise_steps, norms, 3, network.config.expert_width, device=language.norm.weight.device
            )
        self._tracked = list(network.trainable_in_ppo().values())
        self._seen = -1
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the trained weights again if they have changed since."""
        # Every in-place change counts a tensor's version up.
        version = sum(parameter._version for parameter in self._tracked)
        if version == self._seen:
            return
        for own, layer in zip(self._expert, self._network.expert.layers, strict=True):
            for target, sources in _sources(own, layer):
                for row, source in zip(target.split([len(s.weight) for s in sources]), sources, strict=True):
                    row.copy_(source.weight)
        times = timesteps(self._steps)[:-1].to(self._modulation.device)
        condition = self._network.embed_time(times)
        expert = self._network.expert
        norms = [n for layer in expert.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        for index, norm in enumerate((*norms, expert.norm)):
            self._modulation[:, index] = norm.dense(condition).view(self._steps, 3, -1)
        self._seen = version

    def run_prefix(self, prompt: Prompt, *, features: bool) -> FastPrefix:
        """As :meth:`Pi05.run_prefix`."""
        run, config = self._functions, self._network.config
        pieces = [*(self._embed_image(image) for image in prompt.images), self._network.embed_tokens(prompt.tokens)]
        x = torch.cat(pieces, dim=1)
        batch, length = x.shape[:2]
        shape = (batch, config.depth, 2, config.kv_heads, length + config.horizon, config.head_dim)
        joint = x.new_empty(shape)
        table = _table(prompt.valid.long().cumsum(dim=1) - 1, config.head_dim, x.dtype)
        x = x.flatten(0, 1)
        for index, (layer, scales) in enumerate(zip(self._prefix, self._prefix_norms, strict=True)):
            q, own = run.prefix_in(x, *table, scales[0], layer.qkv, config.heads)
            _store(joint[:, index, :, :, :length], own)
            if index == config.depth - 1 and not features:
                break
            mixed = _attend(q, joint[:, index, :, :, :length], prompt.key_mask)
            x = run.prefix_out(x, mixed, layer.o, scales[1], layer.gate_up, layer.down)
        hidden = run.prefix_end(x, self._final_scale).view(batch, length, -1) if features else None
        keys, values = joint[..., :length, :].unbind(dim=2)
        return FastPrefix(keys, values, prompt.valid, hidden, prompt.key_mask, joint)

    def denoiser(self, prefix: PrefixCache) -> Denoiser:
        """The expert's hidden states; the n-th call is of the n-th step, whatever time it names."""
        assert isinstance(prefix, FastPrefix)
        config = self._network.config
        positions = prefix.valid.sum(dim=1, keepdim=True) + torch.arange(config.horizon, device=prefix.valid.device)
        table = _table(positions, config.head_dim, self._network.compute_dtype)
        mask = prefix.key_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(positions.shape)], dim=1)
        tables = iter(self._modulation)
        return lambda x, _t: self._denoise(prefix, x, table, mask, next(tables))

    def _denoise(
        self, prefix: FastPrefix, x_t: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None, modulation: Tensor
    ) -> Tensor:
        run, heads = self._functions, self._network.config.heads
        length = prefix.valid.shape[1]
        x = self._network.action_in_proj(x_t.float()).to(self._network.compute_dtype).flatten(0, 1)
        norms = modulation.unbind(dim=0)
        for index, layer in enumerate(self._expert):
            before, after = norms[2 * index : 2 * index + 2]
            q, own = run.expert_in(x, *table, before, layer.qkv, heads)
            joint = prefix.joint[:, index]
            _store(joint[:, :, :, length:], own)
            x = run.expert_out(x, _attend(q, joint, mask), layer.o, before, after, layer.gate_up, layer.down)
        return run.expert_end(x, norms[-1]).view(*x_t.shape[:2], -1)

    def _embed_image(self, image: Tensor) -> Tensor:
        run, heads = self._functions, self._network.config.vision_heads
        model = self._network.paligemma.vision_tower.vision_model
        tokens = model.embeddings(image).to(self._network.compute_dtype)
        batch, length = tokens.shape[:2]
        # The convolution leaves columns of tokens; compiled functions want the rows that all layers after it have.
        x = tokens.flatten(0, 1).contiguous()
        for into, out in self._vision:
            q, k, v = run.vision_in(x, *into).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = run.vision_out(x, mixed, *out)
        normed = model.post_layernorm(x)
        return self._network.paligemma.multi_modal_projector.linear(normed).view(batch, length, -1)


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether kernels can be compiled here: it takes a C compiler, which a robot's computer may lack (logged)."""
    found = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    if not found:
        logger.warning("no C compiler: the policy's layers run uncompiled, at about two thirds of the speed")
    return found


def _store(target: Tensor, own: Tensor) -> None:
    """Rows [R, 2, G, D] into [B, 2, G, N, D]."""
    batch, _, groups, length, width = target.shape
    target.copy_(own.view(batch, length, 2, groups, width).permute(0, 2, 3, 1, 4))


def _attend(queries: Tensor, joint: Tensor, key_mask: Tensor | None) -> Tensor:
    """Queries [R, Q, D] over keys and values [B, 2, G, M, D] -> [R, Q * D]."""
    rows, heads, width = queries.shape
    batch, _, groups = joint.shape[:3]
    length, share = rows // batch, heads // groups
    # As in grouped_attention the heads of a group are further queries; with one group this order needs no copy.
    folded = queries.view(batch, length, groups, share, width).transpose(1, 2).reshape(batch, groups, -1, width)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(folded, joint[:, 0], joint[:, 1], attn_mask=mask)
    return mixed.reshape(batch, groups, length, share, width).transpose(1, 2).reshape(rows, heads * width)


def _table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [R, 1, D / 2] of positions [B, N]; the halves of a table are equal."""
    half = head_dim // 2
    return tuple(part[:, 0, :, :half].reshape(-1, 1, half).to(dtype) for part in rotary(positions, head_dim))


def _scales(layer: GemmaLayer) -> tuple[Tensor, Tensor]:
    return tuple(1.0 + norm.weight.float() for norm in (layer.input_layernorm, layer.post_attention_layernorm))


def _vision_weights(layer: VisionLayer, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Arguments of ``vision_in`` and ``vision_out``."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = torch.cat([p.bias.to(dtype) for p in projections])
    first, second = layer.layer_norm1, layer.layer_norm2
    into = (first.weight.float(), first.bias.float(), _moved(projections, dtype), bias)
    linear = (attention.out_proj, layer.mlp.fc1, layer.mlp.fc2)
    o, fc1, fc2 = ((p.weight.to(dtype), p.bias.to(dtype)) for p in linear)
    return into, (*o, second.weight.float(), second.bias.float(), *fc1, *fc2)


def _frozen(layer: GemmaLayer, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        _moved((attention.q_proj, attention.k_proj, attention.v_proj), dtype),
        attention.o_proj.weight.to(dtype),
        _moved((mlp.gate_proj, mlp.up_proj), dtype),
        mlp.down_proj.weight.to(dtype),
    )


def _moved(projections: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor:
    """Weights stacked along the output; where no conversion is needed, they live on as views of the stack."""
    joined = torch.cat([projection.weight.to(dtype) for projection in projections])
    for projection, rows in zip(
        projections, joined.split([len(projection.weight) for projection in projections]), strict=True
    ):
        if projection.weight.dtype == dtype:
            projection.weight.data = rows
    return joined


def _copied(layer: GemmaLayer, dtype: torch.dtype) -> _Layer:
    """Room for a trained layer's weights."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
    )  # fmt: skip
    return _Layer(*(torch.cat([p.weight.to(dtype) for p in group]) for group in groups))


def _sources(own: _Layer, layer: GemmaLayer) -> tuple[tuple[Tensor, tuple[nn.Linear, ...]], ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (own.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (own.o, (attention.o_proj,)),
        (own.gate_up, (mlp.gate_proj, mlp.up_proj)),
        (own.down, (mlp.down_proj,)),
    )
