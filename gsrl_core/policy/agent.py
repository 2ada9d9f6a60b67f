"""The pi0.5 policy as reinforcement learning sees it: samples chunks, and recomputes what it sampled.

The vision-language model is frozen in PPO. So what the trained part (action expert, projections, heads) needs of it,
keys, values and pooled features, travels in the sample's chain and is never computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import ActionSample, Evaluation, Observation
from gsrl_core.policy import flow
from gsrl_core.policy.config import IMAGE_SLOTS
from gsrl_core.policy.pi05 import Pi05, PrefixCache
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import (
    FieldStats,
    Normalizer,
    discretize_state,
    resize_with_pad,
    to_network_range,
)
from gsrl_core.policy.value import ValueHead, masked_mean

TEXT_BLOCK = 16
"""Chains reserve room for the prompt in multiples of this, so that samples of different chunks can be stacked."""


@dataclass(frozen=True)
class Sampling:
    """How actions are drawn."""

    denoise_steps: int
    action_chunk: int
    """Actions executed of the horizon; log-probabilities count these only."""
    noise_method: Literal["flow_sde", "flow_noise"] = "flow_sde"
    noise_level: float = 0.5
    """Flow-SDE."""
    noise_std_range: tuple[float, float] = (0.08, 0.16)
    """Flow-Noise."""


@dataclass(frozen=True)
class PromptInputs:
    """An observation in the network's terms."""

    images: dict[str, Tensor]
    """slot -> float32 [B, 3, S, S] in [-1, 1]."""
    masks: dict[str, Tensor]
    """slot -> bool [B], on the host."""
    tokens: Tensor
    """int64 [B, T]."""
    token_mask: Tensor
    """bool [B, T], on the host."""


def require_horizon(action_chunk: int, horizon: int) -> None:
    """Raise CheckpointError unless a checkpoint that predicts ``horizon`` actions can be asked for ``action_chunk``."""
    if action_chunk > horizon:
        raise CheckpointError(
            f"policy.action_chunk is {action_chunk}, but this checkpoint predicts {horizon} actions; allowed: 1 to "
            f"{horizon}"
        )


