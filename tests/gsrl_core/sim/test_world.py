import numpy as np
import pytest
from sim_helpers import BODIES, PUT

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import props
from gsrl_core.sim import fr3, task
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.world import World

AWAY = np.array([0.0, -0.9, 0.0, -2.6, 0.0, 2.0, 0.785, 0.04, 0.04])
"""The hand high above the base, far from the plate."""
HOLD = np.array([0.0, 0, 0, 0, 0, 0, 1.0])
PLATE = np.array([0.45, 0.0, 0.02])


def above_plate(x, y, z):
    return PLATE + np.array([x, y, z])


@pytest.fixture
def world(quick):
    world = World(quick)
    world.reset(task.EpisodeSpec(0))
    world.set_qpos(AWAY)
    world.place("plate", PLATE)
    return world


def settle(world, steps=5):
    for _ in range(steps):
        world.step(HOLD)
    return world.verdict()


def random_actions(steps, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(-0.04, 0.04, (steps, 6)), rng.uniform(-1, 1, (steps, 1))], axis=1)


def trace(world, spec, actions):
    world.reset(spec)
    states = []
    for action in actions:
        world.step(action)
        states.append(
            np.concatenate([world.body_poses().ravel(), world.qpos(), world.qvel(), world.velocities().ravel()])
        )
    return np.stack(states)


def test_same_seed_same_bits_whatever_was_played_before(quick):
    actions = random_actions(20)
    first = trace(World(quick), task.EpisodeSpec(4), actions)
    world = World(quick)
    trace(world, task.EpisodeSpec(9), random_actions(13, seed=1))
    assert (trace(world, task.EpisodeSpec(4), actions) == first).all()
    assert (trace(world, task.EpisodeSpec(5), actions) != first).any()


def test_bodies_start_where_the_seed_says(quick):
    world = World(quick)
    world.reset(task.EpisodeSpec(3))
    start = PUT.start(task.EpisodeSpec(3))
    poses = world.body_poses()
    np.testing.assert_allclose(world.qpos(), start.qpos, atol=1e-6)
    np.testing.assert_allclose(poses[BODIES.index("cube"), :3, 3], start.objects["cube"][:3], atol=1e-7)
    np.testing.assert_allclose(poses[BODIES.index("plate"), :3, 3], start.objects["plate"][:3], atol=1e-7)
    np.testing.assert_allclose(poses[0], np.eye(4), atol=1e-6)


def test_cube_and_plate_stay_where_they_are_put(world):
    world.place("cube", np.array([0.4, 0.2, 0.02]))
    settle(world, 20)
    poses = world.body_poses()
    np.testing.assert_allclose(poses[-2, :3, 3], [0.4, 0.2, 0.02], atol=1e-3)
    np.testing.assert_allclose(poses[-1, :3, 3], PLATE, atol=1e-3)


def test_a_cube_laid_on_the_plate_is_success(world):
    world.place("cube", above_plate(0.01, 0, 0.007))
    verdict = settle(world)
    assert verdict.success
    # It lies inside the hollow: 6 mm floor above the underside, not on a convex hull at rim height.
    assert world.body_poses()[-2, 2, 3] == pytest.approx(props.PLATE_FLOOR_THICKNESS + props.CUBE_HALF, abs=1e-3)


def test_the_plate_stands_on_four_points_and_on_its_rim_when_overturned(world):
    settle(world)
    plate = world._bodies.objects["plate"]
    contacts = [contact for contact in world._bodies.system.get_contacts() if plate in contact.bodies]
    assert [len(contact.points) for contact in contacts] == [4]
    world.place("plate", above_plate(0, 0, 0.01), np.array([0.0, 1, 0, 0]))
    settle(world, 10)
    upside_down = world.body_poses()[-1]
    height = props.PLATE_RIM_HEIGHT - props.PLATE_ORIGIN_HEIGHT
    assert upside_down[2, 3] == pytest.approx(height, abs=1e-3)
    assert upside_down[2, 2] == pytest.approx(-1, abs=1e-3)


def test_closed_fingers_neither_touch_nor_pass_each_other(world):
    for _ in range(12):
        world.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    fingers = {link for link in world._bodies.robot.get_links() if link.name in fr3.FINGER_LINKS}
    assert not any(fingers <= set(contact.bodies) for contact in world._bodies.system.get_contacts())
    assert (world.qpos()[7:] > -1e-4).all()


def test_success_lasts_while_physx_lets_the_bodies_sleep(world):
    world.place("cube", above_plate(0.0, 0, 0.007))
    settle(world)
    assert all(settle(world, 1).success for _ in range(40))


def test_a_falling_cube_is_not_success_until_it_rests(world):
    world.place("cube", above_plate(0.0, 0, 0.06))
    verdict = world.verdict()
    assert verdict.success_seed
    assert not verdict.success
    world.step(HOLD)
    assert settle(world, 10).success


def test_a_moving_cube_is_not_success(world):
    world.place("cube", above_plate(0.0, 0, 0.0062))
    settle(world)
    world._bodies.objects["cube"].set_linear_velocity([0.8, 0.0, 0.0])
    world.step(HOLD)
    verdict = world.verdict()
    assert not verdict.still
    assert not verdict.success


