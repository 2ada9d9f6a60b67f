import numpy as np
import pytest
from pydantic import ValidationError

from gsrl_core.deploy import limits
from gsrl_core.deploy.limits import SafetyLimits, check_joint_tables, velocity_bounds
from gsrl_core.errors import SafetyError


def test_the_rectangular_set_lies_inside_every_published_table():
    assert (limits.SAFE_Q_MIN == limits.RECTANGULAR_Q_MIN).all()
    assert (limits.SAFE_Q_MAX == limits.RECTANGULAR_Q_MAX).all()
    assert (limits.Q_MIN < limits.SAFE_Q_MIN).all()
    assert (limits.SAFE_Q_MAX < limits.Q_MAX).all()


def test_velocity_bounds_of_joint_2_by_hand():
    # -0.2517 + sqrt(2 * 2.585 * (1.8361 - 1.8)) = 0.1803; far below the limit of the rectangular set, 1.0.
    q = np.array([0.0, 1.8, 0.0, -1.5, 0.0, 2.0, 0.0])
    low, high = velocity_bounds(q)
    assert high[1] == pytest.approx(-0.2517 + np.sqrt(2 * 2.585 * 0.0361), abs=1e-9)
    assert high[1] == pytest.approx(0.18031, abs=1e-4)
    assert low[1] == -1.0
    assert high[0] == 2.0


def test_no_velocity_towards_a_joint_limit_is_legal_at_the_limit():
    low, high = velocity_bounds(limits.Q_MAX)
    assert (high == 0).all()
    assert (low < 0).all()
    low, high = velocity_bounds(limits.Q_MIN)
    assert (low == 0).all()
    assert (high > 0).all()


def test_the_rectangular_speeds_are_a_little_optimistic_at_the_corner_so_the_smaller_bound_counts():
    # -0.6599 + sqrt(2 * 6.0 * (2.9007 - 2.3476)) = 1.9164 rad/s, where the rectangular table says 2.
    for q in (limits.RECTANGULAR_Q_MIN, limits.RECTANGULAR_Q_MAX):
        low, high = velocity_bounds(q)
        assert min(-low[0], high[0]) == pytest.approx(1.9164, abs=1e-4)
        assert (np.maximum(-low, high) <= limits.RECTANGULAR_DQ_MAX).all()
        assert (np.minimum(-low, high) >= 0.95 * limits.RECTANGULAR_DQ_MAX).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_step_translation", 0.2),
        ("max_speed", 5.0),
        ("force_samples", 1),
        ("max_force", 1000.0),
        ("workspace_min", (0.9, 0.0, 0.0)),
        ("workspace_max", (2.0, 0.4, 0.5)),
        ("stream_hz", 10),
        ("max_turn_rate", float("nan")),
        ("no_such_limit", 1.0),
    ],
)
def test_limits_beyond_the_arm_are_refused(key, value):
    with pytest.raises(ValidationError):
        SafetyLimits(**{key: value})


def test_safety_yaml_round_trip_and_errors(tmp_path):
    path = tmp_path / "safety.yaml"
    chosen = SafetyLimits(max_speed=0.2, workspace_min=(0.3, -0.1, 0.01))
    chosen.save(path)
    assert SafetyLimits.load(path) == chosen
    for broken in ("max_speed: 9", "max_sped: 0.1", "- 1", "{"):
        path.write_text(broken)
        with pytest.raises(SafetyError):
            SafetyLimits.load(path)


def test_another_arm_is_refused_and_a_tighter_one_narrows_the_range():
    low, high = check_joint_tables(limits.Q_MIN, np.array([2.0, *limits.Q_MAX[1:]]))
    assert high[0] == 2.0
    assert high[1] == limits.SAFE_Q_MAX[1]
    assert low[0] == limits.SAFE_Q_MIN[0]
    with pytest.raises(SafetyError, match="not an FR3"):
        check_joint_tables(np.zeros(7), np.ones(7))
    with pytest.raises(SafetyError, match="not an FR3"):
        check_joint_tables(np.full(7, np.nan), limits.Q_MAX)
