import numpy as np
import pytest
import torch
from sim_helpers import BODIES, PUT, TINY_CAMERA, PoseRasterizer, empty_scene, sim_config

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import quat_to_matrix
from gsrl_core.sections import CameraConfig
from gsrl_core.sim import task
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.perturb import Perturbation, perturbation


@pytest.fixture(scope="module")
def env():
    """Shared by tests that neither close nor break it."""
    with make_env(sim_config(), empty_scene(), PoseRasterizer()) as env:
        yield env


def idle(env, horizon=1):
    actions = torch.zeros(env.num_envs, horizon, env.action_dim)
    actions[..., -1] = 1
    return actions


def test_observation_has_the_contracts_shapes(env):
    observation = env.reset([1, 2])
    image = observation.rgb["3rd_view_camera"]
    assert image.shape == (2, 24, 32, 3)
    assert image.dtype == torch.uint8
    assert observation.state.shape == (2, 9)
    assert observation.state.dtype == torch.float32
    np.testing.assert_allclose(observation.state[0], PUT.start(task.EpisodeSpec(1)).qpos, atol=1e-6)
    assert observation.instruction == ("pick up the cube and put it on the plate",) * 2
    assert (env.num_envs, env.action_dim, env.control_hz, env.max_episode_steps) == (2, 7, 10.0, 100)


def test_one_frame_is_drawn_per_chunk(env):
    env.reset([1, 2])
    drawn = env._rasterizer.calls
    drawn.clear()
    step = env.step_chunk(idle(env, 5))
    assert len(drawn) == 1
    assert step.executed.tolist() == [5, 5]
    assert env.elapsed_steps().tolist() == [5, 5]
    assert torch.equal(env.render_video_frame(), step.observation.rgb["3rd_view_camera"])
    assert len(drawn) == 1


def test_the_rasterizer_gets_cameras_as_they_are_on_the_cpu(env, monkeypatch):
    # On a GPU it could not compare them with those of the last frame without waiting.
    moved, to = [], Camera.to

    def remembering(camera, device):
        moved.append(to(camera, device))
        return moved[-1]

    monkeypatch.setattr(Camera, "to", remembering)
    env.reset([1, 2])
    _, cameras = env._rasterizer.calls[-1]
    assert moved and not any(camera is other for camera in cameras.values() for other in moved)


def test_bodies_reach_the_rasterizer_in_the_scenes_order():
    names = ("plate", "cube", "fr3_hand")
    rasterizer = PoseRasterizer()
    with make_env(sim_config(num_envs=1), empty_scene(names), rasterizer) as env:
        env.reset([4])
        poses, _ = rasterizer.calls[-1]
        expected = env.body_poses()[:, [BODIES.index(name) for name in names]]
        assert torch.equal(poses, expected)
    with pytest.raises(SimulationError, match="mug"):
        make_env(sim_config(), empty_scene(("mug",)), rasterizer)


def test_success_ends_an_episode_inside_a_chunk_and_freezes_it(env):
    expert = PUT.expert()
    env.reset([1, 2])
    total = torch.zeros(2)
    for _ in range(100):
        action = expert(env.privileged())
        action[1] = torch.tensor([0, 0, 0, 0, 0, 0, 1.0])
        step = env.step_chunk(action[:, None])
        total += step.reward
        if step.success[0]:
            break
    assert step.terminated.tolist() == [True, False]
    assert step.success_seed[0]
    assert total.tolist() == [1.0, 0.0]
    length = int(env.elapsed_steps()[0])
    before, picture = env.body_poses(), step.observation.rgb["3rd_view_camera"].clone()
    later = env.step_chunk(torch.full((2, 5, 7), 0.03))
    assert later.executed.tolist() == [0, 5]
    assert later.reward.tolist() == [0.0, 0.0]
    assert later.success.tolist() == [True, False]
    assert torch.equal(env.body_poses()[0], before[0])
    assert not torch.equal(env.body_poses()[1], before[1])
    assert torch.equal(later.observation.rgb["3rd_view_camera"][0], picture[0])
    # Only the environment that is still running was drawn.
    assert len(env._rasterizer.calls[-1][0]) == 1
    assert int(env.elapsed_steps()[0]) == length


def test_a_chunk_that_contains_success_is_cut_there(env):
    """Replaying an expert episode in chunks of 7 ends at the same step with the same state."""
    env.reset([1, 2])
    expert, actions = PUT.expert(), []
    while True:
        actions.append(expert(env.privileged()))
        step = env.step_chunk(actions[-1][:, None])
        if step.terminated.all():
            break
    lengths, poses = env.elapsed_steps(), env.body_poses()
    env.reset([1, 2])
    recorded = torch.stack(actions, dim=1)
    reward = torch.zeros(2)
    for start in range(0, recorded.shape[1], 7):
        step = env.step_chunk(recorded[:, start : start + 7])
        reward += step.reward
    assert step.success.all()
    assert reward.tolist() == [1.0, 1.0]
    assert torch.equal(env.elapsed_steps(), lengths)
    assert torch.equal(env.body_poses(), poses)


