import numpy as np
import pytest
from sim_helpers import PUT

from gsrl_core.geometry import props
from gsrl_core.sim import fr3, task

QPOS_7 = (-0.012202330378039607, 0.27432963792207765, 0.009418135099332545)
CUBE_7, PLATE_7 = (0.3908438892757546, 0.24093456834561588), 0.40799024844755055


def test_starts_follow_the_seeds_distributions():
    starts = [PUT.start(task.EpisodeSpec(seed)) for seed in range(400)]
    cube, plate = (np.stack([s.objects[name][:3] for s in starts]) for name in ("cube", "plate"))
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


def test_the_starts_of_seeds_never_change():
    """The bundled checkpoint was trained on these episodes, and evaluations of different versions are compared."""
    start = PUT.start(task.EpisodeSpec(7))
    np.testing.assert_allclose(start.qpos[:3], QPOS_7, rtol=0, atol=1e-12)
    np.testing.assert_allclose(start.objects["cube"], [*CUBE_7, 0.02, 1, 0, 0, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(start.objects["plate"], [PLATE_7, 0, 0.02, 1, 0, 0, 0], rtol=0, atol=1e-12)


def test_a_start_depends_on_its_seed_alone():
    np.random.seed(0)
    first = PUT.start(task.EpisodeSpec(5))
    np.random.seed(1)
    again = PUT.start(task.EpisodeSpec(5))
    other = PUT.start(task.EpisodeSpec(6))
    assert (first.qpos == again.qpos).all()
    for name in ("cube", "plate"):
        assert (first.objects[name] == again.objects[name]).all()
    assert (first.objects["cube"] != other.objects["cube"]).any()


def test_widened_ranges_keep_cube_and_plate_apart():
    for seed in range(100):
        placed = PUT.start(task.EpisodeSpec(seed, pose_range_scale=3.0)).objects
        apart = np.linalg.norm(placed["cube"][:2] - placed["plate"][:2])
        assert apart > props.PLATE_RADIUS + np.sqrt(2) * props.CUBE_HALF


def judged(cube=(0.45, 0.0, 0.026), plate=(0.45, 0.0, 0.02), up=1.0, speeds=(0.0, 0.0), pressing=("plate",), **kwargs):
    """The verdict about a cube that, unless said otherwise, rests on the plate."""
    poses = {"cube": np.eye(4), "plate": np.eye(4)}
    poses["cube"][:3, 3], poses["plate"][:3, 3], poses["plate"][2, 2] = cube, plate, up
    now = task.ObjectsNow(poses, lambda name: speeds, lambda name: frozenset(pressing))
    return PUT.judge(now, **kwargs)


def test_a_cube_that_rests_on_the_plate_is_success():
    assert judged().success
    assert judged().success_seed


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"pressing": ()}, "resting"),
        ({"pressing": ("plate", "robot")}, "released"),
        ({"pressing": ("plate", "table")}, "released"),
        ({"speeds": (0.05, 0.0)}, "still"),
        ({"speeds": (0.0, 1.0)}, "still"),
        ({"cube": (0.45 + 0.06, 0.0, 0.026)}, "inside"),
        ({"cube": (0.45, 0.0, 0.1)}, "inside"),
        ({"up": 0.954}, "inside"),
    ],
)
def test_each_part_is_needed(change, part):
    verdict = judged(**change)
    assert not verdict.success
    assert not getattr(verdict, part)


def test_the_seeds_test_also_passes_a_hovering_cube_and_has_its_bounds():
    assert judged(pressing=("robot",)).success_seed

    def seeds(x, z):
        return judged(cube=(0.45 + x, 0.0, 0.02 + z)).success_seed

    assert seeds(0.069, 0.0)
    assert not seeds(0.071, 0.0)
    assert seeds(0.0, 0.069)
    assert not seeds(0.0, 0.071)
    assert not seeds(0.0, -0.001)


def test_contacts_are_not_asked_for_where_they_decide_nothing():
    def asked(name):
        raise AssertionError

    poses = {"cube": np.eye(4), "plate": np.eye(4)}
    poses["cube"][0, 3] = 0.5
    assert not PUT.judge(task.ObjectsNow(poses, asked, asked), complete=False).success


def test_mean_speeds_of_a_known_motion():
    before, after = np.eye(4), np.eye(4)
    angle = 0.2
    after[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    after[:3, 3] = [0.003, 0.0, 0.004]
    speed, spin = task.mean_speeds(before, after, 0.1)
    assert speed == pytest.approx(0.05)
    assert spin == pytest.approx(2.0)
    assert task.mean_speeds(after, after, 0.1) == (0.0, 0.0)
