import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from gsrl_core.errors import SimulationError, WorkerError
from gsrl_core.sim import states as layout
from gsrl_core.sim import task
from gsrl_core.sim.episodes import Episodes
from gsrl_core.sim.pool import MAX_RESTARTS, Pool
from gsrl_core.sim.settings import WorldSettings
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


def everything(pool):
    """Copies of all arrays that describe environments."""
    names = [field.name for field in fields(pool.states) if field.name not in ("actions", "busy")]
    return {name: getattr(pool.states, name).copy() for name in names}


def three_chunks(settings, disturb=lambda pool, number: None, length=3):
    """Three chunks of three environments in two workers (0 and 2, 1), then a reset and one more; copies of the states.

    ``disturb`` is called before each chunk with its number; ``length``: actions of a chunk.
    """
    pool, history = Pool(settings, 3, length, 2), []
    actions = np.stack([chunk(3 * length, seed) for seed in SEEDS])
    try:
        active = np.ones(3, dtype=bool)
        for number, start in enumerate((0, length, 2 * length, 0)):
            if start == 0:
                pool.reset(specs(SEEDS))
            disturb(pool, number)
            pool.step(actions[:, start : start + length], active & (pool.states.lost == 0))
            history.append(everything(pool))
        return history, [worker.process.pid for worker in pool._workers]
    finally:
        pool.close()


HELD = """
import sys, time
from pathlib import Path
if "gsrl_core.sim.worker" in sys.orig_argv:
    from gsrl_core.sim.episodes import Episodes
    run = Episodes._run_chunk
    def held(self, env, *rest):
        run(self, env, *rest)
        if Path(__file__).with_name(f"hold-{env}").exists():
            Path(__file__).with_name("held").touch()
            time.sleep(60)
    Episodes._run_chunk = held
"""