def test_the_time_limit_truncates_and_cuts_the_last_chunk():
    with make_env(sim_config(max_episode_steps=8), empty_scene(), PoseRasterizer()) as env:
        env.reset([1, 2])
        first = env.step_chunk(idle(env, 5))
        assert not first.truncated.any()
        last = env.step_chunk(idle(env, 5))
        assert last.executed.tolist() == [3, 3]
        assert last.truncated.all()
        assert not last.terminated.any()
        after = env.step_chunk(idle(env, 5))
        assert after.executed.tolist() == [0, 0]
        env.reset([1, 2])
        assert env.elapsed_steps().tolist() == [0, 0]


def test_same_seeds_and_actions_give_the_same_bits_in_any_batch():
    def poses(seeds, workers):
        with make_env(sim_config(num_envs=len(seeds), workers=workers), empty_scene(), PoseRasterizer()) as env:
            env.reset(seeds)
            for t in range(4):
                # The action depends on the seed, so that batches can be compared.
                generators = [torch.Generator().manual_seed(1000 * seed + t) for seed in seeds]
                actions = torch.stack([torch.randn(3, 7, generator=g) * 0.02 for g in generators])
                step = env.step_chunk(actions)
            return dict(zip(seeds, zip(env.body_poses(), step.observation.state, strict=True), strict=True))

    alone, together = poses([5], 1), poses([8, 5, 6], 2)
    assert torch.equal(alone[5][0], together[5][0])
    assert torch.equal(alone[5][1], together[5][1])


def test_privileged_state_agrees_with_the_bodies(env):
    env.reset([3, 4])
    state, bodies = env.privileged(), env.body_poses()
    cube = bodies[:, BODIES.index("cube")]
    assert torch.equal(state["cube_pose"][:, :3], cube[:, :3, 3])
    torch.testing.assert_close(quat_to_matrix(state["cube_pose"][:, 3:]), cube[:, :3, :3])
    hand = bodies[:, BODIES.index("fr3_hand")]
    # The TCP is 103.4 mm along the hand's z axis.
    torch.testing.assert_close(state["tcp_pose"][:, :3], hand[:, :3, 3] + 0.1034 * hand[:, :3, 2], atol=1e-5, rtol=0)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "cube_pose": (2, 7),
        "plate_pose": (2, 7),
        "tcp_pose": (2, 7),
        "qpos": (2, 9),
        "qvel": (2, 9),
        "cube_velocity": (2, 6),
        "plate_velocity": (2, 6),
    }


def test_cameras_at_their_own_sizes_fixed_and_on_the_hand():
    wrist = CameraConfig(
        name="wrist",
        width=20,
        height=16,
        fx=20,
        fy=20,
        cx=10,
        cy=8,
        position=(0.05, 0, 0),
        rotation=((0, 0, -1), (0, 1, 0), (1, 0, 0)),
        link="fr3_hand",
    )
    rasterizer = PoseRasterizer()
    with make_env(sim_config(cameras=(TINY_CAMERA, wrist)), empty_scene(), rasterizer) as env:
        observation = env.reset([1, 2])
        assert observation.rgb["wrist"].shape == (2, 16, 20, 3)
        cameras = rasterizer.calls[-1][1]
        assert len(cameras["3rd_view_camera"]) == 1
        assert len(cameras["wrist"]) == 2
        hand = env.body_poses()[:, BODIES.index("fr3_hand")]
        # The camera looks along the hand's z axis from 50 mm along its x axis.
        torch.testing.assert_close(cameras["wrist"].centers, hand[:, :3, 3] + 0.05 * hand[:, :3, 0])
        torch.testing.assert_close(cameras["wrist"].world_to_camera[:, 2, :3], hand[:, :3, 2])
        env.step_chunk(idle(env))
    with pytest.raises(SimulationError, match="fr3_elbow"):
        bad = wrist.model_copy(update={"link": "fr3_elbow"})
        make_env(sim_config(cameras=(bad,)), empty_scene(), rasterizer)


def test_render_downscale_shrinks_picture_and_intrinsics_alike():
    rasterizer = PoseRasterizer()
    with make_env(sim_config(render_downscale=2), empty_scene(), rasterizer) as env:
        assert env.reset([1, 2]).rgb["3rd_view_camera"].shape == (2, 12, 16, 3)
        camera = rasterizer.calls[-1][1]["3rd_view_camera"]
        np.testing.assert_allclose(camera.K[0], [[15, 0, 8], [0, 15, 6], [0, 0, 1]])


