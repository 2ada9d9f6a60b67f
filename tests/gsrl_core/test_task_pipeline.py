"""The new tasks through the drivers with tiny numbers: assemble, demonstrations, evaluation. No policy is expected to
succeed; what is tested is that every step takes the task from the configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gsrl_core import assemble
from gsrl_core.config import load
from gsrl_core.demos import collect_demos
from gsrl_core.evaluate import evaluate
from gsrl_core.interfaces import NullReporter
from gsrl_core.package import _placements
from gsrl_core.policy.demonstrations import load_demonstrations
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.ply import read_ply, write_ply


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One for all: the rasteriser is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSRL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


TINY = Path(__file__).parents[2] / "gsrl_core" / "bundled" / "pi05_tiny"


@pytest.mark.parametrize(
    ("preset", "object_name", "told"),
    [
        ("stack-cube", "red_cube", "stack the red cube on the green cube"),
        pytest.param("pick-and-place", "can", "pick up the can and put it on the blue mark", marks=pytest.mark.slow),
    ],
)
def test_a_task_goes_through_the_drivers(tmp_path, preset, object_name, told):
    changes = {
        "sim.num_envs": 2, "sim.workers": 2, "sim.rasterizer": "numba", "sim.render_downscale": 8,
        "demos.episodes": 2, "demos.action_noise": 0.0, "evaluation.episodes": 2, "evaluation.videos": 0,
        "evaluation.episodes_per_perturbation": 2, "evaluation.perturbations": ["wording"], "sim.max_episode_steps": 60,
    }  # fmt: skip
    config = load(preset, changes)
    task = load_task(config.sim.task, config.sim.task_options)
    static = assemble.object_bodies(load_task())["plate"][0]  # anything that lies about
    write_ply(tmp_path / "bench.ply", static)
    scene = assemble.assemble_scene(tmp_path / "bench.ply", tmp_path / "scene", task=task, robot_gaussians=400)
    assert object_name in scene.names
    written = read_ply(tmp_path / "scene" / f"{object_name}.ply")
    torch.testing.assert_close(written.means, scene.part(object_name).means)

    facts = collect_demos(tmp_path / "scene", tmp_path / "demos", config, NullReporter())
    assert facts["successes"] == 2
    recorded = load_demonstrations(tmp_path / "demos")
    assert set(recorded.instructions.values()) == {told}

    short = load(preset, changes | {"sim.max_episode_steps": 10})
    report = evaluate(TINY, tmp_path / "scene", tmp_path / "sweep", short, NullReporter())
    assert [len(cell.seeds) for cell in report.cells] == [2, 2]
    settings = json.loads((tmp_path / "sweep" / "report.json").read_text())
    assert [cell["name"] for cell in settings["cells"]] == ["nominal", "wording"]

    placement = _placements(task, 5)[0].objects[object_name]
    assert np.allclose(placement[:3, :3] @ placement[:3, :3].T, np.eye(3))
