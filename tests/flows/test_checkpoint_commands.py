"""Checkpoints in and out through the commands."""

import json
from pathlib import Path

from safetensors.torch import load_file
from typer.testing import CliRunner

from flows.cli import app

TINY = Path(__file__).parents[2] / "gsrl_core" / "bundled" / "pi05_tiny"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_checkpoint_comes_in(tmp_path):
    done = call("checkpoint", "import", "--from", TINY, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["horizon"] == 5
    first, second = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "out"))
    assert all(first[name].equal(second[name]) for name in first | second)


def test_nothing_goes_out_over_something_else(tmp_path):
    done = call("checkpoint", "export", "--policy", TINY, "--out", tmp_path)
    assert done.exit_code == 1
    assert "exists; a checkpoint is written to a new folder" in str(done.exception)
