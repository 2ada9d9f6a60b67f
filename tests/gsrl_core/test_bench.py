"""Each measurement runs and reports figures that fit together."""

import pytest

from gsrl_core import bench
from gsrl_core.config import load
from gsrl_core.errors import ConfigError


@pytest.fixture(autouse=True)
def short(monkeypatch, home):
    monkeypatch.setattr(bench, "_SECONDS", 0.05)


@pytest.fixture
def config():
    return load("laptop", {"sim.num_envs": 2, "sim.workers": 1, "sim.max_episode_steps": 10})


def measured(what, config):
    """One measurement, every figure of which is positive and says on what machine."""
    (result,) = bench.measure(what, config)
    assert result["bench"] == what
    assert result["cores"] >= 1
    assert all(value > 0 for key, value in result.items() if key.startswith(("ms_", "frames_", "env_", "chunks_")))
    return result


@pytest.mark.parametrize("what", ["raster", "physics", "policy"])
def test_every_figure_is_positive_and_the_machine_is_named(what, config):
    measured(what, config)


def test_render_counts_every_frame(config):
    result = measured("render", config)
    assert result["environments"] == 2
    assert result["frames_per_s"] == pytest.approx(1000 / result["ms_per_frame"])


def test_an_unknown_part_is_refused(config):
    with pytest.raises(ConfigError, match="allowed: raster, render"):
        next(bench.measure("rendr", config))
