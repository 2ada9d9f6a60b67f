import gymnasium as gym
import numpy as np
import pytest
import torch
from sapien import render
from sim_helpers import BODIES, PUT, PoseRasterizer, empty_scene, sim_config, skip_without_vulkan

import gsrl_core.sim.gym_ids  # noqa: F401 (registers)
from gsrl_core.errors import SimulationError
from gsrl_core.sim import gym_adapter
from gsrl_core.splat.scene import Scene


def make(num_envs=2, gs=None, **kwargs):
    """The seed's own call, with a scene and a rasterizer in place of its asset folder."""
    gs_kwargs = {
        "render_interface": "gs_rlinf",
        "cache_table": True,
        "render_bs": 1,
        "device": "cpu",
        "scene": empty_scene(),
        "rasterizer": PoseRasterizer(),
        "sim": sim_config(workers=2, cameras=(sim_config().cameras[0].model_copy(update={"width": 64, "height": 48}),)),
    }
    return gym.make(
        "GSEnv-PutCubeOnPlate-v0",
        **{
            "robot_uids": "my_franka",
            "render_mode": "rgb_array",
            "reward_mode": "sparse",
            "num_envs": num_envs,
            "control_mode": "pd_ee_target_delta_pose",
            "obs_mode": "state",
            "disable_env_checker": True,
            "gs_kwargs": gs_kwargs | (gs or {}),
        }
        | kwargs,
    )


@pytest.fixture(scope="module")
def env():
    env = make()
    yield env
    env.close()


def test_the_seeds_drive_loop_runs(env):
    observation, info = env.reset(seed=0)
    assert not info["success"].any()
    for _ in range(3):
        image = observation["sensor_data"]["3rd_view_camera"]["rgb"]
        assert image.numpy().shape == (2, 48, 64, 3)
        assert image.dtype == torch.uint8
        assert observation["agent"]["qpos"].shape == (2, 9)
        action = torch.randn((env.unwrapped.num_envs, 7), device=env.unwrapped.device) * 0.02
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward.shape == terminated.shape == truncated.shape == info["success"].shape == (2,)
    assert info["elapsed_steps"].tolist() == [3, 3]
    assert env.unwrapped.get_language_instruction() == ["pick up the cube and put it on the plate"] * 2
    assert env.action_space.shape == (2, 7)
    assert env.unwrapped.single_action_space.shape == (7,)
    assert env.render().shape == (2, 48, 64, 3)


def test_default_pictures_are_the_seeds_size():
    env = make(num_envs=1, gs={"sim": sim_config(cameras=type(sim_config())().cameras)})
    observation, _ = env.reset(seed=0)
    assert observation["sensor_data"]["3rd_view_camera"]["rgb"].shape == (1, 480, 640, 3)
    env.close()


def test_seeds_and_reset_ids_fix_the_episode(env):
    def qpos(**kwargs):
        return env.reset(**kwargs)[0]["agent"]["qpos"]

    first = qpos(seed=[3, 4])
    assert torch.equal(qpos(seed=3), first)
    assert torch.equal(qpos(seed=99, options={"reset_state_ids": torch.tensor([3, 4])}), first)
    assert not torch.equal(qpos(), qpos())
    with pytest.raises(SimulationError, match="together"):
        env.reset(seed=1, options={"env_idx": torch.tensor([0])})
    with pytest.raises(SimulationError, match="seeds"):
        env.reset(seed=[1, 2, 3])


def test_the_expert_scores_through_the_adapter(env):
    env.reset(seed=0)
    base, expert, total = env.unwrapped, PUT.expert(), torch.zeros(2)
    for _ in range(100):
        _, reward, terminated, truncated, info = env.step(expert(base._env.privileged()))
        total += reward
        if (terminated | truncated).all():
            break
    assert info["success"].all()
    assert info["success_seed"].all()
    assert total.tolist() == [1.0, 1.0]
    assert base.evaluate()["success"].all()


def test_reward_mode_none_and_a_single_unbatched_action():
    env = make(num_envs=1, reward_mode="none")
    env.reset(seed=0)
    _, reward, *_ = env.step(np.zeros(7, np.float32))
    assert reward.tolist() == [0.0]
    env.close()


KEYS = {"gs_rlinf": {"rgb"}, "gs": {"gs"}, "env": {"env"}, "env+gs": {"env", "gs"}}
"""render_interface -> keys of the seed's sensor_data that have a picture."""


