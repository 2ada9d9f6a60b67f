"""Environment steps per second end to end: physics on all cores, one picture per chunk, and where the time goes.

    PYTHONPATH=. python benchmarks/environment.py [--environments 64] [--seconds 20] [--rasterizer cuda]

The default task at 500 Hz / 10 Hz with random actions in chunks of 5, whole episodes, the scene of ``render_scene.py``
at 640 x 480. Resets (new physics scenes and their first pictures) count. The table's parts are measured around calls
that wait for the device, so they add up to a little more than the run without them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import render_scene

from gsrl_core.sections import SimConfig
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.splat.raster import make_rasterizer

CHUNK = 5
REACH, TURN = 0.04, 0.1
"""Largest random translation (m) and rotation vector (rad) per axis of one action."""


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


def play(env: GsVecEnv, seconds: float, seed: int = 0) -> tuple[int, float]:
    """Whole batches of random episodes for at least ``seconds``. Returns environment steps and seconds."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([REACH] * 3 + [TURN] * 3 + [1.0])
    steps, batch = 0, 0
    _wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.reset([batch * env.num_envs + i for i in range(env.num_envs)])
        batch += 1
        running = True
        while running:
            actions = (2 * torch.rand(env.num_envs, CHUNK, 7, generator=generator) - 1) * limits
            result = env.step_chunk(actions)
            steps += int(result.executed.sum())
            running = not bool((result.terminated | result.truncated).all())
    _wait()
    return steps, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print one JSON object: the rate, then the parts in seconds and as shares of the watched run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="physics processes; 0 takes one for each core")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rasterizer", default="auto", choices=("auto", "cuda", "gsplat", "numba"))
    parser.add_argument("--downscale", type=int, default=1, help="pictures of 640/n x 480/n")
    options = parser.parse_args()
    sim = SimConfig(num_envs=options.environments, workers=options.workers, render_downscale=options.downscale)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scene = render_scene.scene().to(device)
    with make_env(sim, scene, make_rasterizer(options.rasterizer)) as env:
        play(env, 0.0)  # one batch: starts workers, compiles, grows buffers
        steps, took = play(env, options.seconds, seed=1)
        parts = Parts()
        parts.watch(env._physics, "step", "physics")
        parts.watch(env._physics, "reset", "physics reset")
        parts.watch(env._rasterizer, "render", "render")
        parts.watch(env, "_draw", "poses, cameras, render, realism")
        watched_steps, watched = play(env, options.seconds / 2, seed=2)
    shares = {part: round(seconds / watched, 4) for part, seconds in parts.seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "environment",
                "environments": options.environments,
                "workers": options.workers or "one per core",
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "env_steps_per_second": round(steps / took, 1),
                "env_steps": steps,
                "seconds": round(took, 2),
                "watched_env_steps_per_second": round(watched_steps / watched, 1),
                "shares_of_watched_time": shares,
            }
        )
    )


if __name__ == "__main__":
    main()
