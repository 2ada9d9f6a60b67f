"""The update benchmark measures what it says, on the tiny model."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import policy as benchmark


@pytest.fixture(scope="module")
def policy():
    return benchmark.random_policy()


def measured(capsys, policy, **changes):
    """The JSON line of a small update."""
    start = {name: tensor.clone() for name, tensor in policy.state_dict_trainable().items()}
    run = benchmark.Update(**({"place": "device", "samples": benchmark.UNIT, "epochs": 1} | changes))
    assert benchmark.update(policy, "toy", run, start) > 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(benchmark.CUDA, reason="would take the full-size model")
def test_the_kl_of_every_step_is_told(capsys, policy):
    moving = measured(capsys, policy)
    assert moving["optimizer_steps"] == len(moving["kl_by_step"]) == 3
    assert abs(moving["kl_by_step"][0]) < 1e-6 < abs(moving["kl_by_step"][-1])
    still = measured(capsys, policy, learning_rate=0.0, recompute_log_prob="off")
    assert max(abs(kl) for kl in still["kl_by_step"]) < 1e-5


def test_the_table_has_aligned_columns(capsys):
    table = benchmark.Table()
    table.add("speed", "1", "22")
    table.add("a longer name", "333", "4")
    table.show()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert {lines[1].index("1"), lines[2].index("333")} == {lines[0].index("asked")}
