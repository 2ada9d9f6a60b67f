"""The seams between simulation, policy, learning and rendering: what crosses them, with shapes.

Axis legend: B environments, T chunk steps, H actions in a chunk, A action width, S state width, M bodies,
h w pixels. All tensors of one value live on one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.scene import Scene

Level = Literal["chunk", "action", "token"]
"""What one number of a log-probability or an entropy belongs to: all that is executed of a chunk, shape [B]; one of its
H actions, [B, H]; or one entry of one action, [B, H, A]. Each is the sum over what it holds (RLinf's ``chunk_level``,
``action_level`` and ``token_level``)."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one decision."""

    rgb: Mapping[str, Tensor]
    """Camera name -> uint8 [B, h, w, 3]."""
    state: Tensor
    """Proprioception, float32 [B, S]: joint positions (rad) then finger positions (m)."""
    instruction: tuple[str, ...]
    """One sentence per environment, length B."""

    def select(self, index: Tensor) -> Observation:
        """The observation of the environments in ``index`` (int64 [b])."""
        return Observation(
            rgb={name: image[index] for name, image in self.rgb.items()},
            state=self.state[index],
            instruction=tuple(self.instruction[i] for i in index.tolist()),
        )


@dataclass(frozen=True)
class Step:
    """The result of executing one action chunk (H = 1 gives the classic step). There is no auto-reset."""

    observation: Observation
    """After the last executed action."""
    reward: Tensor
    """float32 [B]: summed over the executed actions of the chunk."""
    terminated: Tensor
    """bool [B]: the task ended (success) inside this chunk or before."""
    truncated: Tensor
    """bool [B]: the time limit was reached without termination, or the episode was lost."""
    success: Tensor
    """bool [B]: strict success reached inside this chunk or before."""
    success_seed: Tensor
    """bool [B]: the seed's looser test was met at any time so far."""
    executed: Tensor
    """int64 [B]: control steps executed in this chunk (0 for an environment that was already done)."""
    lost: Tensor
    """bool [B]: the simulation crashed in this episode. It ended, truncated and without success, in the state before
    the chunk, and says nothing about the policy; the next reset starts anew."""


class VecEnv(Protocol):
    """A batch of environments. Seeds decide everything: same seed and actions, same episode, on every backend."""

    num_envs: int
    action_dim: int
    control_hz: float
    max_episode_steps: int

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start one episode per seed; ``len(seeds)`` must be ``num_envs``."""
        ...

    def step_chunk(self, actions: Tensor) -> Step:
        """Execute ``actions`` float32 [B, H, A] in control units; environments that are done stay frozen.

        An environment that terminates in the middle of the chunk ignores the rest of it. One frame is rendered,
        after the chunk.
        """
        ...

    def render_video_frame(self) -> Tensor:
        """uint8 [B, h, w, 3] of the first camera now."""
        ...

    def close(self) -> None:
        """Stop workers and free shared memory."""
        ...


@dataclass(frozen=True)
class ActionSample:
    """What a policy returns for a batch of observations."""

    actions: Tensor
    """float32 [B, H, A] in control units (denormalised), ready for ``VecEnv.step_chunk``."""
    log_prob: Tensor
    """float32 [B], [B, H] or [B, H, A], as the policy's level says: log-probability of the stochastic transition(s),
    zero for a deterministic sample."""
    value: Tensor
    """float32 [B]: critic; a policy may leave it zero in a sample without exploration, which nobody learns from."""
    chain: Mapping[str, Tensor]
    """All that ``Policy.evaluate`` needs to recompute ``log_prob`` and ``value``, every tensor with leading B."""


@dataclass(frozen=True)
class Evaluation:
    """Differentiable quantities of stored samples under the current weights."""

    log_prob: Tensor
    """float32 [B], [B, H] or [B, H, A], as ``ActionSample.log_prob``."""
    entropy: Tensor
    """float32 [B], [B, H] or [B, H, A], at a level of its own; zero where the noise is not learned."""
    value: Tensor
    """float32 [B]."""


class Policy(Protocol):
    """A stochastic chunk policy with a critic."""

    horizon: int
    action_dim: int

    def act(self, observation: Observation, generator: torch.Generator, *, explore: bool) -> ActionSample:
        """Sample a chunk. ``explore=False`` integrates the ODE (noise still drawn from ``generator``)."""
        ...

    def evaluate(self, chain: Mapping[str, Tensor]) -> Evaluation:
        """Recompute log-probability, entropy and value of stored samples, with gradients."""
        ...

    def value(self, observation: Observation) -> Tensor:
        """Critic alone, float32 [B], no gradients."""
        ...


class Rasterizer(Protocol):
    """Draws a posed scene. Implementations: numba (CPU) and gsplat (CUDA); they give the same picture."""

    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment.

        Args:
            scene: the static part and the bodies, each in its own rest frame.
            body_to_world: float32 [B, M, 4, 4].
            cameras: name -> Camera whose leading size is 1 (one pose for all environments) or B.
            extras: also return depth, alpha and body ids.
        """
        ...


class Reporter(Protocol):
    """Where long work tells how it goes; the library knows nothing of MLflow, Prefect or TensorBoard."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers at ``step``."""
        ...

    def image(self, name: str, rgb: Tensor, step: int) -> None:
        """Record a uint8 [h, w, 3] picture."""
        ...

    def progress(self, fraction: float, message: str) -> None:
        """``fraction`` in [0, 1] of the current work, with a short text."""
        ...


class NullReporter:
    """A Reporter that drops everything (tests, library use)."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Drop."""

    def image(self, name: str, rgb: Tensor, step: int) -> None:
        """Drop."""

    def progress(self, fraction: float, message: str) -> None:
        """Drop."""
