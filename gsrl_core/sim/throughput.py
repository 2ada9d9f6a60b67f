"""How many control steps a second a physics backend makes, in random and in expert-like motion."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from gsrl_core.sim.pool import Physics
from gsrl_core.sim.privileged import privileged
from gsrl_core.sim.task import EpisodeSpec, Task

RANDOM_LIMITS = (0.04,) * 3 + (0.04,) * 3 + (1.0,)
"""Half ranges of a random action: translation (m), rotation (rad), and the gripper's whole range."""
_EXPERT_STEPS = 50


def motions(
    groups: Sequence[Physics], task: Task, chunk: int, steps: int, seconds: float
) -> Iterator[tuple[str, float]]:
    """Name of a motion and its executed control steps per second over all environments, resets included.

    Args:
        groups: what is measured, side by side as the pipeline stages of a rollout are: none waits for another's
            slowest environment. They play the episodes of seeds 0 to B - 1 again and again.
        task: what they play.
        chunk: actions per command.
        steps: length of a random episode; a multiple of ``chunk``. Expert-like ones end with success.
        seconds: length of each measurement.
    """
    bounds = np.cumsum([0, *(len(group.states.elapsed) for group in groups)])
    specs = [[EpisodeSpec(seed) for seed in range(*pair)] for pair in itertools.pairwise(bounds.tolist())]
    random = np.split(random_actions(bounds[-1], steps), bounds[1:-1])
    expert = [expert_actions(group, task, own, chunk) for group, own in zip(groups, specs, strict=True)]
    for name, actions in (("random", random), ("expert", expert)):
        start = time.perf_counter()
        play = partial(_play, chunk=chunk, until=start + seconds)
        with ThreadPoolExecutor(len(groups)) as threads:
            executed = sum(threads.map(play, groups, specs, actions))
        yield name, executed / (time.perf_counter() - start)


def random_actions(num_envs: int, steps: int, seed: int = 0) -> np.ndarray:
    """Independent uniform actions of ``pd_ee_target_delta_pose``, float32 [B, T, 7]."""
    return (RANDOM_LIMITS * np.random.default_rng(seed).uniform(-1, 1, (num_envs, steps, 7))).astype(np.float32)


def expert_actions(physics: Physics, task: Task, specs: Sequence[EpisodeSpec], chunk: int) -> np.ndarray:
    """What the scripted expert does in these episodes, float32 [B, T, 7]; replayed, it moves the same."""
    steps = -(-_EXPERT_STEPS // chunk) * chunk
    actions = np.zeros((len(specs), steps, 7), dtype=np.float32)
    physics.reset(specs)
    expert, objects = task.expert(), [thing.name for thing in task.bodies]
    for t in range(steps):
        actions[:, t] = expert(privileged(physics.states, objects)).numpy()
        physics.step(actions[:, t : t + 1], _running(physics))
    return actions


def _play(physics: Physics, specs: Sequence[EpisodeSpec], actions: np.ndarray, chunk: int, until: float) -> int:
    """Repeat one episode of each environment until the clock says ``until``; the control steps executed."""
    executed = 0
    while True:
        physics.reset(specs)
        for t in range(0, actions.shape[1], chunk):
            physics.step(actions[:, t : t + chunk], _running(physics))
            executed += int(physics.states.executed.sum())
            if time.perf_counter() >= until:
                return executed


def _running(physics: Physics) -> np.ndarray:
    return (physics.states.success | physics.states.lost) == 0
