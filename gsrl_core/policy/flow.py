"""Sampling a flow policy, and the log-probabilities that PPO needs of it (pi_RL, https://arxiv.org/abs/2510.25889).

x_t = t * noise + (1 - t) * action, the network estimates v = noise - action, and t runs from 1 to 0 in N steps of
delta = 1/N. With x0 = x_t - t v and x1 = x_t + (1 - t) v, one step is  x' ~ Normal(w0 x0 + w1 x1, std):

    ODE         w0 = 1 - (t - delta)   w1 = t - delta                            std = 0
    Flow-SDE    w0 = 1 - (t - delta)   w1 = t - delta - sigma^2 delta / (2 t)    std = sqrt(delta) sigma
    Flow-Noise  as ODE                                                           std learned

    sigma_i = noise_level * sqrt(t_i / (1 - t'_i)),   t' = t, but t' = 1 - 1/N at t = 1

Flow-SDE makes ONE of the N steps stochastic, the rest ODE. Here that step is drawn for each sample; pi_RL's code draws
one for the whole batch, which has the same distribution for a sample and more variance for a batch mean.

Axis legend: B batch, N steps, H horizon, A action width (padded).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], t [B]) -> v [B, H, A]."""
NoisyVelocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, H, A], t [B]) -> v and standard deviation, both [B, H, A]."""


def timesteps(steps: int) -> Tensor:
    """1, 1 - 1/N, ..., 1/N, 0 as float32 [N + 1]."""
    return torch.linspace(1.0, 0.0, steps + 1)


def sde_table(steps: int, noise_level: float) -> tuple[Tensor, Tensor, Tensor]:
    """(w0, w1, std) of the Flow-SDE step that starts at each of the N timesteps, float32 [N]."""
    tau = timesteps(steps).double()
    t, later = tau[:-1], tau[1:]
    # At t = 1 the denominator 1 - t vanishes; the next timestep stands in, there only.
    denominator = 1.0 - torch.cat([tau[1:2], t[1:]])
    sigma = noise_level * (t / denominator).sqrt()
    delta = 1.0 / steps
    w1 = later - sigma.square() * delta / (2.0 * t)
    return (1.0 - later).float(), w1.float(), (sigma * math.sqrt(delta)).float()


@lru_cache(maxsize=64)
def _tables(steps: int, noise_level: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t [N + 1], w0, w1, std [N]) on a device, made once: a CUDA graph must not copy from the host."""
    # A server that runs in inference mode must not leave tensors behind that training cannot use.
    with torch.inference_mode(False):
        return tuple(table.to(device) for table in (timesteps(steps), *sde_table(steps, noise_level)))