def test_lighting_scales_the_channels_of_each_environment():
    bright = Perturbation("bright", gain_range=(2.0, 2.0), white_balance=0.0)
    with make_env(sim_config(), empty_scene(), PoseRasterizer()) as env:
        plain = env.reset([1, 2]).rgb["3rd_view_camera"]
    with make_env(sim_config(), empty_scene(), PoseRasterizer(), perturbation=bright) as env:
        doubled = env.reset([1, 2]).rgb["3rd_view_camera"]
    assert torch.equal(doubled, (plain.int() * 2).clamp(max=255).to(torch.uint8))


def test_camera_jitter_differs_per_environment_and_repeats_per_seed():
    rasterizer = PoseRasterizer()
    with make_env(sim_config(), empty_scene(), rasterizer, perturbation=perturbation("camera")) as env:
        env.reset([1, 2])
        first = rasterizer.calls[-1][1]["3rd_view_camera"].world_to_camera
        env.reset([2, 1])
        swapped = rasterizer.calls[-1][1]["3rd_view_camera"].world_to_camera
    assert len(first) == 2
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[[1, 0]], swapped)


def test_wording_reaches_the_observation():
    with make_env(sim_config(), empty_scene(), PoseRasterizer(), perturbation=perturbation("wording")) as env:
        assert set(env.reset([1, 2]).instruction) <= set(PUT.rewordings)


@pytest.fixture
def fresh():
    with make_env(sim_config(), empty_scene(), PoseRasterizer()) as env:
        yield env


def test_bad_use_is_explained(fresh):
    env = fresh
    with pytest.raises(SimulationError, match="reset"):
        env.step_chunk(idle(env))
    with pytest.raises(SimulationError, match="3 seeds for 2"):
        env.reset([1, 2, 3])
    with pytest.raises(SimulationError, match="negative"):
        env.reset([1, -2])
    env.reset([1, 2])
    with pytest.raises(SimulationError, match=r"\(2, 7\)"):
        env.step_chunk(torch.zeros(2, 7))
    with pytest.raises(SimulationError, match=r"H >= 1, 7"):
        env.step_chunk(torch.zeros(2, 1, 8))
    with pytest.raises(SimulationError, match="finite"):
        env.step_chunk(torch.full((2, 1, 7), torch.nan))
    env.close()
    env.close()
    with pytest.raises(SimulationError, match="closed"):
        env.reset([1, 2])


def test_a_lost_episode_ends_truncated_without_success_and_the_next_reset_works():
    with make_env(sim_config(workers=2), empty_scene(), PoseRasterizer()) as env:
        first = env.reset([1, 2])
        before = env.body_poses()
        env._physics._workers[0].process.kill()
        step = env.step_chunk(idle(env, 2))
        assert step.lost.tolist() == step.truncated.tolist() == [True, False]
        assert not step.success.any() and not step.terminated.any()
        assert step.executed.tolist() == [0, 2]
        assert torch.equal(env.body_poses()[0], before[0])
        assert torch.equal(step.observation.rgb["3rd_view_camera"][0], first.rgb["3rd_view_camera"][0])
        later = env.step_chunk(idle(env, 2))
        assert later.lost.tolist() == [True, False]
        assert later.executed.tolist() == [0, 2]
        again = env.reset([1, 2])
        assert torch.equal(again.state, first.state)
        step = env.step_chunk(idle(env, 2))
        assert not step.lost.any()
        assert step.executed.tolist() == [2, 2]


def test_an_unknown_task_is_explained():
    with pytest.raises(SimulationError, match="PutCubeOnPlate-v0"):
        make_env(sim_config(task="StackCube-v1"), empty_scene(), PoseRasterizer())


def test_gpu_physics_without_gpu_or_library_is_explained(monkeypatch, tmp_path):
    from sapien import physx

    def refused():
        with pytest.raises(SimulationError) as caught:
            make_env(sim_config(physics_backend="physx_cuda"), empty_scene(), PoseRasterizer())
        assert "use physx_cpu" in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refused()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    library = tmp_path / ".sapien" / "physx" / physx.version() / "libPhysXGpu_64.so"
    missing = refused()
    assert f"needs NVIDIA's library at {library}" in missing
    assert "enable_gpu" in missing
    assert not library.parent.exists()  # nothing is downloaded unasked
    library.parent.mkdir(parents=True)
    library.write_bytes(b"half a download")
    assert "cannot be loaded" in refused()
    monkeypatch.setattr(physx, "enable_gpu", lambda: (_ for _ in ()).throw(RuntimeError("PhysX is in use")))
    assert "cannot be enabled (PhysX is in use)" in refused()