@pytest.fixture
def killer(monkeypatch, tmp_path):
    """Makes a disturbance that kills a worker: while it steps an environment, whose results it has written, or before.

    A worker could not be hit while it steps by watching it: a chunk takes a few milliseconds. It is made to wait there.
    """
    (tmp_path / "sitecustomize.py").write_text(HELD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(at, env, ending=signal.SIGKILL, while_stepping=True):
        def disturb(pool, number):
            if number != at:
                return
            process = pool._workers[env % 2].process
            if not while_stepping:
                process.send_signal(ending)
                return
            (tmp_path / f"hold-{env}").touch()
            threading.Thread(target=kill_when_held, args=(process,)).start()

        def kill_when_held(process):
            deadline = time.monotonic() + 50
            while not (tmp_path / "held").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            (tmp_path / f"hold-{env}").unlink()
            process.send_signal(ending)

        return disturb

    return make


@pytest.mark.parametrize("while_stepping", [True, False])
def test_a_killed_worker_costs_the_current_episodes_of_its_environments_only(quick, caplog, killer, while_stepping):
    calm, _ = three_chunks(quick)
    with caplog.at_level(logging.WARNING):
        hit, pids = three_chunks(quick, killer(1, 2, while_stepping=while_stepping))
    assert [state["lost"].tolist() for state in hit] == [[0, 0, 0], [1, 0, 1], [1, 0, 1], [0, 0, 0]]
    for name in calm[0]:
        # Environment 1 is in the other worker; after the next reset nothing tells that anything happened.
        assert all((after[name][1] == before[name][1]).all() for after, before in zip(hit, calm, strict=True)), name
        assert (hit[0][name] == calm[0][name]).all(), name
        assert (hit[3][name] == calm[3][name]).all(), name
        if name not in ("lost", "executed"):  # the others stay as they were before the chunk that was interrupted
            assert (hit[2][name][[0, 2]] == calm[0][name][[0, 2]]).all(), name
    assert hit[1]["executed"].tolist() == [0, 3, 0]
    assert "killed by signal 9" in caplog.text
    assert ("was stepping environment 2" if while_stepping else "was not stepping") in caplog.text
    for env in (0, 2):
        assert f"environment {env}: EpisodeSpec(seed={SEEDS[env]}, pose_range_scale=1.0, friction_" in caplog.text
    assert f"environment 1: EpisodeSpec(seed={SEEDS[1]}" not in caplog.text
    assert not any(alive(pid) for pid in pids)


MORTAL = """
import faulthandler, signal, sys
from pathlib import Path
if "gsrl_core.sim.worker" in sys.orig_argv:
    from gsrl_core.sim.episodes import Episodes
    run = Episodes._run_chunk
    def mortal(self, env, *rest):
        marker = Path(__file__).with_name(f"die-{env}")
        if marker.exists():
            marker.unlink()
            faulthandler.register(signal.SIGVTALRM, chain=True)  # tells where it is, then dies of the signal
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.04)
        run(self, env, *rest)
    Episodes._run_chunk = mortal
"""


def test_a_worker_killed_inside_physx_costs_the_current_episodes_of_its_environments_only(
    urdf, caplog, monkeypatch, tmp_path
):
    # 500 Hz as in production, and 500 steps of PhysX for each action: a chunk takes an environment 0.2 s. The kernel
    # kills after a part of it, in processor time of the worker, so that other work on the machine does not matter.
    settings = WorldSettings(urdf, sim_hz=500, control_hz=1)
    (tmp_path / "sitecustomize.py").write_text(MORTAL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def disturb(pool, number):
        if number == 1:
            (tmp_path / "die-2").touch()

    calm, _ = three_chunks(settings, length=10)
    with caplog.at_level(logging.WARNING):
        hit, _ = three_chunks(settings, disturb, length=10)
    assert not (tmp_path / "die-2").exists()
    assert f"killed by signal {signal.SIGVTALRM.value}" in caplog.text
    assert "was stepping environment 2" in caplog.text
    innermost = re.search(r'Current thread .*\n  File "(.*)", line \d+ in (\w+)\n', caplog.text)
    assert (Path(innermost[1]).name, innermost[2]) == ("world.py", "step")
    assert [state["lost"].tolist() for state in hit] == [[0, 0, 0], [1, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert [state["executed"].tolist() for state in hit] == [[10, 10, 10], [0, 10, 0], [0, 10, 0], [10, 10, 10]]
    for name in calm[0]:
        assert all((after[name][1] == before[name][1]).all() for after, before in zip(hit, calm, strict=True)), name
        assert (hit[3][name] == calm[3][name]).all(), name
        if name not in ("lost", "executed"):  # the chunk of environment 0 was complete, that of 2 was not
            assert (hit[1][name][[0, 2]] == calm[0][name][[0, 2]]).all(), name


def test_a_worker_that_hangs_is_killed_and_costs_its_episodes_only(quick, monkeypatch, caplog):
    monkeypatch.setattr("gsrl_core.sim.process.ANSWER_SECONDS", 2.0)
    pool = Pool(quick, 2, 5, 2)
    pool.reset(specs((1, 2)))
    os.kill(pool._workers[0].process.pid, signal.SIGSTOP)
    pool.step(np.stack([chunk(5, 1), chunk(5, 2)]), np.ones(2, dtype=bool))
    assert pool.states.lost.tolist() == [1, 0] and pool.states.executed.tolist() == [0, 5]
    assert "had not answered for 2 s" in caplog.text
    pool.reset(specs((1, 2)))
    assert not pool.states.lost.any()
    pool.close()


def test_a_crash_in_native_code_leaves_last_words(quick, caplog, killer):
    with caplog.at_level(logging.WARNING):
        three_chunks(quick, killer(0, 0, signal.SIGSEGV))
    assert "killed by signal 11" in caplog.text
    assert "Fatal Python error: Segmentation fault" in caplog.text


def test_an_environment_that_was_finished_keeps_its_result_when_its_worker_dies(quick):
    pool = Pool(quick, 2, 5, 1)
    pool.reset(specs((1, 2)))
    pool.states.success[0] = 1
    pool._workers[0].process.kill()
    pool.step(np.zeros((2, 1, 7), np.float32), np.array([False, True]))
    assert pool.states.lost.tolist() == [0, 1]
    assert pool.states.success.tolist() == [1, 0]
    pool.close()


def test_a_worker_that_died_between_episodes_costs_nothing(quick):
    pool = Pool(quick, 2, 5, 2)
    pool._workers[1].process.kill()
    pool.reset(specs((1, 2)))
    pool.step(np.zeros((2, 2, 7), np.float32), np.ones(2, dtype=bool))
    assert pool.states.lost.tolist() == [0, 0]
    assert pool.states.executed.tolist() == [2, 2]
    pool.close()


def test_physics_that_diverges_costs_that_episode_only(quick, monkeypatch, caplog):
    pool = Pool(quick, 2, 5, 1)
    pool.reset(specs((1, 2)))
    worker, before = pool._workers[0], everything(pool)
    zero, active = np.zeros((2, 2, 7), np.float32), np.ones(2, dtype=bool)
    receive = worker.receive
    monkeypatch.setattr(worker, "receive", lambda: receive() | {0: "the physics diverged"})
    with caplog.at_level(logging.WARNING):
        pool.step(zero, active)
    monkeypatch.undo()
    assert pool.states.lost.tolist() == [1, 0]
    assert (pool.states.qpos[0] == before["qpos"][0]).all()
    assert pool.states.executed.tolist() == [0, 2]
    assert "the physics diverged\nlost until the next reset: environment 0: EpisodeSpec(seed=1," in caplog.text
    assert "environment 1" not in caplog.text
    pool.step(zero, active)  # without its episode the environment is not stepped, also when asked to
    assert pool.states.executed.tolist() == [0, 2]
    pool.reset(specs((1, 2)))
    assert pool._workers == [worker]
    assert not pool.states.lost.any()
    pool.close()


def test_a_worker_goes_on_after_an_environment_diverged(quick, monkeypatch):
    states = layout.view(bytearray(layout.size_in_bytes(2, 5, 2)), 2, 5, 2)
    episodes = Episodes(quick, states)
    episodes.reset({0: task.EpisodeSpec(1), 1: task.EpisodeSpec(2)})
    with monkeypatch.context() as patch:
        patch.setattr(episodes._worlds[0], "qpos", lambda: np.full(9, np.nan, np.float32))
        patch.setattr(episodes._worlds[0], "_joint_targets", lambda action: np.array(task.fr3.START_QPOS))
        diverged = episodes.step([0, 1], 2)
    assert list(diverged) == [0]
    assert "diverged" in diverged[0]
    assert states.executed.tolist() == [0, 2]
    assert not states.busy.any()
    episodes.reset({0: task.EpisodeSpec(1)})
    assert episodes.step([0], 2) == {}


@pytest.fixture
def broken_interpreter(monkeypatch, tmp_path):
    """Calling it makes every process that is started from then on die with last words."""

    def breaks():
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\necho out of luck >&2\nexit 3\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return tmp_path / "pids"

    return breaks


def test_a_worker_that_dies_on_every_start_ends_in_a_clear_error(quick, broken_interpreter):
    pids = broken_interpreter()
    with pytest.raises(WorkerError, match=r"(?s)worker 0 .* exit code 3; .*out of luck\nit was started 4 times"):
        Pool(quick, 1, 5, 1)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 1 + MAX_RESTARTS
    assert not any(alive(pid) for pid in started)


def test_a_process_that_the_system_refuses_is_a_worker_error(quick, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerError, match=r"worker 0 cannot be started: .*/nowhere/python"):
        Pool(quick, 1, 5, 1)


def test_a_worker_that_cannot_be_restarted_ends_the_pool_and_leaves_no_process(quick, broken_interpreter):
    pool = Pool(quick, 2, 5, 2)
    pool.reset(specs((1, 2)))
    pids = [worker.process.pid for worker in pool._workers]
    broken_interpreter()
    os.kill(pids[1], signal.SIGKILL)
    pool.step(np.zeros((2, 1, 7), np.float32), np.ones(2, dtype=bool))
    assert pool.states.lost.tolist() == [0, 1]
    with pytest.raises(WorkerError, match="out of luck"):
        pool.reset(specs((1, 2)))
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(SimulationError, match="closed"):
        pool.reset(specs((1, 2)))


def test_a_worker_that_never_gets_a_chunk_done_is_given_up_and_one_that_does_is_not(quick, monkeypatch):
    monkeypatch.setattr("gsrl_core.sim.pool.MAX_RESTARTS", 1)
    pool = Pool(quick, 2, 5, 1)
    zero, active = np.zeros((2, 1, 7), np.float32), np.ones(2, dtype=bool)

    def die():
        pool.reset(specs((1, 2)))
        pool._workers[0].process.kill()
        pool.step(zero, active)

    for _ in range(2):  # there is progress in between
        die()
        pool.reset(specs((1, 2)))
        pool.step(zero, active)
    die()
    with pytest.raises(WorkerError, match="without executing one chunk"):
        die()


def test_a_worker_that_cannot_build_its_world_says_why(quick, tmp_path):
    with pytest.raises(SimulationError, match=r"missing\.urdf"):
        pool = Pool(replace(quick, urdf=tmp_path / "missing.urdf"), 1, 5, 1)
        pool.reset(specs((1,)))


def test_an_error_inside_a_worker_keeps_its_class_and_message(quick):
    pool = Pool(quick, 1, 5, 1)
    pool.reset(specs((1,)))
    with pytest.raises(SimulationError, match="not finite"):
        pool.step(np.full((1, 1, 7), np.nan, np.float32), np.ones(1, dtype=bool))


def test_closing_stops_processes_and_leaves_no_shared_memory(quick):
    before = named_memory(os.getpid())
    pool = Pool(quick, 2, 5, 2)
    pids = [worker.process.pid for worker in pool._workers]
    # Nothing with a name, which would outlive a crash of all.
    assert named_memory(os.getpid(), *pids) == before
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
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_workers_give_way_to_their_parent(quick):
    pool = Pool(quick, 1, 1, 1)
    (worker,) = pool._workers
    parent = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) == min(parent + 5, 19)
    assert os.sched_getscheduler(worker.process.pid) == os.SCHED_BATCH
    pool.close()


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


def named_memory(*pids):
    """What these processes have mapped of shared memory with names; other programs have some too."""
    maps = [line.split(maxsplit=5) for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {row[5] for row in maps if len(row) == 6 and row[5].startswith("/dev/shm/")}


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
