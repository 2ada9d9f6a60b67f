"""Random control steps with pictures, for as long as it takes: does memory grow, a picture break, a worker hang?

    PYTHONPATH=. python benchmarks/soak.py --steps 1000000 --state soak.json [--minutes 9] [--kill-every 20]

Prints one JSON line a minute and a verdict at the end, whose exit code is 1 where a check failed. ``--state`` carries
steps, seeds and faults from run to run, so that a million steps can be made in pieces; every piece is judged for leaks
by itself, after its first quarter. ``--kill-every`` kills a worker at random times (seconds, mean) as a crash would.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.bench import synthetic_scene
from gsrl_core.embodiment import default_device
from gsrl_core.geometry.camera import Camera
from gsrl_core.interfaces import Frames, Rasterizer
from gsrl_core.sections import CameraConfig, SimConfig
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.sim.tasks import load_task
from gsrl_core.sim.throughput import RANDOM_LIMITS
from gsrl_core.splat.raster import make_rasterizer
from gsrl_core.splat.scene import Scene

LEAK = 1.05, 16.0
"""Memory may grow by this factor and these MiB between the second and the last quarter of a run."""


def faults(frames: Frames) -> Counter[str]:
    """What is wrong with pictures, and in how many of them."""
    found: Counter[str] = Counter()
    pixels = frames.rgb.flatten(1, 2)
    low, high = pixels.amin(dim=1), pixels.amax(dim=1)
    black = (high == 0).all(dim=1)
    found["black"] = int(black.sum())
    found["constant"] = int(((low == high).all(dim=1) & ~black).sum())
    for name in ("depth", "alpha"):
        layer = getattr(frames, name)
        if layer is not None:
            found[f"{name} not finite"] = int((~torch.isfinite(layer)).flatten(1).any(dim=1).sum())
    return +found


class Inspector:
    """A rasterizer that looks at everything it draws; 8-bit colours cannot hold a NaN, depth and alpha can."""

    def __init__(self, rasterizer: Rasterizer) -> None:
        self._rasterizer = rasterizer
        self.pictures = 0
        self.faults: Counter[str] = Counter()

    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """See :class:`gsrl_core.interfaces.Rasterizer`."""
        if not torch.isfinite(body_to_world).all():
            self.faults["pose not finite"] += 1
        drawn = self._rasterizer.render(scene, body_to_world, cameras, extras=True)
        for frames in drawn.values():
            self.pictures += len(frames.rgb)
            self.faults += faults(frames)
        return drawn


def resident(pid: int) -> float:
    """Resident memory of a process (MiB); 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def on_device() -> float:
    """Memory that tensors hold on the CUDA device (MiB); 0 without one."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def leaks(history: list[float]) -> bool:
    """Whether the median of the last quarter of ``history`` (MiB) is above that of the second by more than LEAK."""
    quarter = len(history) // 4
    if not quarter:
        return False
    early, late = (sorted(part)[quarter // 2] for part in (history[quarter : 2 * quarter], history[-quarter:]))
    return late > LEAK[0] * early + LEAK[1]


class Killer(threading.Thread):
    """Kills a random worker now and then; ``env`` starts another at its next reset."""

    def __init__(self, env: GsVecEnv, every: float) -> None:
        super().__init__(daemon=True)
        self._env, self._every, self._random = env, every, random.Random(0)
        self.kills = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Until the soak is over."""
        while not self.over.wait(self._random.expovariate(1 / self._every)):
            pid = self._random.choice(worker_pids(self._env))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.kills += 1
            while pid in worker_pids(self._env) and not self.over.wait(0.1):
                pass  # its successor gets a chance before the next


