"""The command line from outside: exit codes, one line, no traceback, quick help."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

MAIN = "import sys; sys.argv[0] = 'real2sim2real'; from flows.cli import main; main()"


@pytest.fixture
def cli(home):
    def call(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-c", MAIN, *map(str, arguments)],
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "GSRL_HOME": str(home), "COLUMNS": "120", **environment},
        )  # fmt: skip

    return call


COMMANDS = (
    "run", "scene", "demos", "sft", "finetune", "evaluate", "package", "verify", "serve", "deploy", "view", "up",
    "doctor", "bench",
)  # fmt: skip


def test_help_lists_every_command_and_is_quick(cli):
    seconds = []
    for _ in range(3):  # the best of three: other work runs on this machine
        start = time.perf_counter()
        done = cli("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert min(seconds) < 1.0
    assert cli().stdout == done.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys, flows.cli; "
        "print([m for m in ('torch', 'prefect', 'mlflow', 'numpy', 'huggingface_hub', 'cv2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(cli, command):
    done = cli(command, "--help")
    assert done.returncode == 0
    assert command == "doctor" or f"real2sim2real {command}" in done.stdout


def wrong_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    return {
        "command": (["nope"], "No such command"),
        "preset": (["run", "--preset", "huge"], "unknown preset 'huge'"),
        "key": (["run", "--set", "ppo.learning_rat=1"], "did you mean ppo.learning_rate"),
        "value": (["run", "--set", "ppo.iterations=-1"], "ppo.iterations"),
        "type": (["run", "--set", "ppo.iterations=many"], "ppo.iterations"),
        "assignment": (["run", "--set", "ppo.iterations"], "expected key=value"),
        "relation": (["run", "--set", "sim.sim_hz=101"], "multiple of control_hz"),
        "missing option": (["scene"], "--photos"),
        "no photos": (["scene", "--photos", tmp_path / "nope", "--out", tmp_path / "o"], "there is no capture"),
        "empty folder": (["scene", "--photos", tmp_path / "empty", "--out", tmp_path / "o"], "is empty"),
        "no package": (["verify", "--bundle", tmp_path / "empty"], "MANIFEST.sha256"),
        "no scene": (["view", tmp_path / "empty"], "neither a scene folder"),
        "occupied output": (["package", "--out", tmp_path / "full"], "not an empty folder"),
    }


CASES = (
    "command", "preset", "key", "value", "type", "assignment", "relation", "missing option", "no photos",
    "empty folder", "no package", "no scene", "occupied output",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line_and_exit_1(cli, tmp_path, case):
    arguments, message = wrong_inputs(tmp_path)[case]
    done = cli(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("real2sim2real: ")]) == 1


def test_debug_anywhere_adds_the_traceback(cli):
    for arguments in (["--debug", "run", "--preset", "huge"], ["run", "--preset", "huge", "--debug"]):
        done = cli(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_an_unusable_store_is_said_before_anything_starts(cli, tmp_path):
    (tmp_path / "file").touch()
    done = cli("run", GSRL_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert "set GSRL_HOME" in done.stderr


def test_a_dead_prefect_server_is_named(cli):
    done = cli("run", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 1
    assert "PREFECT_API_URL=http://127.0.0.1:9/api does not answer" in done.stderr


def test_up_says_which_port_is_taken(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("up", "--prefect-port", port)
    assert done.returncode == 1
    assert f"port {port}" in done.stderr
    assert "--prefect-port" in done.stderr


def test_doctor_as_json(cli):
    import json

    done = cli("doctor", "--json")
    assert done.returncode == 0
    assert {"name", "ok", "found", "disables", "remedy"} == set(json.loads(done.stdout)[0])
