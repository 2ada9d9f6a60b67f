"""Episodes without exploration, for measuring rather than learning, and films of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.interfaces import Policy, Step, VecEnv
from gsrl_core.rl.rollout import EpisodeStats


def play(env: VecEnv, policy: Policy, seeds: Sequence[int], generator: torch.Generator) -> tuple[EpisodeStats, Tensor]:
    """One episode per seed with the policy's ODE.

    The policy is always asked for the whole batch, in the order of the seeds, also when some episodes are over: the
    initial noise of an episode then depends on its place in the batch and on ``generator`` alone, not on how the others
    fare. So two policies that are measured on the same batches meet the same noise.

    Args:
        env: its ``num_envs`` must be the number of seeds.
        policy: whose actions are executed.
        seeds: of the episodes.
        generator: of the policy's noise, on the CPU.

    Returns:
        Statistics, and the actions float32 [B, T, A] that were asked for (those after an episode's end had no effect).

    Raises:
        SimulationError: an episode did not end within the environment's own limit.
    """
    observation = env.reset(seeds)
    chunks: list[Tensor] = []
    length = torch.zeros(len(seeds), dtype=torch.int64)
    total = torch.zeros(len(seeds))
    step: Step | None = None
    while step is None or not (step.terminated | step.truncated).all():
        if step is not None and length.max() > env.max_episode_steps:
            raise SimulationError(f"episodes run past the limit of {env.max_episode_steps} steps; seeds {list(seeds)}")
        actions = policy.act(observation, generator, explore=False).actions
        chunks.append(actions.cpu())
        step = env.step_chunk(actions)
        length += step.executed.cpu()
        total += step.reward.cpu() * (step.executed.cpu() > 0)
        observation = step.observation
    stats = EpisodeStats(tuple(seeds), step.success.cpu(), step.success_seed.cpu(), length, total, step.lost.cpu())
    return stats, torch.cat(chunks, dim=1)


def film(env: VecEnv, seeds: Sequence[int], actions: Tensor) -> tuple[list[Tensor], Tensor]:
    """Execute ``actions`` float32 [B, T, A] again, step by step, with a picture of each.

    An environment of its own for the few episodes that somebody watches: where all are played, one picture per chunk is
    enough.

    Returns:
        For each episode uint8 [frames, h, w, 3] of the first camera up to its end, and strict success bool [B].
    """
    observation = env.reset(seeds)
    camera = next(iter(observation.rgb))
    frames = [observation.rgb[camera].cpu()]
    length = torch.zeros(len(seeds), dtype=torch.int64)
    success = torch.zeros(len(seeds), dtype=torch.bool)
    for action in actions.split(1, dim=1):
        step = env.step_chunk(action.to(observation.state.device))
        frames.append(step.observation.rgb[camera].cpu())
        length += step.executed.cpu()
        success = step.success.cpu()
        if (step.terminated | step.truncated).all():
            break
    return [torch.stack([frame[b] for frame in frames[: 1 + int(length[b])]]) for b in range(len(seeds))], success
