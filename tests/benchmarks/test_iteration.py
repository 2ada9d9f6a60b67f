"""A toy-sized iteration goes through the workers, and its table accounts for the time."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import iteration

TOY = argparse.Namespace(
    environments=2, stages=2, rollout_epochs=2, control_steps=10, update_epochs=2, global_batch=4, micro_batch=4,
    workers=1, splats=500, downscale=8,
)  # fmt: skip


def test_a_toy_iteration_accounts_for_its_time(capsys):
    found = iteration.measure(TOY)
    assert found["samples"] == 2 * 2 * 2  # environments x batches x chunks
    assert found["env_steps"] == 2 * 2 * 10
    assert found["optimizer_steps"] == 2 * 2
    assert found["log_prob_mismatch_max"] < 1e-3
    seconds = found["seconds"]
    whole = seconds["collect"] + seconds["update"] + seconds["sync and the rest"]
    assert seconds["whole iteration"] == pytest.approx(whole, abs=0.01)
    assert all(seconds[part] > 0 for part in ("policy", "physics", "physics reset", "render"))
    assert seconds["policy"] < seconds["collect"]
    assert "whole iteration" in capsys.readouterr().out


def test_the_table_has_shares_of_the_first_row():
    text = iteration.table({"whole": 4.0, "  part": 1.0})
    assert [line.split()[-2] for line in text.splitlines()] == ["100.0", "25.0"]
