import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from gsrl_core.errors import SimulationError, WorkerError
from gsrl_core.sim import task
from gsrl_core.sim.pool import Pool
from gsrl_core.sim.world import World

SEEDS = (11, 12, 13)


def chunk(steps, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-0.04, 0.04, (steps, 6)), rng.uniform(-1, 1, (steps, 1))], 1).astype(np.float32)


def specs(seeds):
    return [task.EpisodeSpec(seed) for seed in seeds]


def play(settings, seeds, workers, horizon):
    """Ten steps of each seed in chunks of ``horizon``; the action of step t depends on the seed only."""
    pool = Pool(settings, len(seeds), 10, workers)
    try:
        pool.reset(specs(seeds))
        actions = np.stack([chunk(10, seed) for seed in seeds])
        for start in range(0, 10, horizon):
            pool.step(actions[:, start : start + horizon], np.ones(len(seeds), dtype=bool))
        states = pool.states
        return {seed: (states.body_to_world[i].copy(), states.qpos[i].copy()) for i, seed in enumerate(seeds)}
    finally:
        pool.close()


def test_states_are_the_same_bits_for_any_number_of_workers_batch_and_chunk(quick):
    one = play(quick, SEEDS, workers=1, horizon=10)
    two = play(quick, (13, 99, 11, 12), workers=2, horizon=5)
    for seed in SEEDS:
        world = World(quick)
        world.reset(task.EpisodeSpec(seed))
        for action in chunk(10, seed):
            world.step(action)
        for bodies, qpos in (one[seed], two[seed]):
            assert (bodies == world.body_poses()).all()
            assert (qpos == world.qpos()).all()


def test_inactive_environments_are_left_alone(quick):
    pool = Pool(quick, 2, 5, 1)
    pool.reset(specs((1, 2)))
    before = pool.states.qpos.copy()
    pool.step(np.full((2, 5, 7), 0.02, np.float32), np.array([False, True]))
    assert (pool.states.qpos[0] == before[0]).all()
    assert (pool.states.qpos[1] != before[1]).any()
    assert pool.states.executed.tolist() == [0, 5]
    assert pool.states.elapsed.tolist() == [0, 5]
    pool.close()


def test_a_killed_worker_is_reported_with_its_signal_and_ends_the_pool(quick):
    pool = Pool(quick, 2, 5, 2)
    pool.reset(specs((1, 2)))
    pids = [worker.process.pid for worker in pool._workers]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 1 .* killed by signal 9"):
        pool.step(np.zeros((2, 1, 7), np.float32), np.ones(2, dtype=bool))
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(SimulationError, match="closed"):
        pool.reset(specs((1, 2)))


def test_a_worker_that_cannot_build_its_world_says_why(quick, tmp_path):
    from dataclasses import replace

    with pytest.raises(SimulationError, match=r"missing\.urdf"):
        pool = Pool(replace(quick, urdf=tmp_path / "missing.urdf"), 1, 5, 1)
        pool.reset(specs((1,)))


def test_an_error_inside_a_worker_keeps_its_class_and_message(quick):
    pool = Pool(quick, 1, 5, 1)
    pool.reset(specs((1,)))
    with pytest.raises(SimulationError, match="not finite"):
        pool.step(np.full((1, 1, 7), np.nan, np.float32), np.ones(1, dtype=bool))


def test_closing_stops_processes_and_leaves_no_shared_memory(quick):
    before = set(Path("/dev/shm").iterdir())
    pool = Pool(quick, 2, 5, 2)
    pids = [worker.process.pid for worker in pool._workers]
    assert set(Path("/dev/shm").iterdir()) == before
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(urdf, ending):
    script = textwrap.dedent(
        f"""
        import time, pathlib
        from gsrl_core.sim.pool import Pool
        from gsrl_core.sim.settings import WorldSettings
        pool = Pool(WorldSettings(pathlib.Path({str(urdf)!r}), sim_hz=100), 2, 5, 2)
        print(*[worker.process.pid for worker in pool._workers], flush=True)
        time.sleep(60)
        """
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.send_signal(ending)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_more_workers_than_environments_are_not_started(quick):
    pool = Pool(quick, 1, 5, 4)
    assert len(pool._workers) == 1
    with pytest.raises(SimulationError, match="2 episodes for 1"):
        pool.reset(specs((1, 2)))
    pool.close()


def test_a_worker_imports_neither_torch_nor_maniskill():
    script = "import sys, gsrl_core.sim.episodes; print('torch' in sys.modules, 'mani_skill' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert answer.stdout.split() == ["False", "False"]


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