class Watchdog(threading.Thread):
    """Ends the process with a verdict when nothing has happened for too long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self.beat = time.monotonic()
        self.over = threading.Event()

    def run(self) -> None:
        """Until the soak is over."""
        while time.monotonic() - self.beat < self._seconds:
            if self.over.wait(1):
                return
        print(json.dumps({"verdict": "failed", "hung": f"no step in {self._seconds:.0f} s"}), flush=True)
        os._exit(1)


def worker_pids(env: GsVecEnv) -> list[int]:
    """Process ids of the physics workers."""
    return [worker.process.pid for worker in env._physics._workers]


@dataclass
class Record:
    """What goes from run to run."""

    steps: int = 0
    episodes: int = 0
    pictures: int = 0
    lost: int = 0
    kills: int = 0
    losable: int = 0
    """Episodes that the kills may have cost: those of one worker each."""
    leaks: int = 0
    next_seed: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    def verdict(self, steps: int) -> str:
        """``passed`` after so many ``steps``, ``unfinished`` before; ``failed`` as soon as a check did."""
        if self.faults or self.leaks or self.lost > self.losable:
            return "failed"
        return "passed" if self.steps >= steps else "unfinished"


def soak(env: GsVecEnv, inspector: Inspector, record: Record, options: argparse.Namespace) -> None:
    """Play random episodes until the steps or the minutes are done; ``record`` is kept up to date."""
    killer, watchdog = Killer(env, options.kill_every or 1.0), Watchdog(options.hang)
    watchdog.start()
    if options.kill_every:
        killer.start()
    try:
        _play_all(env, inspector, record, options, killer, watchdog)
    finally:
        killer.over.set()
        watchdog.over.set()  # it would end whatever this process does next


def _play_all(
    env: GsVecEnv,
    inspector: Inspector,
    record: Record,
    options: argparse.Namespace,
    killer: Killer,
    watchdog: Watchdog,
) -> None:
    memory: list[tuple[float, float, float]] = []
    generator = torch.Generator().manual_seed(record.next_seed)
    before, start = Record(**asdict(record)), time.monotonic()
    reported = start
    while record.steps < options.steps and time.monotonic() - start < 60 * options.minutes:
        play(env, record, watchdog, generator)
        record.kills = before.kills + killer.kills
        record.losable = before.losable + killer.kills * -(-env.num_envs // len(worker_pids(env)))
        record.pictures = before.pictures + inspector.pictures
        record.faults = dict(Counter(before.faults) + inspector.faults)
        memory.append((resident(os.getpid()), max(resident(pid) for pid in worker_pids(env)), on_device()))
        if time.monotonic() - reported >= options.report_every:
            reported = time.monotonic()
            rate = (record.steps - before.steps) / (reported - start)
            now = {"env_steps_per_s": round(rate, 1), "parent_mib": memory[-1][0], "worker_mib": memory[-1][1]}
            now["device_mib"] = memory[-1][2]
            print(json.dumps(asdict(record) | now), flush=True)
            save(record, options.state)
    record.leaks = before.leaks + sum(leaks(list(history)) for history in zip(*memory, strict=True))


def play(env: GsVecEnv, record: Record, watchdog: Watchdog, generator: torch.Generator) -> None:
    """One random episode of every environment."""
    env.reset(range(record.next_seed, record.next_seed + env.num_envs))
    record.next_seed += env.num_envs
    record.episodes += env.num_envs
    high = torch.tensor(RANDOM_LIMITS)
    while True:
        watchdog.beat = time.monotonic()
        step = env.step_chunk(high * (2 * torch.rand(env.num_envs, 5, 7, generator=generator) - 1))
        record.steps += int(step.executed.sum())
        if (step.terminated | step.truncated).all():
            record.lost += int(step.lost.sum())
            return


def save(record: Record, path: Path | None) -> None:
    """Write ``record`` so that a run killed meanwhile leaves the old or the new one."""
    if path is not None:
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(asdict(record)))
        temporary.replace(path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps, over all runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this run")
    parser.add_argument("--state", type=Path, help="file that carries the record from run to run")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--sim-hz", type=int, default=500)
    parser.add_argument("--downscale", type=int, default=10, help="of 640 x 480")
    parser.add_argument("--rasterizer", default="auto")
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds between kills, mean; 0: none")
    parser.add_argument("--report-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--hang", type=float, default=300.0, help="seconds without a step that count as hanging")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the soak; 0 unless a check failed."""
    options = parse(arguments)
    sim = SimConfig(
        num_envs=options.environments,
        workers=options.workers,
        sim_hz=options.sim_hz,
        render_downscale=options.downscale,
        cameras=(CameraConfig(),),
    )
    saved = options.state is not None and options.state.exists()
    record = Record(**json.loads(options.state.read_text())) if saved else Record()
    inspector = Inspector(make_rasterizer(options.rasterizer))
    with make_env(sim, synthetic_scene(load_task(sim.task)).to(default_device()), inspector) as env:
        soak(env, inspector, record, options)
        save(record, options.state)
    verdict = record.verdict(options.steps)
    print(json.dumps({"verdict": verdict} | asdict(record)), flush=True)
    return int(verdict == "failed")


if __name__ == "__main__":
    sys.exit(main())
