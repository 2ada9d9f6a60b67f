"""Scripted demonstrations in the splat-rendered environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gsrl_core.artifacts import digest_folder, write_json
from gsrl_core.embodiment import default_device
from gsrl_core.errors import ConfigError, SimulationError
from gsrl_core.interfaces import Observation, Reporter, Step, VecEnv
from gsrl_core.policy.demonstrations import Episode, claim_folder, load_demonstrations, shard_folder, write_shard
from gsrl_core.sections import PipelineConfig, SimConfig


class PrivilegedEnv(VecEnv, Protocol):
    """Environments that also tell the true state."""

    def privileged(self) -> dict[str, Tensor]:
        """Poses of TCP and objects and the joint positions, each with leading B."""
        ...


EXPERT_MODE = "pd_ee_target_delta_pose"
"""The control mode whose actions the experts of all tasks give."""
Expert = Callable[[dict[str, Tensor]], Tensor]
"""Privileged state -> clean actions float32 [B, A]."""


def collect_demos(scene: Path, out: Path, config: PipelineConfig, reporter: Reporter) -> dict[str, Any]:
    """Run the scripted expert on ``demos.episodes`` seeds in the scene folder ``scene`` and keep what succeeds.

    Finished shards in ``out`` are kept, so an interrupted call continues. Returns and writes (demos.json) the facts.

    Raises:
        ConfigError: ``sim.control_mode`` is not the expert's.
        SceneError, SimulationError: the environment cannot be built.
        TrainingError: ``out`` holds shards of another scene or other settings, or no episode succeeded.
    """
    _require_control_mode(config.sim)
    from gsrl_core.sim.gs_env import make_env
    from gsrl_core.sim.tasks import configured_task
    from gsrl_core.splat.raster import make_rasterizer
    from gsrl_core.splat.scene import load_scene

    device = torch.device("cpu") if config.sim.rasterizer == "numba" else default_device()
    loaded = load_scene(scene).to(device)
    expert = configured_task(config.sim).expert()
    env = make_env(config.sim, loaded, make_rasterizer(config.sim.rasterizer))
    try:
        return record_demos(env, expert, out, config, reporter, scene=digest_folder(scene))
    finally:
        env.close()


def record_demos(
    env: PrivilegedEnv, expert: Expert, out: Path, config: PipelineConfig, reporter: Reporter, *, scene: str = ""
) -> dict[str, Any]:
    """The part of :func:`collect_demos` that does not care where the environment comes from.

    ``scene`` is the digest of what ``env`` shows. Raises TrainingError.
    """
    out.mkdir(parents=True, exist_ok=True)
    demos = config.demos
    claim_folder(out, _settings(config, scene))
    first_seeds = range(demos.seed, demos.seed + demos.episodes, env.num_envs)
    start = time.perf_counter()
    for done, first in enumerate(first_seeds):
        if not shard_folder(out, first).is_dir():
            seeds = list(range(first, first + env.num_envs))
            episodes = play(env, expert, seeds, demos.action_noise)
            wanted = demos.seed + demos.episodes
            write_shard(out, first, [episode for episode in episodes if episode.seed < wanted])
        reporter.progress((done + 1) / len(first_seeds), f"demonstrations from seed {first}")
    recorded = load_demonstrations(out)
    successes = len(recorded.episodes())
    facts = {
        "attempts": demos.episodes,
        "successes": successes,
        "success_rate": successes / demos.episodes,
        "frames": len(recorded),
        "control_hz": env.control_hz,
        "action_noise": demos.action_noise,
        "cameras": ", ".join(recorded.rgb),
    }
    write_json(out / "demos.json", facts)
    reporter.metrics(
        {
            "demos/success_rate": facts["success_rate"],
            "demos/frames": facts["frames"],
            "time/demos": time.perf_counter() - start,
        },
        0,
    )
    return facts


def play(
    env: PrivilegedEnv, expert: Expert, seeds: list[int], action_noise: float, *, attempts: int = 2
) -> list[Episode]:
    """One batch of episodes; those that succeed strictly, in the order of their seeds.

    Where the physics crashed in an episode the whole batch is played again, up to ``attempts`` times in all.
    What is executed is disturbed by Normal(0, ``action_noise``) metres on the translation; what is recorded is the
    expert's own choice in the disturbed state, so the data shows how to recover. The noise of an episode follows from
    its seed alone.

    Raises:
        SimulationError: the physics crashed in each of the attempts.
    """
    noise = torch.stack([_disturbance(seed, env.max_episode_steps) for seed in seeds]) * action_noise
    observation = env.reset(seeds)
    alive = torch.ones(len(seeds), dtype=torch.bool)
    rows: list[tuple[Observation, Tensor, Tensor]] = []
    success = torch.zeros(len(seeds), dtype=torch.bool)
    for index in range(env.max_episode_steps):
        clean = expert(env.privileged()).cpu()
        rows.append((_to_host(observation), clean, alive.clone()))
        executed = clean.clone()
        executed[:, :3] += noise[:, index]
        step: Step = env.step_chunk(executed[:, None])
        observation = step.observation
        success = step.success.cpu()
        alive &= ~(step.terminated | step.truncated).cpu()
        if not alive.any():
            break
    if step.lost.any():
        if attempts > 1:
            return play(env, expert, seeds, action_noise, attempts=attempts - 1)
        lost = [seed for seed, gone in zip(seeds, step.lost.tolist(), strict=True) if gone]
        raise SimulationError(f"the physics crashed in the episodes of seeds {lost}, again; the log has its last words")
    return [_episode(rows, env_index, seed) for env_index, seed in enumerate(seeds) if success[env_index]]


def _require_control_mode(sim: SimConfig) -> None:
    if sim.control_mode != EXPERT_MODE:
        raise ConfigError(
            f"sim.control_mode is {sim.control_mode!r}; the scripted expert speaks {EXPERT_MODE} only: record with "
            "that, or import demonstrations of your own with `dataset import`"
        )


def _settings(config: PipelineConfig, scene: str) -> dict[str, Any]:
    """What decides the content of the shards."""
    return {
        "scene": scene,
        "seed": config.demos.seed,
        "episodes": config.demos.episodes,
        "action_noise": config.demos.action_noise,
        "num_envs": config.sim.num_envs,
        "sim": config.sim.model_dump(mode="json", exclude={"workers", "rasterizer"}),
    }


def _disturbance(seed: int, steps: int) -> Tensor:
    return torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed))


def _to_host(observation: Observation) -> Observation:
    # Environments may reuse their buffers, so a copy is kept.
    rgb = {name: image.detach().to("cpu", copy=True) for name, image in observation.rgb.items()}
    return Observation(rgb, observation.state.detach().to("cpu", copy=True), observation.instruction)


def _episode(rows: list[tuple[Observation, Tensor, Tensor]], env_index: int, seed: int) -> Episode:
    own = [(observation, action) for observation, action, alive in rows if alive[env_index]]
    return Episode(
        seed=seed,
        instruction=own[0][0].instruction[env_index],
        rgb={
            camera: np.stack([observation.rgb[camera][env_index].numpy() for observation, _ in own])
            for camera in own[0][0].rgb
        },
        state=np.stack([observation.state[env_index].numpy() for observation, _ in own]),
        action=np.stack([action[env_index].numpy() for _, action in own]),
    )