def transition_mean(x: Tensor, v: Tensor, t: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
    """w0 (x - t v) + w1 (x + (1 - t) v) for x, v [B, H, A] and t, w0, w1 [B]."""
    t, w0, w1 = (value[:, None, None] for value in (t, w0, w1))
    return w0 * (x - t * v) + w1 * (x + (1.0 - t) * v)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Elementwise log N(x; mean, std), exactly 0 where std is 0 (a deterministic entry carries no density)."""
    safe = torch.where(std > 0, std, torch.ones_like(std))
    log_prob = -0.5 * ((x - mean) / safe).square() - safe.log() - 0.5 * math.log(2.0 * math.pi)
    return torch.where(std > 0, log_prob, torch.zeros_like(log_prob))


def gaussian_entropy(std: Tensor) -> Tensor:
    """Elementwise entropy of N(., std), 0 where std is 0."""
    safe = torch.where(std > 0, std, torch.ones_like(std))
    entropy = safe.log() + 0.5 * math.log(2.0 * math.pi * math.e)
    return torch.where(std > 0, entropy, torch.zeros_like(entropy))


def sample_ode(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler integration from noise [B, H, A] at t = 1 to actions at t = 0."""
    x = noise
    for t in timesteps(steps)[:-1].tolist():
        x = x - velocity(x, x.new_full(x.shape[:1], t)) / steps
    return x


def sample_sde(
    velocity: Velocity, noise: Tensor, innovation: Tensor, index: Tensor, steps: int, noise_level: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ODE steps, but a Flow-SDE step at ``index``.

    Args:
        velocity: the network given its prefix.
        noise: x at t = 1, standard normal [B, H, A].
        innovation: standard normal [B, H, A], used at the stochastic step.
        index: int64 [B] in [0, steps): which step is stochastic.
        steps: N.
        noise_level: scale of sigma.

    Returns:
        Actions x_0, the stochastic transition (x_k, x_{k+1}), and its elementwise log-probability, each [B, H, A].
    """
    tau, w0, w1, std = _tables(steps, noise_level, noise.device)
    x, before, after = noise, torch.empty_like(noise), torch.empty_like(noise)
    for i in range(steps):
        t = tau[i].expand(x.shape[0])
        v = velocity(x, t)
        chosen = index == i
        weight1 = torch.where(chosen, w1[i], tau[i + 1])
        mean = transition_mean(x, v, t, w0[i].expand_as(t), weight1)
        stochastic = chosen[:, None, None]
        following = torch.where(stochastic, mean + std[i] * innovation, mean)
        before = torch.where(stochastic, x, before)
        after = torch.where(stochastic, following, after)
        x = following
    chosen_std = std[index][:, None, None].expand_as(x)
    log_prob = gaussian_log_prob(chosen_std * innovation, torch.zeros_like(x), chosen_std)
    return x, before, after, log_prob


def sde_step(velocity: Velocity, x_k: Tensor, index: Tensor, steps: int, noise_level: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, H, A] of the Flow-SDE transition that leaves ``x_k`` at step ``index`` [B]."""
    t, w0, w1, std = (table[index] for table in _tables(steps, noise_level, x_k.device))
    mean = transition_mean(x_k, velocity(x_k, t), t, w0, w1)
    return mean, std[:, None, None].expand_as(mean)


def sample_joint(velocity: NoisyVelocity, noise: Tensor, innovations: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Flow-Noise: every step stochastic with a learned deviation.

    Args:
        velocity: the network with its noise head.
        noise: x at t = 1, standard normal [B, H, A].
        innovations: standard normal [B, N, H, A].
        steps: N.

    Returns:
        The chain x_1 ... x_0 and the elementwise log-probabilities of its entries given the ones before them, both
        [B, N + 1, H, A].
    """
    zero = torch.zeros_like(noise)
    chain, log_probs = [noise], [gaussian_log_prob(noise, zero, torch.ones_like(noise))]
    for i in range(steps):
        mean, std = joint_step(velocity, chain[-1], i, steps)
        step = std * innovations[:, i]
        chain.append(mean + step)
        log_probs.append(gaussian_log_prob(step, zero, std))
    return torch.stack(chain, dim=1), torch.stack(log_probs, dim=1)


def joint_step(velocity: NoisyVelocity, x: Tensor, index: int, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and learned standard deviation [B, H, A] of the Flow-Noise transition that leaves x at step ``index``."""
    tau = timesteps(steps)
    v, std = velocity(x, x.new_full(x.shape[:1], tau[index].item()))
    return x - v / steps, std


class NoiseHead(nn.Module):
    """Flow-Noise: hidden states of the action expert -> standard deviation inside ``std_range``.

    A tanh MLP whose tanh output spans the log-variance range [log min^2, log max^2].
    """

    def __init__(self, width: int, hidden: tuple[int, ...], action_dim: int, std_range: tuple[float, float]) -> None:
        super().__init__()
        sizes = (width, *hidden, action_dim)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.mlp = nn.Sequential(*layers)
        self.std_range = std_range

    def forward(self, hidden: Tensor) -> Tensor:
        """Float32 [B, H, We] -> standard deviation [B, H, A]."""
        low, high = (2.0 * math.log(bound) for bound in self.std_range)
        log_variance = low + 0.5 * (self.mlp(hidden) + 1.0) * (high - low)
        return torch.exp(0.5 * log_variance)


def sample_training_time(batch: int, generator: torch.Generator) -> Tensor:
    """Times 0.999 Beta(1.5, 1) + 0.001, float32 [B]: more weight near the noise.

    Beta(a, 1) has the distribution function t^a, so u^(1/a) of a uniform u is a sample.
    """
    uniform = torch.rand(batch, generator=generator, device=generator.device)
    return 0.999 * uniform.pow(1.0 / 1.5) + 0.001


def flow_matching_target(actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy actions x_t and the velocity to learn, noise - actions; all [B, H, A], ``t`` [B]."""
    weight = t[:, None, None]
    return weight * noise + (1.0 - weight) * actions, noise - actions
