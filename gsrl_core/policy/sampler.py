"""From a prompt and drawn numbers to actions, and the log-probabilities that belong to them: nothing random in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gsrl_core.interfaces import Level
from gsrl_core.policy import flow
from gsrl_core.policy.fast import FastNetwork
from gsrl_core.policy.graphs import GraphCache
from gsrl_core.policy.pi05 import Denoiser, Pi05, PrefixCache
from gsrl_core.policy.prompt import Prompt
from gsrl_core.policy.value import ValueHead, masked_mean

Kind = Literal["value", "ode", "explore"]

ROWS = 256
"""More observations are inferred in pieces of this many: they would need more memory and gain no speed."""
GRAPHED_ROWS = 32
"""Up to this many, the host launches kernels more slowly than a GPU works them off."""


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
    log_prob_level: Level = "chunk"
    entropy_level: Level = "chunk"


class Sampler:
    """Inference of a policy with its heads."""

    def __init__(
        self,
        network: Pi05,
        value_head: ValueHead,
        noise_head: flow.NoiseHead | None,
        sampling: Sampling,
        executed_width: int,
        fast: FastNetwork | None = None,
    ) -> None:
        """Take the parts.

        Args:
            network: the weights.
            value_head: the critic.
            noise_head: of Flow-Noise.
            sampling: how actions are drawn.
            executed_width: entries of an action that are executed; the rest is padding.
            fast: the twin of ``network``, if inference should use it.
        """
        self.network, self.value_head, self.noise_head, self.sampling = network, value_head, noise_head, sampling
        self.executed_width = executed_width
        self.fast = fast
        self._graphs = GraphCache() if fast is not None and network.action_in_proj.weight.is_cuda else None

    def __call__(self, kind: Kind, prompt: Prompt, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Infer B observations; no gradients.

        Args:
            kind: ``value`` gives the critic's ``value`` float32 [B] alone, ``ode`` gives ``x`` alone, ``explore`` all.
            prompt: the observations.
            draws: ``noise`` [B, H, A] for both ways of sampling, and for exploration ``innovation`` ([B, H, A] for
                Flow-SDE, [B, N, H, A] for Flow-Noise) and, for Flow-SDE, ``step`` int64 [B].

        Returns:
            ``x`` [B, H, A] in network units, ``value`` float32 [B], ``log_prob`` float32 at its level, ``pooled``
            float32 [B, W], ``keys`` and ``values`` [B, L, G, N, D], and the transitions: ``x_k``, ``x_next`` and
            ``step``, or the whole ``x_chain`` [B, N + 1, H, A].
        """
        if self.fast is not None:
            self.fast.refresh()
        tensors = prompt.tensors() | dict(draws)
        parts = []
        for first in range(0, len(prompt), ROWS):
            rows = {name: tensor[first : first + ROWS] for name, tensor in tensors.items()}
            parts.append(self._infer_rows(kind, prompt, rows))
        return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def log_prob(self, prefix: PrefixCache, chain: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of stored transitions under the current weights, at their levels, with gradients.

        The deviations of Flow-SDE are a fixed schedule, so that its entropy says nothing of the policy: it counts as
        zero, as in pi_RL's code.
        """
        s, prefix = self.sampling, self._with_state(prefix, chain)
        if s.noise_method == "flow_sde":
            mean, std = flow.sde_step(
                lambda x, t: self.network.velocity(prefix, x, t),
                chain["x_k"], chain["step"], s.denoise_steps, s.noise_level,
            )  # fmt: skip
            log_prob = flow.gaussian_log_prob(chain["x_next"], mean, std)
            return self._of_log_prob(log_prob), self._of_entropy(torch.zeros_like(std))
        velocity = self._noisy_velocity(lambda x, t: self.network.suffix(prefix, x, t))
        x = chain["x_chain"]
        unit = torch.ones_like(x[:, 0])
        log_probs = [self._of_log_prob(flow.gaussian_log_prob(x[:, 0], torch.zeros_like(unit), unit))]
        entropies = [self._of_entropy(flow.gaussian_entropy(unit))]
        for i in range(s.denoise_steps):
            mean, std = flow.joint_step(velocity, x[:, i], i, s.denoise_steps)
            log_probs.append(self._of_log_prob(flow.gaussian_log_prob(x[:, i + 1], mean, std)))
            entropies.append(self._of_entropy(flow.gaussian_entropy(std)))
        # pi_RL takes the mean over the N + 1 terms of the joint density, not the sum.
        return torch.stack(log_probs).mean(dim=0), torch.stack(entropies).mean(dim=0)

    def run_prefix(self, prompt: Prompt) -> PrefixCache:
        """Keys and values of a prompt."""
        return self._backend.run_prefix(prompt, features=False)

    @property
    def _backend(self) -> Pi05 | FastNetwork:
        return self.fast or self.network

    def _infer_rows(self, kind: Kind, prompt: Prompt, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = len(tensors["tokens"])
        if self._graphs is None or count > GRAPHED_ROWS:
            return self._infer(kind, prompt, tensors)
        # Few sizes, so that few graphs are captured; the last row fills up.
        size = 1 << (count - 1).bit_length()
        index = torch.arange(size, device=tensors["tokens"].device).clamp(max=count - 1)
        filled = {name: tensor[index] for name, tensor in tensors.items()}
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in filled.items())
        found = self._graphs((kind, prompt.complete, shapes), lambda rows: self._infer(kind, prompt, rows), filled)
        return {name: tensor[:count] for name, tensor in found.items()}

    def _infer(self, kind: Kind, prompt: Prompt, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix = self._backend.run_prefix(prompt.holding(tensors), features=kind != "ode")
        if kind == "ode":
            return {"x": self._follow_ode(self._with_state(prefix, tensors), tensors["noise"])}
        assert prefix.hidden is not None
        pooled = masked_mean(prefix.hidden, prefix.valid)
        value = self.value_head(pooled)
        if kind == "value":
            return {"value": value}
        explore = self._explore_sde if self.sampling.noise_method == "flow_sde" else self._explore_joint
        stored = {"pooled": pooled, "keys": prefix.keys, "values": prefix.values}
        return explore(self._with_state(prefix, tensors), tensors) | {"value": value} | stored

    def _with_state(self, prefix: PrefixCache, tensors: Mapping[str, Tensor]) -> PrefixCache:
        return self.network.with_state(prefix, tensors["state"]) if "state" in tensors else prefix

    def _follow_ode(self, prefix: PrefixCache, noise: Tensor) -> Tensor:
        return flow.sample_ode(self._velocity(prefix), noise, self.sampling.denoise_steps)

    def _explore_sde(self, prefix: PrefixCache, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        s = self.sampling
        x, before, after, log_prob = flow.sample_sde(
            self._velocity(prefix), draws["noise"], draws["innovation"], draws["step"], s.denoise_steps, s.noise_level
        )
        return {
            "x": x, "log_prob": self._of_log_prob(log_prob), "x_k": before, "x_next": after, "step": draws["step"],
        }  # fmt: skip

    def _explore_joint(self, prefix: PrefixCache, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        velocity = self._noisy_velocity(self._backend.denoiser(prefix))
        chain, log_prob = flow.sample_joint(velocity, draws["noise"], draws["innovation"], self.sampling.denoise_steps)
        log_prob = torch.stack([self._of_log_prob(step) for step in log_prob.unbind(dim=1)])
        return {"x": chain[:, -1], "log_prob": log_prob.mean(dim=0), "x_chain": chain}

    def _velocity(self, prefix: PrefixCache) -> flow.Velocity:
        denoise = self._backend.denoiser(prefix)
        return lambda x, t: self.network.project(denoise(x, t))

    def _noisy_velocity(self, denoise: Denoiser) -> flow.NoisyVelocity:
        def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            hidden = denoise(x, t)
            return self.network.project(hidden), self.noise_head(hidden)

        return velocity

    def _of_log_prob(self, elementwise: Tensor) -> Tensor:
        return self._executed(elementwise, self.sampling.log_prob_level)

    def _of_entropy(self, elementwise: Tensor) -> Tensor:
        return self._executed(elementwise, self.sampling.entropy_level)

    def _executed(self, elementwise: Tensor, level: Level) -> Tensor:
        """Sums [B, H, A] at a level over what is executed: padding and the rest of the horizon carry no gradient."""
        executed = elementwise[:, : self.sampling.action_chunk, : self.executed_width]
        if level == "token":
            return executed
        return executed.sum(dim=(1, 2) if level == "chunk" else 2)