@pytest.mark.parametrize("offset", [(0.0, 0, 0.06), (0.01, 0, 0.007), (0.05, 0, 0.03), (0.0, 0.14, 0.0)])
def test_the_quick_verdict_agrees_on_success_and_is_whole_inside_the_plate(world, offset):
    world.place("cube", above_plate(*offset))
    for _ in range(12):
        world.step(HOLD)
        full, quick = world.verdict(), world.verdict(complete=False)
        assert (quick.success, quick.success_seed, quick.inside) == (full.success, full.success_seed, full.inside)
        assert quick == full or not full.inside


def test_a_cube_beside_the_plate_is_not_success(world):
    world.place("cube", above_plate(0.0, 0.14, 0.0))
    verdict = settle(world)
    assert not verdict.inside
    assert not verdict.resting
    assert not verdict.success_seed


def test_a_cube_that_leans_on_the_rim_from_outside_is_not_success(world):
    tilt = np.array([np.cos(0.35), np.sin(0.35), 0, 0])
    world.place("cube", above_plate(0.0, 0.1, 0.02), tilt)
    verdict = settle(world, 10)
    assert not verdict.success


def test_a_held_cube_is_not_success_until_the_fingers_leave_it(quick):
    """The hand holds the cube just above the plate's floor: near and still, but not released."""
    world = World(quick)
    world.reset(task.EpisodeSpec(0))
    world.set_qpos(np.array(fr3.START_QPOS))
    while world.tcp()[2, 3] > 0.04:
        world.step(np.array([0.004, 0, -0.01, 0, 0, 0, 1.0]))
    settle(world)
    at = world.tcp()[:3, 3]
    world.place("plate", np.array([at[0], at[1], 0.02]))
    world.place("cube", at)
    for _ in range(6):
        world.step(np.array([0, 0, 0, 0, 0, 0, -0.5]))
    held = world.verdict()
    assert held.success_seed
    assert held.inside
    assert held.still
    assert not held.released
    assert not held.success
    for _ in range(15):
        world.step(np.array([0, 0, 0.005, 0, 0, 0, 1.0]))
    assert world.verdict().success


def test_gripper_actions_map_to_finger_positions(world):
    for command, position in ((1.0, 0.04), (-0.5, 0.0025), (0.0, 0.015)):
        for _ in range(12):
            world.step(np.array([0, 0, 0, 0, 0, 0, command]))
        np.testing.assert_allclose(world.qpos()[7:], position, atol=1e-3)


def test_pose_actions_move_the_tcp_in_base_axes(world):
    settle(world, 15)
    before = world.tcp()
    for _ in range(4):
        world.step(np.array([0.01, -0.01, 0.005, 0, 0, 0.05, 1.0]))
    settle(world, 15)
    after = world.tcp()
    np.testing.assert_allclose(after[:3, 3] - before[:3, 3], [0.04, -0.04, 0.02], atol=3e-3)
    turned = after[:3, :3] @ before[:3, :3].T
    assert np.arctan2(turned[1, 0], turned[0, 0]) == pytest.approx(0.2, abs=0.02)


def test_joint_modes_command_joints(urdf):
    goal = np.array([*AWAY[:7], 1.0])
    absolute = World(WorldSettings(urdf, sim_hz=100, solver_iterations=8, control_mode="pd_joint_pos"))
    absolute.reset(task.EpisodeSpec(0))
    for _ in range(40):
        absolute.step(goal)
    # Gravity bends the joints by torque / stiffness, at most about 40 Nm / 1000.
    np.testing.assert_allclose(absolute.qpos()[:7], AWAY[:7], atol=0.05)
    relative = World(WorldSettings(urdf, sim_hz=100, solver_iterations=8, control_mode="pd_joint_delta_pos"))
    relative.reset(task.EpisodeSpec(0))
    before = relative.qpos()[0]
    for _ in range(10):
        relative.step(np.array([0.05, 0, 0, 0, 0, 0, 0, 1.0]))
    assert relative.qpos()[0] - before > 0.2


def test_friction_perturbation_reaches_the_shapes(quick):
    world = World(quick)
    world.reset(task.EpisodeSpec(0, friction_scale=0.5))
    finger = next(link for link in world._bodies.robot.get_links() if link.name == "fr3_leftfinger")
    assert {shape.physical_material.dynamic_friction for shape in finger.collision_shapes} == {1.0}
    assert world._bodies.objects["cube"].collision_shapes[0].physical_material.static_friction == 0.5
    world.reset(task.EpisodeSpec(0))
    finger = next(link for link in world._bodies.robot.get_links() if link.name == "fr3_leftfinger")
    assert {shape.physical_material.dynamic_friction for shape in finger.collision_shapes} == {2.0}


def test_bad_use_is_explained(quick):
    world = World(quick)
    with pytest.raises(SimulationError, match="reset"):
        world.step(HOLD)
    world.reset(task.EpisodeSpec(0))
    with pytest.raises(SimulationError, match="not finite"):
        world.step(np.full(7, np.nan))


def test_rebuilding_the_scene_every_episode_leaks_nothing(quick):
    import resource

    world = World(quick)
    for seed in range(30):
        world.reset(task.EpisodeSpec(seed))
        world.step(HOLD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(300):
        world.reset(task.EpisodeSpec(seed))
        world.step(HOLD)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
