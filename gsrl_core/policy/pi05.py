"""The pi0.5 network (https://arxiv.org/abs/2504.16054): SigLIP + Gemma prefix, and a flow-matching action expert.

pi0 (https://arxiv.org/abs/2410.24164) is the same but for two things: time is mixed into the actions by an MLP instead
of modulating the expert's norms, and the expert has a token of the state that does not attend to the actions. So its
keys and values depend on the prefix and the state alone, and :meth:`Pi05.with_state` appends them to the prefix.

The prefix (images, then prompt) attends to itself only, so it is computed once and kept as keys and values; the
action expert attends to it and to its own H tokens. Parameter names and shapes are those of openpi's PyTorch model.

Axis legend: B batch, S image side, T prompt tokens, N prefix tokens, H horizon, A action width, L layers, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gsrl_core.policy.config import MAX_PERIOD, MIN_PERIOD, Pi05Config
from gsrl_core.policy.gemma import Gemma, GemmaSize, Projection, rotary
from gsrl_core.policy.origin import Origin
from gsrl_core.policy.prompt import Prompt, pack
from gsrl_core.policy.siglip import VisionTower

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], t [B]) -> hidden states float32 [B, H, We]."""


@dataclass(frozen=True)
class PrefixCache:
    """What the action expert and the critic need of the prefix."""

    keys: Tensor
    """[B, L, G, N, D], rotated to their positions."""
    values: Tensor
    """[B, L, G, N, D]."""
    valid: Tensor
    """bool [B, N]."""
    hidden: Tensor | None
    """[B, N, W] after the final norm; None where nobody asked for it, and in a cache restored from a rollout."""
    key_mask: Tensor | None
    """``valid`` if anything is masked, else None (the faster attention)."""

    @classmethod
    def restore(cls, keys: Tensor, values: Tensor, valid: Tensor, *, complete: bool) -> PrefixCache:
        """A cache from stored keys, values and mask, of which all is valid if ``complete``."""
        return cls(keys, values, valid, None, None if complete else valid)


