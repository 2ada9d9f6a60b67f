"""Environment steps per second end to end: physics on all cores, one picture per chunk, and where the time goes.

    PYTHONPATH=. python benchmarks/environment.py [--environments 64] [--stages 2] [--seconds 20] [--rasterizer cuda]

The default task at 500 Hz / 10 Hz with random actions in chunks of 5, whole episodes, the scene of ``render_scene.py``
at 640 x 480, through the rollout loop that PPO uses. Resets (new physics scenes and their first pictures) count. With
two pipeline stages one half of the environments moves while the other is drawn and acted upon. The parts are measured
in another run with one stage, around calls that wait for the device: they say what there is to overlap.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import render_scene

from gsrl_core.interfaces import ActionSample, Observation
from gsrl_core.rl.rollout import collect
from gsrl_core.sections import SimConfig
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.sim.throughput import RANDOM_LIMITS
from gsrl_core.splat.raster import make_rasterizer

CHUNK = 5


class RandomPolicy:
    """Uniform actions, no memory of them."""

    def __init__(self) -> None:
        self._limits = torch.tensor(RANDOM_LIMITS)

    def act(self, observation: Observation, generator: torch.Generator, *, explore: bool) -> ActionSample:
        """Chunks [B, 5, 7] in control units."""
        rows = len(observation.state)
        actions = (2 * torch.rand(rows, CHUNK, 7, generator=generator) - 1) * self._limits
        return ActionSample(actions, torch.zeros(rows), torch.zeros(rows), {})

    def value(self, observation: Observation) -> Tensor:
        """Nothing is expected."""
        return torch.zeros(len(observation.state))


class Parts:
    """Seconds spent in parts of the environment."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Time every call of ``owner.method`` until the device is done."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.time(part):
                return inner(*arguments, **named)

        setattr(owner, method, timed)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add what happens inside to ``part``."""
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        self.seconds[part] += time.perf_counter() - start


def play(envs: Sequence[GsVecEnv], seconds: float, seed: int = 0) -> tuple[int, float]:
    """Batches of random episodes that take about ``seconds``. Returns environment steps and seconds."""
    width = sum(env.num_envs for env in envs)
    generator = torch.Generator().manual_seed(seed)

    def batches(count: int) -> tuple[int, float]:
        _wait()
        start = time.perf_counter()
        seeds = range(seed * 1_000_000, seed * 1_000_000 + count * width)
        _, stats = collect(envs, RandomPolicy(), seeds, generator, max_chunks=envs[0].max_episode_steps // CHUNK)
        _wait()
        return int(stats.length.sum()), time.perf_counter() - start

    steps, took = batches(1)
    repeats = round(seconds / took)
    return batches(repeats) if repeats > 1 else (steps, took)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def main() -> None:
    """Print one JSON object: the rate, then the parts as shares of the run with one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=64)
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages")
    parser.add_argument("--workers", type=int, default=0, help="physics processes over all stages; 0: two a core each")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rasterizer", default="auto", choices=("auto", "cuda", "gsplat", "numba"))
    parser.add_argument("--downscale", type=int, default=1, help="pictures of 640/n x 480/n")
    options = parser.parse_args()
    if options.environments % options.stages or options.workers % options.stages:
        parser.error("--environments and --workers must be multiples of --stages")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scene = render_scene.scene().to(device)

    def environment(stages: int) -> GsVecEnv:
        sim = SimConfig(
            num_envs=options.environments // stages,
            workers=options.workers // stages,
            render_downscale=options.downscale,
        )
        return make_env(sim, scene, make_rasterizer(options.rasterizer))

    with ExitStack() as stack:
        envs = [stack.enter_context(environment(options.stages)) for _ in range(options.stages)]
        workers = sum(len(env._physics._workers) for env in envs)
        play(envs, 0.0)  # one batch: starts workers, compiles, grows buffers
        steps, took = play(envs, options.seconds, seed=1)
    with environment(1) as env:
        play([env], 0.0)
        parts = Parts()
        parts.watch(env._physics, "step", "physics")
        parts.watch(env._physics, "reset", "physics reset")
        parts.watch(env._rasterizer, "render", "render")
        parts.watch(env, "_draw", "poses, cameras, render, realism")
        watched_steps, watched = play([env], 0.0, seed=2)
    shares = {part: round(seconds / watched, 4) for part, seconds in parts.seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "environment",
                "environments": options.environments,
                "stages": options.stages,
                "workers": workers,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "env_steps_per_second": round(steps / took, 1),
                "env_steps": steps,
                "seconds": round(took, 2),
                "one_stage_env_steps_per_second": round(watched_steps / watched, 1),
                "shares_of_one_stage": shares,
            }
        )
    )


if __name__ == "__main__":
    main()
