"""``gym.make("GSEnv-PutCubeOnPlate-v0", ...)``: the seed's environment interface on top of :class:`GsVecEnv`.

Code written for ManiSkill-GS (RLinf's ``env_type: maniskill`` among it) finds the same keyword arguments, observation
dictionary and return values. Importing this module registers the names of all tasks; :func:`register` adds one more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.interfaces import Observation, Rasterizer
from gsrl_core.sections import SimConfig
from gsrl_core.sim import fr3, task
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.sim.tasks import DEFAULT, NAMES, load_task
from gsrl_core.splat.scene import Scene, load_scene

_GS_KEYS = ("render_interface", "cache_table", "render_bs", "device", "back_ground_file", "scene", "rasterizer", "sim")


class GSEnvAdapter(gymnasium.Env):
    """Batched like a ManiSkill environment: tensors with a leading ``num_envs``, no automatic reset."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": task.CONTROL_HZ}

    def __init__(
        self,
        *,
        task_reference: str = DEFAULT,
        num_envs: int = 1,
        obs_mode: str = "rgb",
        reward_mode: str = "sparse",
        control_mode: str = "pd_ee_target_delta_pose",
        robot_uids: str = fr3.ROBOT_UID,
        render_mode: str | None = "rgb_array",
        sim_backend: str = "auto",
        max_episode_steps: int = task.MAX_EPISODE_STEPS,
        gs_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the environment.

        Args:
            task_reference: see :func:`gsrl_core.sim.tasks.load_task`; the registered names bring theirs.
            num_envs: B.
            obs_mode: ``state``, ``rgb`` or ``sensor_data``; as in the seed the dictionary always carries both.
            reward_mode: ``sparse`` or ``only_success`` (+1 on first success), ``none`` (zeros).
            control_mode: one of ``settings.CONTROL_MODES``.
            robot_uids: ``my_franka``.
            render_mode: ``rgb_array`` or none.
            sim_backend: ``auto``, ``physx_cpu`` or ``physx_cuda``.
            max_episode_steps: control steps before truncation.
            gs_kwargs: ``render_interface`` (``gs_rlinf`` or ``gs``), ``device``, ``scene`` (folder or Scene),
                ``rasterizer`` (name or Rasterizer), ``sim`` (a SimConfig whose physics, cameras and
                task options are used).
                ``cache_table`` must be true and ``render_bs`` is any size: the background is always cached and
                rendering is always batched. ``back_ground_file`` must be none: the scene brings its background.

        Raises:
            SimulationError: a value that the adapter does not support; the message lists those that it does.
        """
        options = dict(gs_kwargs or {})
        unknown = sorted(set(options) - set(_GS_KEYS))
        if unknown:
            raise SimulationError(f"GSEnv: gs_kwargs has unknown keys {unknown}; allowed: {', '.join(_GS_KEYS)}")
        _check("obs_mode", obs_mode, ("state", "rgb", "sensor_data"))
        _check("reward_mode", reward_mode, ("sparse", "only_success", "none"))
        _check("robot_uids", robot_uids, (fr3.ROBOT_UID,))
        _check("render_mode", render_mode, ("rgb_array", None))
        _check("sim_backend", sim_backend, ("auto", "physx_cpu", "physx_cuda"))
        # env and env+gs ask for SAPIEN's own renderer, which would need visual shapes and Vulkan.
        _check("gs_kwargs.render_interface", options.get("render_interface", "gs_rlinf"), ("gs_rlinf", "gs"))
        _check("gs_kwargs.cache_table", options.get("cache_table", True), (True,))
        _check("gs_kwargs.back_ground_file", options.get("back_ground_file"), (None,))
        sim: SimConfig = options.get("sim") or SimConfig()
        changes = {"task": task_reference, "control_mode": control_mode, "max_episode_steps": max_episode_steps}
        if sim_backend != "auto":
            changes["physics_backend"] = sim_backend
        scene, rasterizer = _scene_and_rasterizer(options, sim)
        self._env: GsVecEnv = make_env(sim.model_copy(update=changes), scene, rasterizer, num_envs=num_envs)
        self._image_key = "rgb" if options.get("render_interface", "gs_rlinf") == "gs_rlinf" else "gs"
        self._rewards = reward_mode != "none"
        self._seeds = np.random.Generator(np.random.PCG64())
        self.num_envs = num_envs
        self.device = self._env.device
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        bound = np.full(self._env.action_dim, fr3.DELTA_LIMIT, dtype=np.float32)
        bound[-1] = 1.0
        self.single_action_space = spaces.Box(-bound, bound, dtype=np.float32)
        shape = (num_envs, *bound.shape)
        self.action_space = spaces.Box(np.broadcast_to(-bound, shape), np.broadcast_to(bound, shape), dtype=np.float32)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start new episodes in all environments.

        Args:
            seed: one per environment, or one integer s, which gives s, s + 1, ...; none draws fresh ones.
            options: ``episode_id`` or ``reset_state_ids`` (one integer per environment) act as seeds, so that fixed
                reset states are fixed. ``env_idx`` is refused: all environments restart together.

        Raises:
            SimulationError: a partial reset, or a wrong number of seeds.
        """
        options = dict(options or {})
        given = options.get("env_idx")
        if given is not None and len(given) != self.num_envs:
            raise SimulationError(f"reset of {len(given)} of {self.num_envs} environments; all restart together")
        ids = options.get("episode_id", options.get("reset_state_ids"))
        observation = self._env.reset(self._seed_list(seed if ids is None else ids))
        return self._observation(observation), self._info(torch.zeros(self.num_envs, dtype=torch.bool))

    def step(self, action: Tensor | np.ndarray) -> tuple[dict[str, Any], Tensor, Tensor, Tensor, dict[str, Any]]:
        """One control step with ``action`` [num_envs, A] (or [A] for a single environment)."""
        tensor = torch.as_tensor(action, dtype=torch.float32)
        if tensor.ndim == 1 and self.num_envs == 1:
            tensor = tensor[None]
        if tensor.ndim != 2:
            raise SimulationError(f"action {tuple(tensor.shape)}; expected [{self.num_envs}, {self._env.action_dim}]")
        step = self._env.step_chunk(tensor[:, None])
        reward = step.reward if self._rewards else torch.zeros_like(step.reward)
        info = self._info(step.success)
        info["success_seed"] = step.success_seed
        info["lost"] = step.lost
        return self._observation(step.observation), reward, step.terminated, step.truncated, info

    def evaluate(self) -> dict[str, Tensor]:
        """Strict success and its parts as they are now, bool [num_envs]."""
        parts = self._env.success_parts()
        return parts | {"success": torch.stack(list(parts.values())).all(dim=0)}

    def get_language_instruction(self) -> list[str]:
        """One sentence per environment."""
        return self._env.instructions()

    def render(self) -> Tensor:
        """The first camera, uint8 [num_envs, h, w, 3]."""
        return self._env.render_video_frame()

    def close(self) -> None:
        """Stop the physics processes."""
        self._env.close()

    @property
    def elapsed_steps(self) -> Tensor:
        """Control steps since the reset, int64 [num_envs]."""
        return self._env.elapsed_steps()

    def _seed_list(self, seed: Any) -> list[int]:
        if seed is None:
            return self._seeds.integers(2**31, size=self.num_envs).tolist()
        if np.ndim(seed) == 0:
            return [int(seed) + i for i in range(self.num_envs)]
        return [int(value) for value in seed]

    def _observation(self, observation: Observation) -> dict[str, Any]:
        # As in the seed the pictures are on the CPU.
        return {
            "agent": {"qpos": observation.state, "qvel": self._env.privileged()["qvel"].to(self.device)},
            "extra": {},
            "sensor_param": {},
            "sensor_data": {name: {self._image_key: image.cpu()} for name, image in observation.rgb.items()},
        }

    def _info(self, success: Tensor) -> dict[str, Any]:
        return {"elapsed_steps": self.elapsed_steps, "success": success.to(self.device), **self._env.success_parts()}


def _scene_and_rasterizer(options: Mapping[str, Any], sim: SimConfig) -> tuple[Scene, Rasterizer]:
    scene = options.get("scene")
    if scene is None:
        raise SimulationError(
            "gs_kwargs.scene is missing; give the scene folder that `real2sim2real run` assembled, or a Scene"
        )
    scene = scene if isinstance(scene, Scene) else load_scene(Path(scene))
    device = torch.device(options.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SimulationError(f"gs_kwargs.device is {str(device)!r}, but there is no CUDA device; use 'cpu'")
    rasterizer = options.get("rasterizer", sim.rasterizer)
    if isinstance(rasterizer, str):
        from gsrl_core.splat.raster import make_rasterizer  # numba or gsplat

        rasterizer = make_rasterizer(rasterizer)
    return scene.to(device), rasterizer


def _check(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise SimulationError(f"GSEnv: {name}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def register(reference: str) -> str:
    """Register ``GSEnv-<name>`` for a task (``FILE.py:CLASS`` for one of your own) and return this id."""
    env_id = f"GSEnv-{load_task(reference).name}"
    gymnasium.register(
        env_id,
        entry_point=f"{__name__}:GSEnvAdapter",
        disable_env_checker=True,
        order_enforce=False,
        kwargs={"task_reference": reference},
    )
    return env_id


for _name in NAMES:
    register(_name)