class Pi05Policy:
    """Implements :class:`~gsrl_core.interfaces.Policy` with trainable actor and critic parameters."""

    def __init__(
        self,
        network: Pi05,
        value_head: ValueHead,
        noise_head: flow.NoiseHead | None,
        tokenizer: PromptTokenizer,
        state_stats: FieldStats,
        action_stats: FieldStats,
        sampling: Sampling,
        carried: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take the parts, on one device; ``carried`` are tensors that only pass through to the next checkpoint.

        Raises:
            CheckpointError: the parts do not fit each other.
        """
        require_horizon(sampling.action_chunk, network.config.horizon)
        if (sampling.noise_method == "flow_noise") != (noise_head is not None):
            raise CheckpointError("a noise head belongs to noise_method 'flow_noise', and to it only")
        self.network, self.value_head, self.noise_head = network, value_head, noise_head
        self.tokenizer, self.sampling = tokenizer, sampling
        mode = network.config.normalization
        self.state_normalizer, self.action_normalizer = Normalizer(state_stats, mode), Normalizer(action_stats, mode)
        self.carried = dict(carried or {})
        self.horizon = sampling.action_chunk
        self.action_dim = self.action_normalizer.width
        self._actor = dict(network.trainable_in_ppo())
        if noise_head is not None:
            self._actor |= {f"noise_head.{name}": p for name, p in noise_head.named_parameters()}
        self._critic = {f"value_head.{name}": p for name, p in value_head.named_parameters()}
        network.requires_grad_(False)
        for parameter in (*self._actor.values(), *self._critic.values()):
            parameter.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.action_in_proj.weight.device

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """``actor``: action expert, projections, noise head; ``critic``: value head. Always in the same order."""
        return {"actor": list(self._actor.values()), "critic": list(self._critic.values())}

    def state_dict_trainable(self) -> dict[str, Tensor]:
        """The trainable tensors by name (shared, not copied): all that changes during PPO."""
        return {name: parameter.detach() for name, parameter in (self._actor | self._critic).items()}

    def load_state_dict_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Copy in tensors by name; some may be left out. Raises CheckpointError for unknown names or shapes."""
        own = self._actor | self._critic
        for name, value in state.items():
            if name not in own or own[name].shape != value.shape:
                raise CheckpointError(f"{name} {tuple(value.shape)} is not a trainable tensor of this policy")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    @torch.no_grad()
    def act(self, observation: Observation, generator: torch.Generator, *, explore: bool) -> ActionSample:
        """Sample a chunk: Flow-SDE or Flow-Noise if ``explore``, else the ODE (log_prob zero, chain empty).

        Everything random comes from ``generator``, on its own device, so a CPU generator gives the same draws to a
        policy on any device.
        """
        prefix = self.prefix(observation)
        pooled = masked_mean(prefix.hidden, prefix.valid)
        value = self.value_head(pooled)
        batch, config = pooled.shape[0], self.network.config
        noise = self._normal((batch, config.horizon, config.action_dim), generator)
        if not explore:
            x = flow.sample_ode(lambda x, t: self.network.velocity(prefix, x, t), noise, self.sampling.denoise_steps)
            return ActionSample(self._actions(x), value.new_zeros(batch), value, {})
        chain = self._stored(prefix, pooled, observation)
        explored = self._explore_sde if self.sampling.noise_method == "flow_sde" else self._explore_joint
        x, log_prob, steps = explored(prefix, noise, generator)
        return ActionSample(self._actions(x), log_prob, value, chain | steps)

    def evaluate(self, chain: Mapping[str, Tensor]) -> Evaluation:
        """Log-probability, entropy and value of stored samples, with gradients to the trainable parameters."""
        chain = {name: tensor.to(self.device) for name, tensor in chain.items()}
        columns = int(chain["prefix_valid"].any(dim=0).nonzero().amax()) + 1
        prefix = PrefixCache.restore(
            chain["prefix_keys"][..., :columns, :],
            chain["prefix_values"][..., :columns, :],
            chain["prefix_valid"][:, :columns],
        )
        log_prob, entropy = self._log_prob(prefix, chain)
        return Evaluation(log_prob, entropy, self.value_head(chain["pooled"]))

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """The critic alone, float32 [B]."""
        prefix = self.prefix(observation)
        return self.value_head(masked_mean(prefix.hidden, prefix.valid))

    def prefix(self, observation: Observation) -> PrefixCache:
        """The prefix of an observation."""
        inputs = self.inputs(observation)
        return self.network.embed_prefix(inputs.images, inputs.masks, inputs.tokens, inputs.token_mask)

    def inputs(self, observation: Observation) -> PromptInputs:
        """Pictures, prompt and state as the network takes them.

        The cameras fill openpi's slots in the order of ``observation.rgb``: base, left wrist, right wrist.
        """
        if not 1 <= len(observation.rgb) <= len(IMAGE_SLOTS):
            raise CheckpointError(
                f"{len(observation.rgb)} cameras given ({', '.join(observation.rgb)}); allowed: 1 to 3"
            )
        if observation.state.shape[-1] != self.state_normalizer.width:
            raise CheckpointError(
                f"the state has {observation.state.shape[-1]} entries, this checkpoint's statistics have "
                f"{self.state_normalizer.width}"
            )
        size = self.network.config.image_size
        images = {
            slot: to_network_range(resize_with_pad(rgb.to(self.device), size))
            for slot, rgb in zip(IMAGE_SLOTS, observation.rgb.values(), strict=False)
        }
        bins = discretize_state(self.state_normalizer.normalize(observation.state.cpu()))
        tokens, token_mask = self.tokenizer.encode(observation.instruction, bins)
        masks = dict.fromkeys(images, torch.ones(len(tokens), dtype=torch.bool))
        return PromptInputs(images, masks, tokens.to(self.device), token_mask)

    def _explore_sde(
        self, prefix: PrefixCache, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        s = self.sampling
        index = torch.randint(s.denoise_steps, noise.shape[:1], generator=generator, device=generator.device)
        index = index.to(noise.device)
        innovation = self._normal(noise.shape, generator)
        x, before, after, log_prob = flow.sample_sde(
            lambda x, t: self.network.velocity(prefix, x, t), noise, innovation, index, s.denoise_steps, s.noise_level
        )
        return x, self._executed(log_prob), {"x_k": before, "x_next": after, "step": index}

    def _explore_joint(
        self, prefix: PrefixCache, noise: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        steps = self.sampling.denoise_steps
        innovations = self._normal((noise.shape[0], steps, *noise.shape[1:]), generator)
        chain, log_prob = flow.sample_joint(lambda x, t: self._noisy_velocity(prefix, x, t), noise, innovations, steps)
        log_prob = torch.stack([self._executed(step) for step in log_prob.unbind(dim=1)])
        return chain[:, -1], log_prob.mean(dim=0), {"x": chain}

    def _log_prob(self, prefix: PrefixCache, chain: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        s = self.sampling
        if s.noise_method == "flow_sde":
            mean, std = flow.sde_step(
                lambda x, t: self.network.velocity(prefix, x, t),
                chain["x_k"], chain["step"], s.denoise_steps, s.noise_level,
            )  # fmt: skip
            log_prob = flow.gaussian_log_prob(chain["x_next"], mean, std)
            return self._executed(log_prob), self._executed(flow.gaussian_entropy(std))
        x = chain["x"]
        unit = torch.ones_like(x[:, 0])
        log_probs = [self._executed(flow.gaussian_log_prob(x[:, 0], torch.zeros_like(unit), unit))]
        entropies = [self._executed(flow.gaussian_entropy(unit))]
        for i in range(s.denoise_steps):
            mean, std = flow.joint_step(lambda x, t: self._noisy_velocity(prefix, x, t), x[:, i], i, s.denoise_steps)
            log_probs.append(self._executed(flow.gaussian_log_prob(x[:, i + 1], mean, std)))
            entropies.append(self._executed(flow.gaussian_entropy(std)))
        # pi_RL takes the mean over the N + 1 terms of the joint density, not the sum.
        return torch.stack(log_probs).mean(dim=0), torch.stack(entropies).mean(dim=0)

    def _noisy_velocity(self, prefix: PrefixCache, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network.suffix(prefix, x, t)
        return self.network.project(hidden), self.noise_head(hidden)

    def _executed(self, elementwise: Tensor) -> Tensor:
        """Sum [B, H, A] over what is executed: padding and the rest of the horizon carry no gradient."""
        return elementwise[:, : self.horizon, : self.action_dim].sum(dim=(1, 2))

    def _actions(self, x: Tensor) -> Tensor:
        return self.action_normalizer.denormalize(x[:, : self.horizon])

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def _stored(self, prefix: PrefixCache, pooled: Tensor, observation: Observation) -> dict[str, Tensor]:
        """The prefix padded to a length that depends on the sentences alone, not on this batch's states."""
        width = self.state_normalizer.width
        longest = max(self.tokenizer.prompt_length(text, width) for text in set(observation.instruction))
        blocks = -(-longest // TEXT_BLOCK) * TEXT_BLOCK
        total = len(observation.rgb) * self.network.config.image_tokens + blocks
        missing = total - prefix.valid.shape[1]
        return {
            "prefix_keys": nn.functional.pad(prefix.keys, (0, 0, 0, missing)),
            "prefix_values": nn.functional.pad(prefix.values, (0, 0, 0, missing)),
            "prefix_valid": nn.functional.pad(prefix.valid, (0, missing)),
            "pooled": pooled,
        }
