"""What the flow refuses before its first stage."""

import json

import pytest

from gsrl_core.config import load
from gsrl_core.errors import ConfigError, PackageError, PlacementError
from gsrl_core.preflight import check_pipeline


def test_the_presets_pass():
    for preset in ("laptop", "one-gpu", "full", "cluster"):
        check_pipeline(load(preset))


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ({"evaluation.seed": 142_000_000}, ConfigError, "overlap training seeds"),
        ({"evaluation.seed": 90_000_000}, ConfigError, "overlap validation seeds"),
        ({"cluster.component_placement": {"wrong": "all"}}, PlacementError, "unknown role 'wrong'"),
        ({"cluster.component_placement": {"env,actor": "all"}}, PlacementError, "does not place rollout"),
        ({"sim.control_mode": "pd_joint_pos"}, PackageError, "pd_ee_target_delta_pose"),
        ({"sim.cameras": [{"name": "a"}, {"name": "b"}]}, PackageError, "has 2 cameras"),
        ({"sim.cameras": [{"link": "fr3_hand"}]}, PackageError, "fixed in the base frame"),
        ({"evaluation.real_results": "/nowhere/real.json"}, ConfigError, "cannot be read"),
        ({"sim.realism.background": "/nowhere"}, ConfigError, "not a folder"),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(overrides, error, says):
    with pytest.raises(error, match=says):
        check_pipeline(load("laptop", overrides))


def test_real_results_are_read(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([{"name": "nominal", "successes": 3, "trials": 2}]))
    with pytest.raises(ConfigError, match="whole numbers"):
        check_pipeline(load("laptop", {"evaluation.real_results": str(path)}))
