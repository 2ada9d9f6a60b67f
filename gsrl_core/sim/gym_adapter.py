"""``gym.make("GSEnv-PutCubeOnPlate-v0", ...)``: the seed's environment interface on top of :class:`GsVecEnv`.

Code written for ManiSkill-GS (RLinf's ``env_type: maniskill`` among it) finds the same keyword arguments, observation
dictionary and return values. The ids are registered by gym_ids.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from pydantic import ValidationError
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.interfaces import Observation, Rasterizer
from gsrl_core.sections import SimConfig
from gsrl_core.sim import fr3
from gsrl_core.sim.gs_env import GsVecEnv, make_env
from gsrl_core.sim.task import CONTROL_HZ, body_names
from gsrl_core.sim.tasks import DEFAULT, configured_task
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene, load_scene

SCENE_VARIABLE = "GSRL_SCENE"
"""Environment variable with the scene folder, for code that knows only the seed's own arguments."""
_BACKENDS = {"auto": None, "cpu": "physx_cpu", "gpu": "physx_cuda"} | {n: n for n in ("physx_cpu", "physx_cuda")}
_RATES = {"sim_freq": "sim_hz", "control_freq": "control_hz"}
_GS_KEYS = ("render_interface", "cache_table", "render_bs", "device", "back_ground_file", "scene", "rasterizer", "sim")


@dataclass(frozen=True)
class _Robot:
    """As much of ManiSkill's ``env.agent.robot`` as wrappers read."""

    env: GsVecEnv

    def get_qpos(self) -> Tensor:
        """float32 [num_envs, 9]: joints (rad), fingers (m)."""
        return self.env.privileged()["qpos"].to(self.env.device)

    def get_qvel(self) -> Tensor:
        """float32 [num_envs, 9]: rad/s, m/s."""
        return self.env.privileged()["qvel"].to(self.env.device)


@dataclass(frozen=True)
class _Agent:
    robot: _Robot
    uid: str = fr3.ROBOT_UID


class GSEnvAdapter(gymnasium.Env):
    """Batched like a ManiSkill environment: tensors with a leading ``num_envs``, no automatic reset."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

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
        sim_config: Mapping[str, int] | None = None,
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
            sim_backend: ``auto``, ``cpu`` or ``physx_cpu``, ``gpu`` or ``physx_cuda``.
            sim_config: ManiSkill's ``sim_freq`` and ``control_freq`` (Hz).
            gs_kwargs: ``render_interface`` (below), ``device``, ``scene`` (folder or Scene; none: ``$GSRL_SCENE``),
                ``rasterizer`` (name or Rasterizer), ``sim`` (a SimConfig whose physics, cameras, task options and time
                limit are used). ``cache_table`` and ``render_bs`` change nothing: the background is always cached and
                rendering is always batched. ``back_ground_file`` must be none: the scene brings its background. A
                ``max_episode_steps`` that gym.make is given can only be below that of ``sim``.

        ``render_interface`` chooses the pictures, and the keys under which a camera's ``sensor_data`` has them are the
        seed's: ``gs_rlinf`` splats under ``rgb``; ``gs`` splats under ``gs``; ``env`` SAPIEN's own pictures (Vulkan)
        under ``env``; ``env+gs`` both. Of the keys ``gs`` and ``env`` the one that was not asked for holds none.
        ``env`` needs neither ``scene`` nor ``rasterizer`` and ignores them; in SAPIEN's pictures a plain table takes
        the place of the captured bench.

        Raises:
            SimulationError: a value that the adapter does not support (the message lists those that it does), or
                ``env`` or ``env+gs`` without a Vulkan device.
        """
        options = dict(gs_kwargs or {})
        unknown = sorted(set(options) - set(_GS_KEYS))
        if unknown:
            raise SimulationError(f"GSEnv: gs_kwargs has unknown keys {unknown}; allowed: {', '.join(_GS_KEYS)}")
        _check("obs_mode", obs_mode, ("state", "rgb", "sensor_data"))
        _check("reward_mode", reward_mode, ("sparse", "only_success", "none"))
        _check("robot_uids", robot_uids, (fr3.ROBOT_UID,))
        _check("render_mode", render_mode, ("rgb_array", None))
        _check("sim_backend", sim_backend, tuple(_BACKENDS))
        interface = options.get("render_interface", "gs_rlinf")
        _check("gs_kwargs.render_interface", interface, ("env", "gs", "env+gs", "gs_rlinf"))
        _check("gs_kwargs.cache_table", options.get("cache_table", True), (True, False))
        _check("gs_kwargs.back_ground_file", options.get("back_ground_file"), (None,))
        sim: SimConfig = options.get("sim") or SimConfig()
        changes = {"task": task_reference, "control_mode": control_mode, **_rates(sim_config or {})}
        if _BACKENDS[sim_backend]:
            changes["physics_backend"] = _BACKENDS[sim_backend]
        try:
            sim = SimConfig.model_validate(sim.model_dump() | changes)
        except ValidationError as error:
            raise SimulationError(f"GSEnv: {error.errors()[0]['msg']}") from error
        scene, rasterizer, self._second = _pictures(interface, options, sim)
        self._env: GsVecEnv = make_env(sim, scene, rasterizer, num_envs=num_envs)
        self._interface = interface
        self._sensors: dict[str, dict[str, Tensor | None]] = {}
        self._rewards = reward_mode != "none"
        self._seeds = np.random.Generator(np.random.PCG64())
        self.num_envs = num_envs
        self.device = self._env.device
        self.render_mode = render_mode
        self.max_episode_steps = sim.max_episode_steps
        self.control_freq, self.sim_freq = sim.control_hz, sim.sim_hz
        self.obs_mode, self.control_mode = obs_mode, control_mode
        self.agent = _Agent(_Robot(self._env))
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

    def render(self) -> Tensor | dict[str, Tensor | None]:
        """The first camera, uint8 [num_envs, h, w, 3]; with another interface than ``gs_rlinf`` its ``sensor_data``.

        Raises:
            SimulationError: no episode yet, with another interface than ``gs_rlinf``.
        """
        if self._interface == "gs_rlinf":
            return self._env.render_video_frame()
        if not self._sensors:
            raise SimulationError("render before reset; start episodes first")
        return dict(next(iter(self._sensors.values())))

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
        self._sensors = self._sensor_data(observation.rgb)
        return {
            "agent": {"qpos": observation.state, "qvel": self._env.privileged()["qvel"].to(self.device)},
            "extra": {},
            "sensor_param": {},
            "sensor_data": self._sensors,
        }

    def _sensor_data(self, first: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor | None]]:
        """Camera name -> the interface's keys with pictures on the CPU, as in the seed."""
        pictures = {name: image.cpu() for name, image in first.items()}
        if self._interface == "gs_rlinf":
            return {name: {"rgb": image} for name, image in pictures.items()}
        kinds: dict[str, Mapping[str, Tensor]] = {"gs": {}, "env": {}}
        kinds["env" if self._interface == "env" else "gs"] = pictures
        if self._second is not None:
            kinds["env"] = {name: image.cpu() for name, image in self._env.pictures_by(self._second).items()}
        return {name: {kind: images.get(name) for kind, images in kinds.items()} for name in pictures}

    def _info(self, success: Tensor) -> dict[str, Any]:
        return {"elapsed_steps": self.elapsed_steps, "success": success.to(self.device), **self._env.success_parts()}


