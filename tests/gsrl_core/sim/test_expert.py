import numpy as np
import pytest
import torch
from sim_helpers import BODIES, PUT, PoseRasterizer, empty_scene, sim_config

from gsrl_core.sim import bodies, task
from gsrl_core.sim.expert import Expert
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.pool import Pool
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.throughput import expert_actions
from gsrl_core.sim.world import World


def play(sim, seeds, noise=0.0):
    """Success and length per seed; ``noise`` is the standard deviation of a disturbance of the translations (m)."""
    expert, generator = PUT.expert(), torch.Generator().manual_seed(0)
    success, length = [], []
    with make_env(sim, empty_scene(), PoseRasterizer()) as env:
        for first in range(0, len(seeds), env.num_envs):
            env.reset(seeds[first : first + env.num_envs])
            while True:
                action = expert(env.privileged())
                action[:, :3] += noise * torch.randn(env.num_envs, 3, generator=generator)
                step = env.step_chunk(action[:, None])
                if (step.terminated | step.truncated).all():
                    break
            success += step.success.tolist()
            length += env.elapsed_steps().tolist()
    return success, length


def test_expert_puts_the_cube_on_the_plate_at_laptop_settings():
    success, length = play(sim_config(num_envs=8, workers=2), list(range(8)))
    assert all(success)
    assert max(length) <= 60


def test_expert_recovers_from_disturbed_actions():
    success, _ = play(sim_config(num_envs=8, workers=2), list(range(8)), noise=0.008)
    assert sum(success) >= 7


def trajectories(settings, actions):
    """Positions of TCP, cube and plate [B, T, 3, 3] (m) under ``actions`` [B, T, 7] in the episodes of seeds 0 .."""
    positions, world = [], World(settings)
    for seed, moves in enumerate(actions):
        world.reset(task.EpisodeSpec(seed))
        positions.append([])
        for action in moves:
            world.step(action)
            bodies = world.body_poses()
            positions[-1].append([world.tcp()[:3, 3], bodies[BODIES.index("cube"), :3, 3], bodies[-1, :3, 3]])
    return np.array(positions)


def test_the_seeds_contacts_and_solver_settings_give_the_same_trajectories(urdf, monkeypatch):
    settings = WorldSettings(urdf, sim_hz=500)
    pool = Pool(settings, 4, 1, 2)
    actions = expert_actions(pool, PUT, [task.EpisodeSpec(seed) for seed in range(4)], 1)[:, :32]
    pool.close()
    ours = trajectories(settings, actions)
    assert (ours[..., 1, 2].max(axis=1) > 0.08).all()  # every cube was carried
    for group in ("_TABLE", "_PIECE", "_FINGER"):  # everything meets everything, and the plate has no hull
        monkeypatch.setattr(bodies, group, [1, 1, 0, 0])
    monkeypatch.setattr(bodies, "_concave", lambda pieces, material: [bodies._convex(p, material) for p in pieces])
    monkeypatch.setattr(task, "SOLVER_VELOCITY_ITERATIONS", 2)
    monkeypatch.setattr(task, "OBJECT_CONTACT_OFFSET", 0.01)
    seeds = trajectories(WorldSettings(urdf, sim_hz=500, solver_iterations=25), actions)
    distance = np.linalg.norm(ours - seeds, axis=-1).max(axis=(0, 1))
    assert distance[0] < 1e-3
    assert distance[1:].max() < 2e-3


@pytest.mark.parametrize(
    ("sim_hz", "iterations"),
    [(100, 8), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(100, 25), (500, 6), (500, 25)])],
)
def test_expert_succeeds_in_95_of_100_episodes(sim_hz, iterations):
    sim = sim_config(num_envs=20, workers=2, sim_hz=sim_hz, solver_iterations=iterations)
    success, length = play(sim, list(range(100)))
    assert sum(success) >= 95
    assert max(steps for steps, done in zip(length, success, strict=True) if done) <= 60


def state(cube, tcp=(0.45, 0.0, 0.3), plate=(0.45, 0.0, 0.02), finger=0.04):
    down, upright = (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)
    return {
        "cube_pose": torch.tensor([[*cube, *upright]]),
        "plate_pose": torch.tensor([[*plate, *upright]]),
        "tcp_pose": torch.tensor([[*tcp, *down]]),
        "qpos": torch.tensor([[0.0] * 7 + [finger] * 2]),
    }


def test_phases_follow_from_the_state():
    expert = Expert(PUT.plan())
    cube = (0.4, 0.2, 0.02)
    over = expert.act(state(cube, tcp=(0.4, 0.2, 0.12)))[0]
    assert over[2] < -0.02
    assert over[:2].abs().max() < 1e-6
    assert over[6] == 1.0
    reached = expert.act(state(cube, tcp=cube))[0]
    assert reached[6] == -0.5
    grasped = expert.act(state(cube, tcp=cube, finger=0.02))[0]
    assert grasped[2] > 0.01
    assert grasped[:2].abs().max() < 1e-6
    aloft = (0.4, 0.2, 0.15)
    carried = expert.act(state(aloft, tcp=aloft, finger=0.02))[0]
    assert carried[1] < -0.02
    assert carried[6] == -0.5
    above = (0.45, 0.0, 0.12)
    lowered = expert.act(state(above, tcp=above, finger=0.02))[0]
    assert lowered[2] < -0.02
    assert lowered[6] == -0.5
    down = (0.45, 0.0, 0.028)
    assert expert.act(state(down, tcp=down, finger=0.02))[0, 6] == 1.0
    left = expert.act(state(down, tcp=down, finger=0.03))[0]
    assert left[2] > 0.01
    assert left[6] == 1.0


def test_actions_are_bounded_and_depend_on_nothing_but_the_state():
    expert = Expert(PUT.plan())
    far = state((0.5, 0.25, 0.02), tcp=(0.2, -0.3, 0.5))
    action = expert.act(far)
    assert action[:, :3].norm() <= expert.max_step + 1e-6
    assert action[:, 3:6].norm() <= expert.max_turn + 1e-6
    expert.act(state((0.4, 0.2, 0.02)))
    assert torch.equal(expert.act(far), action)
    both = {name: torch.cat([far[name], state((0.4, 0.2, 0.02))[name]]) for name in far}
    torch.testing.assert_close(expert.act(both)[:1], action)


def test_the_hand_turns_to_the_nearest_face_of_a_turned_cube():
    turned = state((0.4, 0.2, 0.02), tcp=(0.4, 0.2, 0.1))
    angle = torch.tensor(1.4)  # rad; 90 degrees less 0.17
    turned["cube_pose"][0, 3:] = torch.tensor([torch.cos(angle / 2), 0, 0, torch.sin(angle / 2)])
    action = Expert(PUT.plan(), max_turn=1.0, gain=1.0).act(turned)[0]
    torch.testing.assert_close(action[3:6], torch.tensor([0, 0, 1.4 - torch.pi / 2]), atol=1e-5, rtol=0)