@pytest.mark.parametrize("interface", KEYS)
def test_the_seeds_four_interfaces(interface):
    if "env" in interface:
        skip_without_vulkan()
    small = sim_config().cameras[0].model_copy(update={"width": 64, "height": 48})
    wrist = small.model_copy(update={"name": "wrist", "link": "fr3_hand"})
    env = make(gs={"render_interface": interface, "sim": sim_config(cameras=(small, wrist))})
    observation, _ = env.reset(seed=0)
    after = env.step(np.zeros((2, 7), np.float32))[0]["sensor_data"]
    for data in (observation["sensor_data"], after):
        assert set(data) == {"3rd_view_camera", "wrist"}
        for pictures in data.values():
            assert set(pictures) == ({"rgb"} if interface == "gs_rlinf" else {"gs", "env"})
            shown = {key: picture for key, picture in pictures.items() if picture is not None}
            assert set(shown) == KEYS[interface]
            assert all(p.shape == (2, 48, 64, 3) and p.dtype == torch.uint8 for p in shown.values())
    rendered = env.render()
    if interface == "gs_rlinf":
        assert torch.equal(rendered, after["3rd_view_camera"]["rgb"])
    else:
        assert rendered == after["3rd_view_camera"]
    env.close()


def test_env_needs_no_scene_and_shows_the_same_as_beside_splats(monkeypatch):
    """Two names of one picture; and it shows the cube where the physics has it."""
    skip_without_vulkan()
    monkeypatch.delenv("GSRL_SCENE", raising=False)
    sim = sim_config(cameras=(type(sim_config())().cameras[0],), render_downscale=2)
    alone = make(gs={"render_interface": "env", "scene": None, "rasterizer": None, "sim": sim})
    both = make(gs={"render_interface": "env+gs", "sim": sim})
    first, second = (e.reset(seed=[5, 6])[0]["sensor_data"]["3rd_view_camera"]["env"] for e in (alone, both))
    assert torch.equal(first, second)
    camera, poses = alone.unwrapped._env.cameras()["3rd_view_camera"], alone.unwrapped._env.body_poses()
    for picture, pose in zip(first.float(), poses[:, BODIES.index("cube")], strict=True):
        red = picture[..., 0] > 2 * picture[..., 1:].amax(dim=-1) + 20
        found = torch.nonzero(red).float().mean(dim=0).flip(0) + 0.5
        assert (found - camera.project(pose[None, :3, 3])[0][0, 0]).abs().max() < 1.5
    for e in (alone, both):
        e.close()


def test_env_without_vulkan_says_what_to_install(monkeypatch):
    def nothing():
        raise RuntimeError("failed to find a rendering device")

    monkeypatch.setattr(render, "RenderSystem", nothing)
    with pytest.raises(SimulationError, match=r"apt-get install libvulkan1 mesa-vulkan-drivers"):
        make(gs={"render_interface": "env"})


def test_render_before_reset_says_so():
    env = make(num_envs=1, gs={"render_interface": "gs"})
    with pytest.raises(SimulationError, match="reset"):
        env.unwrapped.render()
    env.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"obs_mode": "pointcloud"}, "'state', 'rgb'"),
        ({"robot_uids": "panda"}, "my_franka"),
        ({"reward_mode": "dense"}, "'only_success'"),
        ({"render_mode": "depth_array"}, "rgb_array"),
        ({"sim_backend": "cuda"}, "physx_cuda"),
        ({"control_mode": "pd_joint_vel"}, "pd_ee_target_delta_pose"),
        ({"gs": {"render_interface": "rgb"}}, r"'env', 'gs', 'env\+gs', 'gs_rlinf'"),
        ({"gs": {"cache_table": "yes"}}, "cache_table"),
        ({"sim_config": {"sim_frq": 500}}, "allowed: sim_freq, control_freq"),
        ({"gs": {"back_ground_file": "x.jpg"}}, "back_ground_file"),
        ({"gs": {"rendr_bs": 4}}, "rendr_bs"),
        ({"gs": {"scene": None}}, "scene"),
    ],
)
def test_unsupported_values_say_what_is_allowed(kwargs, message):
    with pytest.raises(SimulationError, match=message):
        make(**kwargs)


def test_a_named_rasterizer_draws_on_the_named_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Scene, "to", lambda scene, device: scene)
    monkeypatch.setattr("gsrl_core.splat.raster.make_rasterizer", lambda *arguments: asked.append(arguments))
    options = {"scene": empty_scene(), "rasterizer": "cuda", "device": "cuda:1"}
    gym_adapter._scene_and_rasterizer(options, sim_config())
    assert asked == [("cuda", torch.device("cuda", 1))]
