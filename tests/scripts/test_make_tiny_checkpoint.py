"""The bare table of the first training step, and the way between two checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsrl_core.splat.scene import load_scene


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "make_tiny_checkpoint.py"
    spec = importlib.util.spec_from_file_location("make_tiny_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_table_is_a_scene_with_robot_and_objects(script, tmp_path):
    scene = load_scene(script.plain_table(tmp_path / "plain"))
    assert {"cube", "plate", "fr3_hand"} <= set(scene.names)
    table = scene.gaussians.means[scene.body == -1]
    assert len(table) == 150 * 140
    assert (table[:, 2] == 0).all()


def test_share_is_the_fraction_of_the_way(script, tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "model.safetensors")
    script.interpolate(tmp_path / "a", tmp_path / "b", 0.25)
    assert load_file(tmp_path / "b" / "model.safetensors")["w"].tolist() == [1.5, 1.5]
