"""The pi0.5 policy as reinforcement learning sees it: samples chunks, and recomputes what it sampled.

The vision-language model is frozen in PPO. So what the trained part (action expert, projections, heads) needs of it,
keys, values and pooled features, travels in the sample's chain and is never computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import ActionSample, Evaluation, Level, Observation
from gsrl_core.policy import flow
from gsrl_core.policy.config import IMAGE_SLOTS
from gsrl_core.policy.fast import FastNetwork
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.prompt import Prompt, pack
from gsrl_core.policy.sampler import Sampler, Sampling
from gsrl_core.policy.storage import Extent, PrefixStore
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import (
    FieldStats,
    Normalizer,
    discretize_state,
    pad_last,
    resize_with_pad,
    to_network_range,
)
from gsrl_core.policy.value import ValueHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

TEXT_BLOCK = 16
"""Chains reserve room for the prompt in multiples of this, so that samples of different chunks can be stacked."""


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
        *,
        fast: bool = False,
        asset_id: str | None = None,
    ) -> None:
        """Take the parts, on one device.

        Args:
            network: in evaluation.
            value_head: the critic.
            noise_head: of Flow-Noise.
            tokenizer: of the prompt.
            state_stats: of the training data.
            action_stats: likewise.
            sampling: how actions are drawn.
            carried: tensors that only pass through to the next checkpoint.
            fast: infer with :mod:`gsrl_core.policy.fast`, which knows pi0.5 only.
            asset_id: under which id the statistics go to the next checkpoint, if they have one.

        Raises:
            CheckpointError: the parts do not fit each other.
        """
        require_horizon(sampling.action_chunk, network.config.horizon)
        if (sampling.noise_method == "flow_noise") != (noise_head is not None):
            raise CheckpointError("a noise head belongs to noise_method 'flow_noise', and to it only")
        self.network, self.value_head, self.noise_head = network, value_head, noise_head
        self.tokenizer, self.sampling, self.store = tokenizer, sampling, PrefixStore()
        mode = network.config.normalization
        self.state_normalizer, self.action_normalizer = Normalizer(state_stats, mode), Normalizer(action_stats, mode)
        self.carried, self.asset_id = dict(carried or {}), asset_id
        self.horizon = sampling.action_chunk
        self.action_dim = self.action_normalizer.width
        self.sharded: FSDPModule | None = None
        self._actor, self._critic = self._find_trainable()
        network.requires_grad_(False)
        for parameter in (*self._actor.values(), *self._critic.values()):
            parameter.requires_grad_(True)
        quick = fast and network.config.family == "pi05"
        twin = FastNetwork(network, sampling.denoise_steps) if quick else None
        self._sampler = Sampler(network, value_head, noise_head, sampling, self.action_dim, twin)

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
        """Sample a chunk: Flow-SDE or Flow-Noise if ``explore``, else the ODE (log_prob and value zero, chain empty).

        Everything random comes from ``generator``, on its own device, so a CPU generator gives the same draws to a
        policy on any device.
        """
        prompt, config = self.prompt(observation), self.network.config
        draws = {"noise": self._normal((len(prompt), config.horizon, config.action_dim), generator)}
        if not explore:
            x = self._sampler("ode", prompt, draws)["x"]
            zero = x.new_zeros(len(prompt))
            return ActionSample(self._actions(x), zero, zero, {})
        found = self._sampler("explore", prompt, draws | self._explore_draws(draws["noise"], generator))
        chain = {name: found[name] for name in ("x_k", "x_next", "step", "x_chain") if name in found}
        chain |= {} if prompt.state is None else {"state": prompt.state}
        chain |= self.store.keep(prompt, found, self._columns(observation))
        return ActionSample(self._actions(found["x"]), found["log_prob"], found["value"], chain)

    def evaluate(self, chain: Mapping[str, Tensor]) -> Evaluation:
        """Log-probability, entropy and value of stored samples, with gradients to the trainable parameters."""
        extent = self.store.extent(chain)
        chain = {name: tensor.to(self.device, non_blocking=True) for name, tensor in chain.items()}
        run = self._evaluate if self.sharded is None else self.sharded
        log_prob, entropy, value = run(chain, extent)
        return Evaluation(log_prob, entropy, value)

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep only this process's part of all weights, frozen ones included, on the devices of ``mesh``.

        From now on all processes must evaluate together, and the policy cannot act any more: inference would have to
        gather the weights in every process at the same moment.
        """
        # Only learners need these imports, which take a second.
        from gsrl_core.policy.shards import Evaluator, shard_evaluator

        self._sampler = Sampler(self.network, self.value_head, self.noise_head, self.sampling, self.action_dim)
        evaluator = Evaluator(self._evaluate, self.network, self.value_head, self.noise_head)
        self.sharded = shard_evaluator(evaluator, self.network, mesh)
        self._actor, self._critic = self._find_trainable()

    @torch.no_grad()
    def value(self, observation: Observation) -> Tensor:
        """The critic alone, float32 [B]."""
        return self._sampler("value", self.prompt(observation), {})["value"]

    def keep_prefixes(
        self, where: Literal["auto", "device", "host", "recompute"], samples: int, micro_batch: int
    ) -> None:
        """Say how the chains of ``samples`` samples are kept until updates in passes of ``micro_batch``."""
        trained = sum(parameter.numel() for group in (self._actor, self._critic) for parameter in group.values())
        self.store = PrefixStore(where, samples, micro_batch, trained)

    def set_levels(self, log_prob: Level, entropy: Level) -> None:
        """Say what one number of later log-probabilities and entropies belongs to; both are ``chunk`` until then."""
        self.sampling = replace(self.sampling, log_prob_level=log_prob, entropy_level=entropy)
        # Anew, because captured graphs have the levels in them.
        self._sampler = Sampler(
            self.network, self.value_head, self.noise_head, self.sampling, self.action_dim, self._sampler.fast
        )

    def prompt(self, observation: Observation) -> Prompt:
        """Pictures, prompt and state as the network takes them, without what nobody attends to.

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
        packed = pack(images, masks, tokens.to(self.device), token_mask, self.network.config.image_tokens)
        if self.network.config.family == "pi05":
            return packed
        state = self.state_normalizer.normalize(observation.state.to(self.device))
        return replace(packed, state=pad_last(state, self.network.config.action_dim))

    def _evaluate(self, chain: Mapping[str, Tensor], extent: Extent) -> tuple[Tensor, Tensor, Tensor]:
        prefix = self.store.fetch(chain, extent, self._sampler.run_prefix)
        return *self._sampler.log_prob(prefix, chain), self.value_head(chain["pooled"])

    def _find_trainable(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Parameters of the actor and of the critic by name."""
        actor = dict(self.network.trainable_in_ppo())
        if self.noise_head is not None:
            actor |= {f"noise_head.{name}": p for name, p in self.noise_head.named_parameters()}
        return actor, {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}

    def _explore_draws(self, noise: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        steps = self.sampling.denoise_steps
        if self.sampling.noise_method == "flow_noise":
            return {"innovation": self._normal((len(noise), steps, *noise.shape[1:]), generator)}
        step = torch.randint(steps, noise.shape[:1], generator=generator, device=generator.device)
        return {"step": step.to(noise.device), "innovation": self._normal(noise.shape, generator)}

    def _actions(self, x: Tensor) -> Tensor:
        return self.action_normalizer.denormalize(x[:, : self.horizon])

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def _columns(self, observation: Observation) -> int:
        """Prefix tokens, padded to a length that depends on the sentences alone, not on this batch's states."""
        width = self.state_normalizer.width
        longest = max(self.tokenizer.prompt_length(text, width) for text in set(observation.instruction))
        return len(observation.rgb) * self.network.config.image_tokens + -(-longest // TEXT_BLOCK) * TEXT_BLOCK