class Pi05(nn.Module):
    """The network at any size; see :class:`~gsrl_core.policy.config.Pi05Config`."""

    def __init__(self, config: Pi05Config, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False
        """Keep the layers' inputs only, and run the layers again in the backward pass: a third more work."""
        self.origin = Origin()
        """The files that the weights were read from."""
        self.paligemma_with_expert = _PaliGemmaWithExpert(config)
        self.action_in_proj = Projection(config.action_dim, config.expert_width)
        self.action_out_proj = Projection(config.expert_width, config.action_dim)
        inputs = config.expert_width
        if config.family == "pi0":
            self.state_proj = Projection(config.action_dim, config.expert_width)
            inputs = 2 * config.expert_width
        self.time_mlp_in = Projection(inputs, config.expert_width)
        self.time_mlp_out = Projection(config.expert_width, config.expert_width)

    @property
    def paligemma(self) -> _PaliGemmaModel:
        """The frozen-in-PPO part: vision tower, projector and language model."""
        return self.paligemma_with_expert.paligemma.model

    @property
    def expert(self) -> Gemma:
        """The action expert."""
        return self.paligemma_with_expert.gemma_expert.model

    def trainable_in_ppo(self) -> dict[str, nn.Parameter]:
        """Parameters outside the vision-language model, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("paligemma_with_expert.paligemma.")
        }

    def embed_prefix(
        self, images: Mapping[str, Tensor], masks: Mapping[str, Tensor], tokens: Tensor, token_mask: Tensor
    ) -> PrefixCache:
        """Run the vision tower and the language model; arguments as for :func:`~gsrl_core.policy.prompt.pack`."""
        return self.run_prefix(pack(images, masks, tokens, token_mask, self.config.image_tokens))

    def run_prefix(self, prompt: Prompt, *, features: bool = True) -> PrefixCache:
        """Run the vision tower and the language model.

        Args:
            prompt: what to look at and to read.
            features: also give ``hidden``. The expert does not see what the last layer makes of its keys and values, so
                without it that layer's attention and MLP are left out.
        """
        pieces = [*(self._embed_image(image) for image in prompt.images), self.embed_tokens(prompt.tokens)]
        x = torch.cat(pieces, dim=1)
        key_mask = prompt.key_mask
        table = rotary(prompt.valid.long().cumsum(dim=1) - 1, self.config.head_dim)
        model = self.paligemma.language_model
        kept = []
        for layer in model.layers[:-1]:
            x, *own = self._through(layer, x, table, key_mask)
            kept.append(own)
        hidden = None
        if features:
            x, *own = self._through(model.layers[-1], x, table, key_mask)
            hidden, _ = model.norm(x)
        else:
            own = model.layers[-1].keys_values(x, table)
        keys, values = (torch.stack(part, dim=1) for part in zip(*kept, own, strict=True))
        return PrefixCache(keys, values, prompt.valid, hidden, key_mask)

    def velocity(self, prefix: PrefixCache, x_t: Tensor, t: Tensor) -> Tensor:
        """v(x_t, t) float32 [B, H, A]; it estimates noise - action. ``x_t`` [B, H, A], ``t`` [B] in (0, 1]."""
        return self.project(self.suffix(prefix, x_t, t))

    def denoiser(self, prefix: PrefixCache) -> Denoiser:
        """The expert given a prefix."""
        return lambda x_t, t: self.suffix(prefix, x_t, t)

    def suffix(self, prefix: PrefixCache, x_t: Tensor, t: Tensor) -> Tensor:
        """The expert's final hidden states float32 [B, H, We] for noisy actions [B, H, A] at times [B]."""
        x = self.action_in_proj(x_t.float())
        condition = None
        if self.config.family == "pi0":
            wave = sincos_time(t, self.config.expert_width).float()[:, None].expand_as(x)
            hidden = nn.functional.silu(self.time_mlp_in(torch.cat([x, wave], dim=2)))
            x = self.time_mlp_out(hidden)
        else:
            condition = self.embed_time(t)
        x, _, _ = self._run_expert(prefix, x.to(self.compute_dtype), condition)
        return self.expert.norm(x, condition)[0].float()

    def with_state(self, prefix: PrefixCache, state: Tensor) -> PrefixCache:
        """Of pi0: the prefix followed by the token of the state, float32 [B, A] in network units.

        Its keys and values are the expert's, hence trained: they are never kept with the prefix.
        """
        x = self.state_proj(state.float())[:, None].to(self.compute_dtype)
        _, keys, values = self._run_expert(prefix, x, None)
        valid = torch.cat([prefix.valid, prefix.valid.new_ones(len(state), 1)], dim=1)
        joined = (
            torch.cat([old, torch.stack(own, dim=1).to(old.dtype)], dim=3)
            for old, own in ((prefix.keys, keys), (prefix.values, values))
        )
        return PrefixCache(*joined, valid, None, None if prefix.key_mask is None else valid)

    def embed_time(self, t: Tensor) -> Tensor:
        """The condition of the adaptive norms float32 [B, We] at times [B]."""
        wave = sincos_time(t, self.config.expert_width).float()
        hidden = nn.functional.silu(self.time_mlp_in(wave))
        return nn.functional.silu(self.time_mlp_out(hidden))

    def _through(self, layer: nn.Module, *inputs: object) -> tuple[Tensor, Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def _run_expert(
        self, prefix: PrefixCache, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Hidden states before the final norm, and each layer's own keys and values."""
        offset = prefix.valid.sum(dim=1, keepdim=True)
        positions = offset + torch.arange(x.shape[1], device=x.device)
        table = rotary(positions, self.config.head_dim)
        key_mask = prefix.key_mask
        if key_mask is not None:
            key_mask = torch.cat([key_mask, key_mask.new_ones(x.shape[:2])], dim=1)
        keys, values = [], []
        for index, layer in enumerate(self.expert.layers):
            past = prefix.keys[:, index], prefix.values[:, index]
            x, key, value = self._through(layer, x, table, key_mask, condition, past)
            keys.append(key)
            values.append(value)
        return x, keys, values

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states of the expert [B, H, We] -> velocity float32 [B, H, A]."""
        return self.action_out_proj(hidden.float())

    def _embed_image(self, image: Tensor) -> Tensor:
        model = self.paligemma
        return model.multi_modal_projector.linear(model.vision_tower.vision_model(image.to(self.compute_dtype)))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, T] -> scaled embeddings [B, T, W]."""
        embedded = self.paligemma.language_model.embed_tokens(tokens).to(self.compute_dtype)
        return embedded * math.sqrt(self.config.width)


def sincos_time(t: Tensor, width: int) -> Tensor:
    """Sine-cosine features float64 [B, width] of t [B] at log-spaced periods 4e-3..4."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angle = t.double()[:, None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def initialise(model: Pi05, seed: int) -> None:
    """Random weights for training from scratch: unit-variance embeddings, fan-in projections, closed adaRMS gates."""
    generator = torch.Generator().manual_seed(seed)
    residual_scale = 1 / math.sqrt(2 * model.config.depth)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                std = 0.02 if "position" in name else model.config.width**-0.5
                module.weight.normal_(0.0, std, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                scale = residual_scale if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")) else 1.0
                std = 0.0 if name.endswith("dense") else scale / math.sqrt(module.weight[0].numel())
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


class _PaliGemmaWithExpert(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.paligemma = _PaliGemma(config)
        self.gemma_expert = _GemmaExpert(config)


class _PaliGemma(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.model = _PaliGemmaModel(config)


class _PaliGemmaModel(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        size = GemmaSize(config.width, config.depth, config.mlp, config.heads, config.kv_heads, config.head_dim)
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = _Projector(config)
        self.language_model = Gemma(size, config.vocab_size)


class _Projector(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.linear = Projection(config.vision_width, config.width)


class _GemmaExpert(nn.Module):
    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        size = GemmaSize(
            config.expert_width,
            config.depth,
            config.expert_mlp,
            config.heads,
            config.kv_heads,
            config.head_dim,
            condition_width=config.expert_width if config.family == "pi05" else 0,
        )
        self.model = Gemma(size)