def _pictures(
    interface: str, options: Mapping[str, Any], sim: SimConfig
) -> tuple[Scene, Rasterizer, Rasterizer | None]:
    """What is drawn, what draws it, and what draws the same bodies a second time for ``env+gs``."""
    if interface == "env":
        names = body_names(configured_task(sim))
        nothing = Scene.from_parts(Gaussians.empty(), {name: (Gaussians.empty(), torch.eye(4)) for name in names})
        return nothing.to(_device(options)), _sapien(sim, names), None
    scene, rasterizer = _scene_and_rasterizer(options, sim)
    return scene, rasterizer, _sapien(sim, scene.names) if interface == "env+gs" else None


def _sapien(sim: SimConfig, names: Sequence[str]) -> Rasterizer:
    from gsrl_core.sim.looks import body_meshes
    from gsrl_core.sim.raster_sapien import SapienRasterizer  # trimesh, Vulkan

    meshes = body_meshes(configured_task(sim))
    return SapienRasterizer({name: mesh for name, mesh in meshes.items() if name in names})


def _device(options: Mapping[str, Any]) -> torch.device:
    device = torch.device(options.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SimulationError(f"gs_kwargs.device is {str(device)!r}, but there is no CUDA device; use 'cpu'")
    return device


def _scene_and_rasterizer(options: Mapping[str, Any], sim: SimConfig) -> tuple[Scene, Rasterizer]:
    scene = options.get("scene") or os.environ.get(SCENE_VARIABLE)
    if not scene:
        raise SimulationError(
            "gs_kwargs.scene is missing; give the scene folder that `real2sim2real assemble` or `run` made, or a "
            f"Scene, or set {SCENE_VARIABLE}"
        )
    scene = scene if isinstance(scene, Scene) else load_scene(Path(scene))
    device = _device(options)
    rasterizer = options.get("rasterizer", sim.rasterizer)
    if isinstance(rasterizer, str):
        from gsrl_core.splat.raster import make_rasterizer  # numba or gsplat

        rasterizer = make_rasterizer(rasterizer, device)
    return scene.to(device), rasterizer


def _rates(sim_config: Mapping[str, int]) -> dict[str, int]:
    if unknown := sorted(set(sim_config) - set(_RATES)):
        raise SimulationError(f"GSEnv: sim_config has unknown keys {unknown}; allowed: {', '.join(_RATES)}")
    return {_RATES[name]: value for name, value in sim_config.items()}


def _check(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise SimulationError(f"GSEnv: {name}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
