from dataclasses import replace

import numpy as np
import pytest

from gsrl_core.geometry import props
from gsrl_core.sim import fr3, task


def test_starts_follow_the_seeds_distributions():
    starts = [task.start_state(task.EpisodeSpec(seed)) for seed in range(400)]
    cube, plate = np.stack([s.cube for s in starts]), np.stack([s.plate for s in starts])
    qpos = np.stack([s.qpos for s in starts])
    for column, (low, high) in enumerate([(0.3, 0.5), (0.15, 0.25)]):
        assert low <= cube[:, column].min() < low + 0.005
        assert high - 0.005 < cube[:, column].max() <= high
    assert 0.4 <= plate[:, 0].min() < 0.405
    assert 0.495 < plate[:, 0].max() <= 0.5
    assert np.unique(plate[:, 1:], axis=0).tolist() == [[0.0, props.PLATE_ORIGIN_HEIGHT]]
    assert (cube[:, 2] == 0.02).all()
    # Mean and spread of 400 x 7 normal draws, 5 standard errors wide.
    noise = (qpos - fr3.START_QPOS)[:, :7]
    assert abs(noise.mean()) < 5 * 0.02 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(0.02, abs=5 * 0.02 / np.sqrt(2 * noise.size))
    assert (qpos[:, 7:] == 0.04).all()


def test_a_start_depends_on_its_seed_alone():
    np.random.seed(0)
    first = task.start_state(task.EpisodeSpec(5))
    np.random.seed(1)
    again = task.start_state(task.EpisodeSpec(5))
    other = task.start_state(task.EpisodeSpec(6))
    for name in ("qpos", "cube", "plate"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert (first.cube != other.cube).any()


def test_widened_ranges_keep_cube_and_plate_apart():
    for seed in range(100):
        start = task.start_state(task.EpisodeSpec(seed, pose_range_scale=3.0))
        assert np.linalg.norm(start.cube[:2] - start.plate[:2]) > props.PLATE_RADIUS + np.sqrt(2) * props.CUBE_HALF


RESTING = task.ObjectState(
    cube_position=np.array([0.45, 0.0, 0.026]),
    plate_position=np.array([0.45, 0.0, 0.02]),
    plate_up=np.array([0.0, 0.0, 1.0]),
    cube_speed=0.0,
    cube_spin=0.0,
    cube_on_plate=True,
    cube_elsewhere=False,
)


def test_a_cube_that_rests_on_the_plate_is_success():
    assert task.judge(RESTING).success
    assert task.judge(RESTING).success_seed


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"cube_on_plate": False}, "resting"),
        ({"cube_elsewhere": True}, "released"),
        ({"cube_speed": 0.05}, "still"),
        ({"cube_spin": 1.0}, "still"),
        ({"cube_position": np.array([0.45 + 0.06, 0.0, 0.026])}, "inside"),
        ({"cube_position": np.array([0.45, 0.0, 0.1])}, "inside"),
        ({"plate_up": np.array([0.3, 0.0, 0.954])}, "inside"),
    ],
)
def test_each_part_is_needed(change, part):
    verdict = task.judge(replace(RESTING, **change))
    assert not verdict.success
    assert not getattr(verdict, part)


def test_the_seeds_test_also_passes_a_hovering_cube_and_has_its_bounds():
    hovering = replace(RESTING, cube_on_plate=False, cube_elsewhere=True)
    assert task.judge(hovering).success_seed

    def seeds(x, z):
        position = np.array([0.45 + x, 0.0, 0.02 + z])
        return task.judge(replace(RESTING, cube_position=position)).success_seed

    assert seeds(0.069, 0.0)
    assert not seeds(0.071, 0.0)
    assert seeds(0.0, 0.069)
    assert not seeds(0.0, 0.071)
    assert not seeds(0.0, -0.001)


def test_mean_speeds_of_a_known_motion():
    before, after = np.eye(4), np.eye(4)
    angle = 0.2
    after[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    after[:3, 3] = [0.003, 0.0, 0.004]
    speed, spin = task.mean_speeds(before, after, 0.1)
    assert speed == pytest.approx(0.05)
    assert spin == pytest.approx(2.0)
    assert task.mean_speeds(after, after, 0.1) == (0.0, 0.0)
