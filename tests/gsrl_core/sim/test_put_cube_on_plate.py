"""The ManiSkill environment with the seed's task, and the lean stepper against it."""

import gymnasium
import numpy as np
import pytest
import torch
from sim_helpers import PUT, PoseRasterizer, empty_scene, sim_config

from gsrl_core.errors import SimulationError
from gsrl_core.sim import task
from gsrl_core.sim.batch import BatchPhysics
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.gs_env import GsVecEnv
from gsrl_core.sim.perturb import Perturbation, perturbation
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.world import World


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(control_mode="pd_ee_target_delta_pose", **sim):
    import gsrl_core.sim.maniskill  # noqa: F401 (registers)

    return gymnasium.make(
        PUT.name,
        num_envs=1,
        obs_mode="state",
        control_mode=control_mode,
        sim_backend="physx_cpu",
        sim_config={"sim_freq": 100, "control_freq": 10, **sim},
    )


def maniskill_env(sim):
    rig = CameraRig(sim.cameras, 1)
    return GsVecEnv(sim, empty_scene(), PoseRasterizer(), rig, BatchPhysics(sim, 1), Perturbation())


@pytest.mark.parametrize("sim_hz", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_lean_stepper_reproduces_maniskill_over_expert_episodes(urdf, sim_hz):
    world = World(WorldSettings(urdf, sim_hz=sim_hz))
    env = maniskill_env(sim_config(num_envs=1, sim_hz=sim_hz, solver_iterations=task.SOLVER_POSITION_ITERATIONS))
    expert = PUT.expert()
    for seed in (0, 1):
        env.reset([seed])
        world.reset(task.EpisodeSpec(seed))
        for _ in range(100):
            action = expert(env.privileged())
            step = env.step_chunk(action[:, None])
            world.step(action[0].numpy())
            tcp, cube = env.privileged()["tcp_pose"][0, :3], env.privileged()["cube_pose"][0, :3]
            assert np.abs(world.tcp()[:3, 3] - tcp.numpy()).max() < 1e-3
            assert np.abs(world.body_poses()[-2, :3, 3] - cube.numpy()).max() < 2e-3
            assert world.verdict().success == bool(step.success[0])
            if step.success[0]:
                break
        assert step.success[0]
    env.close()


@pytest.mark.parametrize("mode", ["pd_ee_delta_pose", "pd_joint_delta_pos", "pd_joint_pos"])
def test_the_other_control_modes_agree_too(urdf, mode):
    env = make(mode)
    world = World(WorldSettings(urdf, sim_hz=100, control_mode=mode))
    env.reset(seed=3)
    world.reset(task.EpisodeSpec(3))
    rng = np.random.default_rng(0)
    for _ in range(4):  # then the delta on the measured joints has sunk the hand to the table
        action = rng.uniform(-0.02, 0.02, 7 if "ee" in mode else 8)
        if mode == "pd_joint_pos":
            action[:7] += PUT.start(task.EpisodeSpec(3)).qpos[:7]
        action[-1] = 1.0
        env.step(action.astype(np.float32)[None])
        world.step(action)
        np.testing.assert_allclose(world.tcp()[:3, 3], env.unwrapped.agent.tcp.pose.p[0], atol=1e-3)
    env.close()


def test_same_seed_gives_the_same_bits_after_other_episodes_and_whatever_torch_was_seeded_with():
    env = make()
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (8, 1, 7)).astype(np.float32)

    def states(seed):
        env.reset(seed=seed)
        rows = [env.unwrapped.get_state()]
        for action in actions:
            env.step(action)
            rows.append(env.unwrapped.get_state())
        return torch.stack(rows)

    torch.manual_seed(0)
    first = states(5)
    states(6)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(states(5), first)
    start = PUT.start(task.EpisodeSpec(5))
    env.reset(seed=5)
    np.testing.assert_allclose(env.unwrapped.objects["cube"].pose.p[0], start.objects["cube"][:3], atol=1e-6)
    np.testing.assert_allclose(env.unwrapped.agent.robot.get_qpos()[0], start.qpos, atol=1e-6)
    env.close()


def test_the_environment_speaks_maniskill():
    env = make()
    _, info = env.reset(seed=1)
    assert not info["success"].any()
    _, reward, terminated, truncated, info = env.step(np.zeros((1, 7), np.float32))
    assert reward.tolist() == [0.0]
    assert terminated.tolist() == truncated.tolist() == [False]
    assert {"success", "success_seed", "inside", "resting", "released", "still"} <= set(info)
    assert env.unwrapped.get_language_instruction() == ["pick up the cube and put it on the plate"]
    assert env.action_space.shape == (7,)
    assert env.unwrapped.agent.uid == "my_franka"
    env.close()


def test_batch_backend_ends_an_episode_whose_physics_diverged(monkeypatch, caplog):
    backend = BatchPhysics(sim_config(num_envs=1), 1)
    backend.reset([task.EpisodeSpec(7)])
    actions, active = np.zeros((1, 2, 7), np.float32), np.ones(1, dtype=bool)
    backend.step(actions, active)
    before = backend.states.body_to_world.copy()
    monkeypatch.setattr(backend, "_finite", lambda: np.zeros(1, dtype=bool))
    backend.step(actions, active)
    assert backend.states.lost.tolist() == [1]
    assert (backend.states.executed[0], backend.states.elapsed[0]) == (0, 2)
    assert (backend.states.body_to_world == before).all()
    assert "seeds [7]" in caplog.text
    monkeypatch.undo()
    backend.step(actions, active)
    assert backend.states.executed[0] == 0
    backend.reset([task.EpisodeSpec(7)])
    assert backend.states.lost.tolist() == [0]
    backend.close()


def test_batch_backend_refuses_what_it_cannot_do():
    with pytest.raises(SimulationError, match="one environment on the CPU"):
        BatchPhysics(sim_config(), 2)
    backend = BatchPhysics(sim_config(num_envs=1), 1)
    with pytest.raises(SimulationError, match="nominal"):
        backend.reset([perturbation("friction").draw(0).spec])
    backend.close()
