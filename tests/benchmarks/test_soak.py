"""The soak's checks find planted faults, and its loop goes on where it was."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gsrl_core.interfaces import Frames

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import soak  # noqa: E402


def frames(count=4):
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 255, (count, 6, 8, 3), dtype=torch.uint8, generator=generator)
    return Frames(rgb, torch.rand(count, 6, 8), torch.rand(count, 6, 8))


def test_sound_pictures_have_no_fault():
    assert soak.faults(frames()) == {}


def test_each_planted_fault_is_named_and_counted():
    broken = frames()
    broken.rgb[0] = 0
    broken.rgb[1:3] = torch.tensor([200, 0, 7], dtype=torch.uint8)
    broken.depth[3, 2, 2] = float("nan")
    broken.alpha[2:, 0, 0] = float("inf")
    assert soak.faults(broken) == {"black": 1, "constant": 2, "depth not finite": 1, "alpha not finite": 2}


def test_growth_is_a_leak_and_a_plateau_is_not():
    assert soak.leaks([100.0 + i for i in range(100)])
    assert not soak.leaks([100.0 + min(i, 20) for i in range(100)])
    assert not soak.leaks([100.0 + i for i in range(3)])


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (soak.Record(steps=9), "unfinished"),
        (soak.Record(steps=10), "passed"),
        (soak.Record(steps=10, lost=2, kills=1, losable=2), "passed"),
        (soak.Record(steps=10, lost=3, kills=1, losable=2), "failed"),
        (soak.Record(steps=10, leaks=1), "failed"),
        (soak.Record(steps=1, faults={"black": 1}), "failed"),
    ],
)
def test_the_verdict_follows_from_the_record(record, verdict):
    assert record.verdict(10) == verdict


def test_a_soak_is_made_in_pieces(tmp_path, monkeypatch, capsys, home):
    monkeypatch.setattr("gsrl_core.bench._STATIC_GAUSSIANS", 500)
    state = tmp_path / "soak.json"
    common = ["--environments", "2", "--workers", "1", "--sim-hz", "100", "--downscale", "16", "--state", str(state)]
    assert soak.main([*common, "--steps", "150"]) == 0
    assert soak.main([*common, "--steps", "350", "--report-every", "0"]) == 0
    first, *_, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["verdict"] == second["verdict"] == "passed"
    assert (first["steps"], second["steps"]) == (200, 400)
    assert second["next_seed"] == 4
    # The first picture of an episode, and one after each chunk of five steps.
    assert second["pictures"] == 2 * first["pictures"] == 4 * (1 + 20)
    assert json.loads(state.read_text())["steps"] == 400
    for thread in threading.enumerate():  # a watchdog that outlived its soak would end the tests
        if isinstance(thread, soak.Watchdog):
            thread.join(5)
            assert not thread.is_alive()


def test_the_killer_kills_a_worker_and_waits_for_its_successor():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    env = SimpleNamespace(_physics=SimpleNamespace(_workers=[SimpleNamespace(process=process)]))
    killer = soak.Killer(env, 0.01)
    killer.start()
    assert process.wait(10) == -signal.SIGKILL
    time.sleep(0.3)
    assert killer.kills == 1
    assert killer.is_alive()
    killer.over.set()
    killer.join(5)
    assert not killer.is_alive()


def test_the_watchdog_ends_a_run_that_hangs():
    script = (
        f"import sys, time; sys.path.insert(0, {BENCHMARKS!r}); import soak; soak.Watchdog(1).start(); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1
    assert "hung" in json.loads(ended.stdout)
