"""How many control steps a second a physics backend makes, in random and in expert-like motion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from gsrl_core.sim.pool import Physics
from gsrl_core.sim.privileged import privileged
from gsrl_core.sim.task import EpisodeSpec, Task

RANDOM_MOVE, RANDOM_TURN = 0.04, 0.04
"""Half ranges of a random action's translation (m) and rotation (rad); the gripper takes its whole range."""
_EXPERT_STEPS = 50


def motions(physics: Physics, task: Task, chunk: int, steps: int, seconds: float) -> Iterator[tuple[str, float, float]]:
    """Name of a motion, its executed control steps per second over all environments, and those of its best episode.

    Args:
        physics: what is measured; it plays the episodes of seeds 0 to B - 1.
        task: what it plays.
        chunk: actions per command.
        steps: length of a random episode; a multiple of ``chunk``. Expert-like ones end with success.
        seconds: episodes are repeated until this has passed; resets do not count.
    """
    specs = [EpisodeSpec(seed) for seed in range(len(physics.states.elapsed))]
    for name, actions in (
        ("random", random_actions(len(specs), steps)),
        ("expert", expert_actions(physics, task, specs, chunk)),
    ):
        rates, executed, spent = [], 0, 0.0
        while spent < seconds:
            count, time_taken = _play(physics, specs, actions, chunk)
            rates.append(count / time_taken)
            executed, spent = executed + count, spent + time_taken
        yield name, executed / spent, max(rates)


def random_actions(num_envs: int, steps: int, seed: int = 0) -> np.ndarray:
    """Independent uniform actions of ``pd_ee_target_delta_pose``, float32 [B, T, 7]."""
    high = np.array([RANDOM_MOVE] * 3 + [RANDOM_TURN] * 3 + [1.0])
    return (high * np.random.default_rng(seed).uniform(-1, 1, (num_envs, steps, 7))).astype(np.float32)


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


def _play(physics: Physics, specs: Sequence[EpisodeSpec], actions: np.ndarray, chunk: int) -> tuple[int, float]:
    """Control steps executed in one episode of each environment, and the seconds they took."""
    physics.reset(specs)
    executed, start = 0, time.perf_counter()
    for t in range(0, actions.shape[1], chunk):
        physics.step(actions[:, t : t + chunk], _running(physics))
        executed += int(physics.states.executed.sum())
    return executed, time.perf_counter() - start


def _running(physics: Physics) -> np.ndarray:
    return (physics.states.success | physics.states.lost) == 0
