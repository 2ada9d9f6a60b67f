"""One iteration of the seed's recipe at full size: collecting, updating, and where the time goes.

    PYTHONPATH=.:benchmarks python benchmarks/iteration.py [--environments 64] [--rollout-epochs 8] [--stages 2]

64 environments x 8 batches of 100 control steps at 500 Hz / 10 Hz, chunks of 5, one 640 x 480 picture a chunk of the
scene of ``render_scene.py``, 5 denoising steps, 4 update epochs over 10,240 samples with a global batch of 2,048: the
project's own workers with pi0.5 of 3.35 B random weights in bfloat16. A random policy never succeeds, so no episode
ends early. A first batch of episodes and an update on it start the
workers, compile and grow buffers; they are not counted.

Parts are wall clock around calls. Physics and rendering of one group of environments run beside the policy's work for
another, so the parts of collecting may add up to more than the whole. Without a GPU the tiny model draws on the CPU,
which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import policy as policy_benchmark
import render_scene
import torch

from gsrl_core.policy.agent import Pi05Policy
from gsrl_core.rl.rollout import EpisodeStats
from gsrl_core.sections import ClusterConfig, PipelineConfig, PolicyConfig, PpoConfig, SimConfig
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.splat.raster import make_rasterizer
from gsrl_core.splat.scene import Scene
from gsrl_core.team import Team

CHUNK, STEPS = policy_benchmark.CHUNK, policy_benchmark.STEPS
LIMITS = (0.04, 0.04, 0.04, 0.1, 0.1, 0.1, 1.0)
"""What a network output of 1 means: translation (m), rotation vector (rad), gripper. Larger ones leave the reach."""


class Stopwatch:
    """Seconds spent in named calls, of any thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Time every call of ``owner.method`` until the device has done what was asked of it."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments, **named)
            policy_benchmark.wait()
            with self._lock:
                self.seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, method, timed)


@dataclass
class RandomEmbodiment:
    """Implements :class:`~gsrl_core.embodiment.Embodiment`: random weights, the benchmark's scene, watched calls."""

    sim: SimConfig
    scene: Scene
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def make_policy(self, device: torch.device) -> Pi05Policy:
        """Of the size that the device is for."""
        made = policy_benchmark.random_policy(torch.tensor(LIMITS))
        self.stopwatch.watch(made, "act", "policy")
        self.stopwatch.watch(made, "value", "policy")
        return made

    def make_env(self, num_envs: int, device: torch.device, perturbation: str | None = None) -> GsVecEnv:
        """One pipeline stage."""
        made = make_env(self.sim, self.scene.to(device), make_rasterizer(self.sim.rasterizer), num_envs)
        self.stopwatch.watch(made._physics, "step", "physics")
        self.stopwatch.watch(made._physics, "reset", "physics reset")
        self.stopwatch.watch(made, "_draw", "render")
        return made

    def save_policy(self, policy: Pi05Policy, folder: Path) -> None:
        """Random weights are not kept."""


def configuration(options: argparse.Namespace) -> PipelineConfig:
    """The seed's recipe at the sizes that were asked for."""
    return PipelineConfig(
        sim=SimConfig(
            num_envs=options.environments,
            workers=options.workers,
            max_episode_steps=options.control_steps,
            render_downscale=options.downscale,
        ),
        policy=PolicyConfig(action_chunk=CHUNK, denoise_steps=STEPS),
        ppo=PpoConfig(
            iterations=2,
            rollout_epochs=options.rollout_epochs,
            update_epochs=options.update_epochs,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
        ),
        cluster=ClusterConfig(pipeline_stage_num=options.stages),
    )


def warm_up(team: Team, environments: int) -> None:
    """One batch of episodes, and an update on it."""
    team._collectors.submit(0, "collect", range(environments), (0,)).result()
    team.update()


def iterate(team: Team, iteration: int, stopwatch: Stopwatch) -> tuple[dict[str, float], dict[str, float], int]:
    """Collect and update once. Returns seconds by part, the update's metrics and environment steps."""
    stopwatch.seconds.clear()
    start = time.perf_counter()
    stats: EpisodeStats = team.collect(iteration)[0]
    collected = time.perf_counter()
    metrics = team.update()
    policy_benchmark.wait()
    end = time.perf_counter()
    parts = {"whole iteration": end - start, "collect": collected - start}
    parts |= {f"  {part}": seconds for part, seconds in sorted(stopwatch.seconds.items())}
    parts |= {"update": metrics["time/actor_training"]}
    parts |= {"sync and the rest": end - collected - metrics["time/actor_training"]}
    return parts, metrics, int(stats.length.sum())


def table(parts: dict[str, float]) -> str:
    """Seconds and shares of the first row."""
    whole = next(iter(parts.values()))
    rows = [f"{name:<20}{seconds:>9.2f} s{100 * seconds / whole:>7.1f} %" for name, seconds in parts.items()]
    return "\n".join(rows)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One iteration after a short one. Returns what is printed as JSON."""
    config = configuration(options)
    scene = render_scene.scene(options.splats, 2 * options.splats)
    embodiment = RandomEmbodiment(config.sim, scene)
    start = time.perf_counter()
    team = Team(embodiment, config)
    try:
        warm_up(team, options.environments)
        begun = time.perf_counter()
        policy_benchmark.peak_gib(reset=True)
        parts, metrics, steps = iterate(team, 1, embodiment.stopwatch)
        peak = policy_benchmark.peak_gib()
    finally:
        team.close()
    print(table(parts), flush=True)
    return {
        "benchmark": "iteration",
        "device": torch.cuda.get_device_name() if policy_benchmark.CUDA else "cpu",
        "environments": options.environments,
        "stages": options.stages,
        "env_steps": steps,
        "samples": int(metrics["rollout/samples"]),
        "optimizer_steps": int(metrics["actor/optimizer_steps"]),
        "env_steps_per_s_collecting": round(steps / parts["collect"], 1),
        "seconds": {name.strip(): round(seconds, 3) for name, seconds in parts.items()},
        "start_and_warm_up_s": round(begun - start, 1),
        "peak_gib": round(peak, 1),
        "log_prob_mismatch_mean": round(metrics["rollout/log_prob_mismatch_mean"], 5),
        "log_prob_mismatch_max": round(metrics["rollout/log_prob_mismatch_max"], 5),
        "approx_kl": round(metrics["actor/approx_kl"], 5),
    }


def main() -> None:
    """Print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=64)
    parser.add_argument("--stages", type=int, default=2, help="groups of environments that are stepped in turn")
    parser.add_argument("--rollout-epochs", type=int, default=8, help="batches of episodes")
    parser.add_argument("--control-steps", type=int, default=100, help="length of an episode")
    parser.add_argument("--update-epochs", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0, help="physics processes; 0 takes two for each core")
    parser.add_argument("--splats", type=int, default=150_000, help="of the foreground; twice as many behind")
    parser.add_argument("--downscale", type=int, default=1, help="pictures of 640/n x 480/n")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the prefixes' memory estimate
    print(json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    main()
