import pytest
import torch

from gsrl_core.embodiment import SplatEmbodiment
from gsrl_core.errors import CheckpointError
from gsrl_core.folders import bundled_folder
from gsrl_core.policy.checkpoint import read_config
from gsrl_core.sections import PipelineConfig


def test_scene_and_rasterizer_are_on_the_same_device(monkeypatch, tmp_path):
    class Scene:
        def to(self, device):
            return f"scene on {device}"

    monkeypatch.setattr("gsrl_core.splat.scene.load_scene", lambda folder: Scene())
    monkeypatch.setattr("gsrl_core.splat.raster.make_rasterizer", lambda name, device: f"{name} on {device}")
    monkeypatch.setattr("gsrl_core.sim.gs_env.make_env", lambda sim, *made: made)
    config = PipelineConfig()
    made = SplatEmbodiment(tmp_path, tmp_path, config).make_env(3, torch.device("cuda", 1))
    assert made == ("scene on cuda:1", f"{config.sim.rasterizer} on cuda:1", 3, None)


def test_what_is_said_about_the_checkpoint_acts():
    policy = {"precision": "float32", "compile": "never", "discrete_state": False, "asset_id": "fr3"}
    checkpoint = bundled_folder("bundled:pi05_tiny")
    made = SplatEmbodiment(checkpoint, checkpoint, PipelineConfig.model_validate({"policy": policy}))
    assert read_config(checkpoint).discrete_state
    assert not made.make_policy(torch.device("cpu")).tokenizer.discrete_state
    other = PipelineConfig.model_validate({"policy": policy | {"asset_id": "droid"}})
    with pytest.raises(CheckpointError, match="has statistics of: fr3"):
        SplatEmbodiment(checkpoint, checkpoint, other).make_policy(torch.device("cpu"))
