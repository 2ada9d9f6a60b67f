"""LeRobot out and in, and statistics, through the commands."""

import json

import numpy as np
from typer.testing import CliRunner

from flows.cli import app
from gsrl_core.policy.demonstrations import Episode, load_demonstrations, write_shard


def call(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout.splitlines()


def test_demonstrations_go_out_and_come_back_and_are_counted(tmp_path):
    demos, dataset, back, stats = (tmp_path / name for name in ("demos", "dataset", "back", "norm_stats.json"))
    pictures = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    action = np.tile(np.array([0.01, 0, 0, 0, 0, 0, 1], np.float32), (4, 1))
    write_shard(demos, 3, [Episode(3, "go", {"camera": pictures}, np.ones((4, 9)), action)])
    (demos / "demos.json").write_text(json.dumps({"control_hz": 10.0}))
    assert call("dataset", "export", "--demos", demos, "--out", dataset)[-1] == f"{dataset}: 1 episodes"
    facts = json.loads(call("dataset", "import", "--from", dataset, "--out", back, "--camera", "camera")[-1])
    assert (facts["episodes"], facts["cameras"]) == (1, "base_0_rgb")
    np.testing.assert_array_equal(load_demonstrations(back).frames("base_0_rgb", slice(0, 4)), pictures)
    lines = call("norm-stats", "--demos", back, "--out", stats)
    assert lines[0].split() == ["mean", "std", "q01", "q99"]
    assert lines[10].split() == ["actions[0]", "0.0100", "0.0000", "0.0100", "0.0100"]
    assert lines[-1] == str(stats)
    assert json.loads(stats.read_text())["norm_stats"]["state"]["mean"] == [1.0] * 9
