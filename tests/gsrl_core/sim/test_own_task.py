"""A user's own task: the example of docs/your_own_task.md, word for word, and what is said about mistakes in one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sim_helpers import PoseRasterizer, empty_scene, sim_config

from gsrl_core import config
from gsrl_core.errors import SimulationError
from gsrl_core.sim import task
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.tasks import code_location, load_task

DOCUMENT = Path(__file__).parents[3] / "docs" / "your_own_task.md"


@pytest.fixture
def example(tmp_path):
    """The document's two files, in a folder of their own."""
    text = DOCUMENT.read_text()
    (tmp_path / "block_on_spot.py").write_text(re.search(r"```python\n(.*?)```", text, re.S).group(1))
    (tmp_path / "block_on_spot.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))
    return tmp_path


def test_the_example_has_40_lines_of_code(example):
    lines = (example / "block_on_spot.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


def test_the_examples_expert_succeeds_in_worker_processes(example):
    loaded = config.load(str(example / "block_on_spot.yaml"))
    played = load_task(loaded.sim.task)
    sim = sim_config(task=loaded.sim.task, num_envs=10, workers=2)
    expert = played.expert()
    with make_env(sim, empty_scene(task.body_names(played)), PoseRasterizer()) as env:
        assert env.instructions()[0] == "put the yellow block on the blue spot"
        env.reset(range(10))
        while True:
            step = env.step_chunk(expert(env.privileged())[:, None])
            if (step.terminated | step.truncated).all():
                break
    assert step.success.sum() >= 9


def test_files_of_a_preset_are_found_from_anywhere(example, monkeypatch):
    reference = config.load(str(example / "block_on_spot.yaml")).sim.task
    assert reference == f"{example / 'block_on_spot.py'}:BlockOnSpot"
    monkeypatch.chdir(example)
    assert config.load("laptop", {"sim.task": "block_on_spot.py:BlockOnSpot"}).sim.task == reference
    assert config.load("block_on_spot.yaml").sim.task == reference


def test_the_commands_of_the_document_exist():
    from flows.cli import app

    names = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    used = re.findall(r"real2sim2real ([a-z-]+)", DOCUMENT.read_text())
    assert len(used) >= 4 and set(used) <= names


def test_the_document_names_presets_and_options_that_exist():
    assert (
        yaml.safe_load(re.search(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.S).group(1))["base"] in config.PRESETS
    )
    load_task("PickAndPlace-v0", {"goal": "plate", "noun": "mug", "scale": 1.0})


def test_an_edited_file_is_read_again(example):
    file = example / "block_on_spot.py"
    reference = f"{file}:BlockOnSpot"
    assert load_task(reference).instruction.endswith("blue spot")
    file.write_text(file.read_text().replace("on the blue spot", "on the spot"))
    assert load_task(reference).instruction.endswith("on the spot")
    assert code_location(reference) == file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class BlockOnSpot(Task)", "class BlockOnSpot(Tsak)", "NameError"),
        ("class BlockOnSpot(Task)", "class Other(Task)", "has no class 'BlockOnSpot'"),
        ('            "spot": pose', '            "sopt": pose', r"place\(\) gives \['block', 'sopt'\]"),
        ('moved = "block"', 'moved = "brick"', "moved is 'brick', the objects are"),
        ('support = "table"', 'support = "floor"', "allowed: block, spot, table"),
        ('pick="block"', 'pick="cube"', r"plan\(\).pick is 'cube'"),
        ("mass=0.15", "mass=0.0", "must be > 0"),
        ('mark("spot"', 'mark("table"', "none of table, robot"),
        ("    def plan(self)", "    def plann(self)", "abstract method"),
    ],
)
def test_mistakes_are_named(example, urdf, old, new, said):
    file = example / "block_on_spot.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(SimulationError, match=said):
        WorldSettings(urdf, task=f"{file}:BlockOnSpot")


@pytest.mark.parametrize(
    ("reference", "options", "said"),
    [
        ("StackCubes-v0", {}, "known: PutCubeOnPlate-v0, StackCube-v0, PickAndPlace-v0, or one of your own"),
        ("nowhere.py:MyTask", {}, "there is no file"),
        ("nowhere.py:", {}, "known:"),
        ("StackCube-v0", {"mesh": "x"}, "has no options .'mesh'.; allowed: none"),
        ("PickAndPlace-v0", {"mehs": "x"}, "allowed: mesh, splat, parts"),
        ("PickAndPlace-v0", {"goal": "bin"}, "allowed: mark, plate"),
        ("PickAndPlace-v0", {"mass": 0}, "mass is 0; it must be positive"),
    ],
)
def test_unknown_tasks_and_options_say_what_is_allowed(reference, options, said):
    with pytest.raises(SimulationError, match=said):
        load_task(reference, options)


def test_a_task_costs_workers_neither_torch_nor_mesh_libraries(urdf):
    """Objects travel with the settings; the worker makes the task, and judges, without what made them."""
    script = """
import pickle, sys
from gsrl_core.sim.world import World
from gsrl_core.sim.task import EpisodeSpec
world = World(pickle.load(sys.stdin.buffer))
world.reset(EpisodeSpec(0))
world.verdict()
print([name for name in ("torch", "trimesh", "scipy", "mani_skill", "pydantic") if name in sys.modules])
"""
    import pickle

    settings = pickle.dumps(WorldSettings(urdf, sim_hz=100, task="PickAndPlace-v0", task_options={"goal": "plate"}))
    done = subprocess.run([sys.executable, "-c", script], input=settings, capture_output=True, check=True)
    assert done.stdout.decode().splitlines()[-1] == "[]"


def test_gym_id_of_an_own_task(example):
    import gymnasium

    from gsrl_core.sim import gym_ids

    env_id = gym_ids.register(f"{example / 'block_on_spot.py'}:BlockOnSpot")
    assert env_id == "GSEnv-BlockOnSpot-v0"
    scene = empty_scene((*task.fr3.LINKS, "block", "spot"))
    given = {"scene": scene, "rasterizer": PoseRasterizer(), "device": "cpu", "sim": sim_config(workers=1)}
    env = gymnasium.make(env_id, num_envs=1, gs_kwargs=given)
    observation, _ = env.reset(seed=3)
    assert observation["agent"]["qpos"].shape == (1, 9)
    assert env.unwrapped.get_language_instruction() == ["put the yellow block on the blue spot"]
    assert not torch.isnan(env.step(torch.zeros(1, 7))[1]).any()
    env.close()
