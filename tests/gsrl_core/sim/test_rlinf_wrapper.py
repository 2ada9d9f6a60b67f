"""The environment driven as RLinf's ManiSkill wrapper drives the seed's: with the values of its configuration
gsenv_put_cube_on_plate.yaml, reading what the wrapper reads; of ours it knows the id alone."""

import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from sim_helpers import PUT, TINY_CAMERA, PoseRasterizer, empty_scene, sim_config

from gsrl_core.splat.scene import save_scene

INIT_PARAMS = {
    "id": "gsrl_core.sim.gym_ids:GSEnv-PutCubeOnPlate-v0",
    "obs_mode": "state",
    "control_mode": "pd_ee_target_delta_pose",
    "max_episode_steps": 100,
    "robot_uids": "my_franka",
    "render_mode": "rgb_array",
    "disable_env_checker": True,
    "sim_config": {"sim_freq": 100, "control_freq": 10},
    "gs_kwargs": {"render_interface": "gs_rlinf", "cache_table": True, "render_bs": 2, "device": "cpu"},
}
"""RLinf's values but for the module in the id, the physics rate (500 there) and the device."""


class Wrapper:
    """What RLinf does with an environment: resets by ids, chunks step by step, success from info, relative reward."""

    def __init__(self, num_envs, seed=0, ignore_terminations=False, **gs_kwargs):
        params = INIT_PARAMS | {"num_envs": num_envs, "gs_kwargs": INIT_PARAMS["gs_kwargs"] | gs_kwargs}
        self.env, self.seed, self.ignore_terminations = gym.make(**params), seed, ignore_terminations
        base = self.env.unwrapped
        self.num_envs, self.device = base.num_envs, base.device
        generator = torch.Generator().manual_seed(seed)
        self.reset_state_ids = torch.randint(0, 127, (num_envs,), generator=generator).to(self.device)
        self.previous = torch.zeros(num_envs)

    def observe(self, raw):
        image = raw["sensor_data"]["3rd_view_camera"]["rgb"].to(torch.uint8)
        return {
            "main_images": image,
            "states": self.env.unwrapped.agent.robot.get_qpos().to(image.device, dtype=torch.float32),
            "task_descriptions": self.env.unwrapped.get_language_instruction(),
        }

    def reset(self):
        raw, infos = self.env.reset(seed=self.seed, options={"episode_id": self.reset_state_ids})
        self.previous[:] = 0
        self.success_once = torch.zeros(self.num_envs, dtype=torch.bool)
        return self.observe(raw), infos

    def step(self, actions):
        raw, _, terminated, truncated, infos = self.env.step(actions)
        reward = infos["success"] * 1.0
        self.previous, relative = reward, reward - self.previous
        self.success_once |= infos["success"]
        if isinstance(truncated, bool):
            truncated = torch.tensor([truncated]).repeat(self.num_envs)
        if self.ignore_terminations:
            terminated[:] = False
        return self.observe(raw), relative, terminated, truncated, infos

    def chunk_step(self, chunk):
        """``chunk`` [num_envs, 5, 7] -> observation after it, rewards, terminations and truncations [num_envs, 5]."""
        steps = [self.step(chunk[:, i]) for i in range(chunk.shape[1])]
        rewards, terminations, truncations = (torch.stack([step[k] for step in steps], dim=1) for k in (1, 2, 3))
        return steps[-1][0], rewards, terminations, truncations, steps[-1][4]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """A scene where the environment variable says; the picture is as small as it may be."""
    save_scene(tmp_path / "scene", empty_scene())
    monkeypatch.setenv("GSRL_SCENE", str(tmp_path / "scene"))
    return {"rasterizer": PoseRasterizer(), "sim": sim_config(workers=2, cameras=(TINY_CAMERA,))}


def test_an_epoch_of_the_recipe(scene):
    wrapper = Wrapper(4, **scene)
    observation, infos = wrapper.reset()
    assert not infos["success"].any()
    assert observation["main_images"].shape == (4, 24, 32, 3) and observation["main_images"].dtype == torch.uint8
    assert observation["states"].shape == (4, 9) and observation["states"].dtype == torch.float32
    assert observation["task_descriptions"] == ["pick up the cube and put it on the plate"] * 4
    expert, base, total = PUT.expert(), wrapper.env.unwrapped, torch.zeros(4)
    for decision in range(20):
        # One action of the expert, held back for the last environment, which therefore never succeeds.
        chunk = torch.zeros(4, 5, 7)
        chunk[..., 6] = 1.0
        chunk[:3, 0] = expert(base._env.privileged())[:3]
        chunk[:3, 1:, 6] = chunk[:3, :1, 6]
        observation, rewards, terminated, truncated, infos = wrapper.chunk_step(chunk)
        assert rewards.shape == terminated.shape == truncated.shape == (4, 5)
        total += rewards.sum(dim=1)
        assert infos["elapsed_steps"].tolist()[3] == 5 * (decision + 1)
    assert truncated[:, -1].all() and not truncated[:, :-1].any()
    # +1 on entering success, nothing for staying there.
    assert total.tolist() == wrapper.success_once.float().tolist() == infos["success"].float().tolist()
    assert not infos["success"][3]
    wrapper.env.close()


def test_fixed_ids_fix_the_episodes_and_the_evaluation_plays_on_after_success(scene):
    first, second = Wrapper(2, **scene), Wrapper(2, seed=0, ignore_terminations=True, **scene)
    assert torch.equal(first.reset()[0]["states"], second.reset()[0]["states"])
    assert torch.equal(first.reset()[0]["states"], second.reset()[0]["states"])
    expert, base = PUT.expert(), second.env.unwrapped
    for _ in range(100):
        _, _, terminated, truncated, infos = second.step(expert(base._env.privileged()))
        assert not terminated.any()
    assert truncated.all() and infos["success"].all() and second.success_once.all()
    for wrapper in (first, second):
        wrapper.env.close()


@pytest.mark.parametrize("interface", ["gs_rlinf", "gs"])
@pytest.mark.parametrize("cached", [True, False])
def test_the_seeds_arguments(scene, interface, cached):
    given = {"render_interface": interface, "cache_table": cached, "render_bs": 7}
    params = INIT_PARAMS | {"num_envs": 1, "sim_backend": "cpu", "gs_kwargs": INIT_PARAMS["gs_kwargs"] | scene | given}
    env = gym.make(**params)
    raw, _ = env.reset(seed=[3])
    assert set(raw) == {"agent", "extra", "sensor_param", "sensor_data"}
    assert set(raw["sensor_data"]["3rd_view_camera"]) == ({"rgb"} if interface == "gs_rlinf" else {"gs", "env"})
    assert env.unwrapped.obs_mode == "state" and env.unwrapped.agent.uid == "my_franka"
    assert torch.equal(env.unwrapped.agent.robot.get_qpos(), raw["agent"]["qpos"])
    assert (env.unwrapped.sim_freq, env.unwrapped.control_freq) == (100, 10)
    env.close()


def test_the_ids_cost_no_torch():
    script = "import sys, gsrl_core.sim.gym_ids as ids; ids.gymnasium.spec('GSEnv-StackCube-v0'); "
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
