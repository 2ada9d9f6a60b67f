"""Control steps per second of the CPU physics pool, one JSON line for each size.

    PYTHONPATH=. python benchmarks/physics.py [--sizes 64x0x1 64x0x2] [--sim-hz 500] [--control-hz 10] [--seconds 5]

A size is ENVIRONMENTSxWORKERSxSTAGES, over all pipeline stages, each of which is a pool; 0 workers: the default of a
pool, two for each core. ``real2sim2real bench physics`` measures one size by the same code; this script needs no
configuration, only numpy, torch, sapien and pin (not ManiSkill). The first line is one environment in one process: the
cost of a step without waiting for others.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from gsrl_core.sim import fr3, task
from gsrl_core.sim.pool import Pool, worker_count
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.throughput import motions


def measure(
    settings: WorldSettings, num_envs: int, workers: int, stages: int, chunk: int, seconds: float
) -> dict[str, Any]:
    """Figures of one size."""
    figures: dict[str, Any] = {"environments": num_envs, "stages": stages, "chunk": chunk}
    with ExitStack() as pools:
        each = num_envs // stages, chunk, workers // stages
        groups = [pools.enter_context(closing(Pool(settings, *each))) for _ in range(stages)]
        figures["workers"] = stages * worker_count(workers // stages, num_envs // stages)
        for name, rate in motions(groups, settings.load_task(), chunk, task.MAX_EPISODE_STEPS, seconds):
            figures[f"env_steps_per_s_{name}"] = round(rate, 1)
    return figures


def main() -> None:
    """Print one line for each size that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1x1x1", "64x0x1", "64x0x2", "256x0x2"])
    parser.add_argument("--sim-hz", type=int, default=task.SIM_HZ)
    parser.add_argument("--control-hz", type=int, default=task.CONTROL_HZ)
    parser.add_argument("--solver-iterations", type=int, default=task.SOLVER_POSITION_ITERATIONS)
    parser.add_argument("--chunk", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each motion at each size")
    parser.add_argument("--urdf", type=Path, help="the FR3 to prepare; by default that of the franky-sim wheel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        urdf = fr3.prepare_urdf(Path(cache), options.urdf)
        settings = WorldSettings(urdf, options.sim_hz, options.control_hz, solver_iterations=options.solver_iterations)
        common = {"sim_hz": settings.sim_hz, "control_hz": settings.control_hz}
        common |= {"solver_iterations": settings.solver_iterations, "cores": len(os.sched_getaffinity(0))}
        for size in options.sizes:
            numbers = [int(number) for number in size.split("x")]
            if numbers[0] % numbers[2] or numbers[1] % numbers[2]:
                parser.error(f"--sizes {size}: environments and workers must be multiples of the stages")
            print(json.dumps(measure(settings, *numbers, options.chunk, options.seconds) | common), flush=True)


if __name__ == "__main__":
    main()
