"""The command line from outside: exit codes, one line, no traceback, quick help."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import write_ply

MAIN = "import sys; sys.argv[0] = 'real2sim2real'; from flows.cli import main; main()"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One store for all: its data bases are made once, which takes longer than most of what is tested."""
    return tmp_path_factory.mktemp("cli") / "home"


@pytest.fixture
def cli(home):
    def call(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-c", MAIN, *map(str, arguments)],
            capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "GSRL_HOME": str(home), "COLUMNS": "120", **environment},
        )  # fmt: skip

    return call


COMMANDS = (
    "run", "scene", "assemble", "demos", "sft", "finetune", "evaluate", "package", "verify", "serve", "deploy", "view",
    "up", "doctor", "bench", "norm-stats", "dataset", "checkpoint",
)  # fmt: skip


def test_help_lists_every_command_and_is_quick(cli):
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = cli("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: other work may run on this machine.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert min(seconds) < 3.0
    assert cli().stdout == done.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys, flows.cli; "
        "print([m for m in ('torch', 'prefect', 'mlflow', 'numpy', 'huggingface_hub', 'cv2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"{kind} {way}" for kind in ("dataset", "checkpoint") for way in ("export", "import"))]
)
def test_every_command_teaches_by_example(cli, command):
    done = cli(*command.split(), "--help")
    assert done.returncode == 0
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith(f"real2sim2real {command}") for line in lines)  # "Usage: ..." does not


BUNDLED = Path(__file__).parents[2] / "gsrl_core" / "bundled"


def photos(folder, count):
    for photo in sorted((BUNDLED / "capture_tabletop").glob("*.jpg"))[:count]:
        shutil.copyfile(photo, folder / photo.name)
    return folder


def noise_pictures(folder):
    """Six pictures with plenty of texture that have nothing in common."""
    for seed in range(6):
        small = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return folder


def with_a_corrupt_photo(folder):
    photos(folder, 4)
    victim = sorted(folder.iterdir())[2]
    victim.write_bytes(victim.read_bytes()[:5000])
    return folder


def truncated_ply(folder):
    count = 100
    nothing = Gaussians(
        torch.zeros(count, 3), torch.ones(count, 4), torch.zeros(count, 3), torch.zeros(count), torch.zeros(count, 1, 3)
    )
    write_ply(folder / "scene.ply", nothing)
    (folder / "scene.ply").write_bytes((folder / "scene.ply").read_bytes()[:-500])
    return folder / "scene.ply"


def checkpoint_without_a_key(folder):
    shutil.copytree(BUNDLED / "pi05_tiny", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors")
    return folder


def full(folder):
    (folder / "x").touch()
    return folder


def scene_of(capture, out):
    return ["scene", "--photos", capture, "--out", out]


# Arguments, from an empty folder and one that does not exist, and what the one line says.
CASES = {
    "command": (lambda folder, out: ["nope"], "No such command 'nope'; see --help"),
    "preset": (lambda folder, out: ["run", "--preset", "huge"], "unknown preset 'huge'"),
    "key": (lambda folder, out: ["run", "--set", "ppo.learning_rat=1"], "did you mean ppo.learning_rate"),
    "value": (lambda folder, out: ["run", "--set", "ppo.iterations=-1"], "ppo.iterations"),
    "type": (lambda folder, out: ["run", "--set", "ppo.iterations=many"], "ppo.iterations"),
    "assignment": (lambda folder, out: ["run", "--set", "ppo.iterations"], "expected key=value"),
    "relation": (
        lambda folder, out: ["run", "--set", "sim.sim_hz=101"],
        "sim: sim_hz (101) must be a multiple of control_hz (10)",
    ),
    "missing option": (lambda folder, out: ["scene"], "--photos"),
    "no photos": (lambda folder, out: scene_of(folder / "nope", out), "there is no capture"),
    "empty folder": (scene_of, "is empty"),
    "one photo": (lambda folder, out: scene_of(photos(folder, 1), out), "1 photo;"),
    "no overlap": (lambda folder, out: scene_of(noise_pictures(folder), out), "they do not overlap enough"),
    "corrupt photo": (
        lambda folder, out: scene_of(with_a_corrupt_photo(folder), out),
        "bench_02.jpg: cannot be decoded",
    ),
    "truncated ply": (lambda folder, out: ["view", truncated_ply(folder)], "truncated: 100 Gaussians"),
    "missing key": (
        lambda folder, out: ["run", "--set", f"policy.checkpoint={checkpoint_without_a_key(folder)}"],
        "/given/model.safetensors does not fit the architecture. 1 missing: ",
    ),
    "unreachable hub": (
        lambda folder, out: ["run", "--set", "policy.checkpoint=RLinf/nothing-there"],
        "cannot fetch RLinf/nothing-there",
    ),
    "no dataset": (
        lambda folder, out: ["dataset", "import", "--from", folder, "--out", out],
        "is not a LeRobot dataset: it has no meta/info.json",
    ),
    "no statistics": (lambda folder, out: ["norm-stats", "--demos", folder, "--out", out], "no demonstrations in"),
    "statistics into a folder": (
        lambda folder, out: ["norm-stats", "--demos", folder, "--out", folder],
        "is a folder; name the file to write",
    ),
    "two starts": (
        lambda folder, out: ["sft", "--demos", folder, "--out", out, "--init", folder, "--model", "pi05_small"],
        "given brings its own size; give one",
    ),
    "no package": (lambda folder, out: ["verify", "--bundle", folder], "MANIFEST.sha256"),
    "no scene": (lambda folder, out: ["view", folder], "neither a scene folder"),
    "occupied output": (lambda folder, out: ["package", "--out", full(folder)], "not an empty folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line_and_exit_1(cli, tmp_path, case):
    arguments, message = CASES[case]
    (tmp_path / "given").mkdir()
    done = cli(*arguments(tmp_path / "given", tmp_path / "out"), HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stdout == ""
    # Nothing else but how far it had come.
    progress = re.compile(r" *[a-z-]+ +\d+%  \S.*")
    (line,) = [line for line in done.stderr.splitlines() if not progress.fullmatch(line)]
    assert line.startswith("real2sim2real: ")
    assert message in line
    assert "tmp/checkpoint-" not in line
    assert len(line) < 400


def test_sft_trains_the_model_that_is_asked_for(monkeypatch, tmp_path):
    from flows import commands
    from gsrl_core import sft

    asked = []

    def train(demos, out, init, model, config, *, command, **_):
        asked.append((init, model, command.split()[-2:]))
        return {}

    monkeypatch.setattr(sft, "train_sft", train)
    commands.sft(tmp_path, tmp_path / "out")
    commands.sft(tmp_path, tmp_path / "out", model="pi05_small")
    commands.sft(tmp_path, tmp_path / "out", init=Path("base"))
    assert asked == [
        (None, "pi05_tiny", ["--model", "pi05_tiny"]),
        (None, "pi05_small", ["--model", "pi05_small"]),
        (Path("base"), "pi05_tiny", ["--init", "base"]),
    ]


def test_sft_reads_its_start_as_the_policy_section_says(monkeypatch, tmp_path):
    from flows import commands
    from gsrl_core import sft

    asked = []
    monkeypatch.setattr(
        sft, "train_sft", lambda *_, discrete_state, asset_id, **__: asked.append((discrete_state, asset_id))
    )
    commands.sft(tmp_path, tmp_path / "out", init=Path("base"))
    told = ["policy.discrete_state=false", "policy.asset_id=droid"]
    commands.sft(tmp_path, tmp_path / "out", init=Path("base"), assignments=told)
    assert asked == [(None, None), (False, "droid")]


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
