import torch

from gsrl_core.embodiment import SplatEmbodiment
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
