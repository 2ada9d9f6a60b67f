"""Episodes without exploration, for measuring rather than learning; optionally filmed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.interfaces import Policy, Step, VecEnv
from gsrl_core.rl.rollout import EpisodeStats


def play(
    env: VecEnv, policy: Policy, seeds: Sequence[int], generator: torch.Generator, *, film: int = 0
) -> tuple[EpisodeStats, list[Tensor]]:
    """One episode per seed with the policy's ODE.

    The policy is always asked for the whole batch, in the order of the seeds, also when some episodes are over: the
    initial noise of an episode then depends on its place in the batch and on ``generator`` alone, not on how the others
    fare. So two policies that are measured on the same batches meet the same noise.

    Args:
        env: its ``num_envs`` must be the number of seeds.
        policy: whose actions are executed.
        seeds: of the episodes.
        generator: of the policy's noise, on the CPU.
        film: the first so many episodes are filmed, one frame per control step (the chunk is then executed step by
            step, which costs a rendering of all environments each, and changes nothing else).

    Returns:
        Statistics, and for each filmed episode uint8 [frames, h, w, 3] of the first camera up to its end.

    Raises:
        SimulationError: an episode did not end within the environment's own limit.
    """
    observation = env.reset(seeds)
    camera = next(iter(observation.rgb))
    frames = [observation.rgb[camera][:film].cpu()]
    length = torch.zeros(len(seeds), dtype=torch.int64)
    total = torch.zeros(len(seeds))
    step: Step | None = None
    while step is None or not (step.terminated | step.truncated).all():
        if step is not None and length.max() > env.max_episode_steps:
            raise SimulationError(f"episodes run past the limit of {env.max_episode_steps} steps; seeds {list(seeds)}")
        actions = policy.act(observation, generator, explore=False).actions
        for piece in actions.split(1, dim=1) if film else (actions,):
            step = env.step_chunk(piece)
            length += step.executed.cpu()
            total += step.reward.cpu() * (step.executed.cpu() > 0)
            if film:
                frames.append(step.observation.rgb[camera][:film].cpu())
        assert step is not None
        observation = step.observation
    stats = EpisodeStats(tuple(seeds), step.success.cpu(), step.success_seed.cpu(), length, total)
    films = [torch.stack([frame[number] for frame in frames[: 1 + int(length[number])]]) for number in range(film)]
    return stats, films
