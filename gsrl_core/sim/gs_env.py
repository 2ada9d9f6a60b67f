"""The vectorised environment: physics on all cores, pictures by splats, one frame per action chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import rigid_motions
from gsrl_core.interfaces import Observation, Rasterizer, Step
from gsrl_core.sections import RealismConfig, SimConfig
from gsrl_core.sim import fr3
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.perturb import Episode, Perturbation
from gsrl_core.sim.pool import Physics, Pool
from gsrl_core.sim.privileged import privileged
from gsrl_core.sim.realism import Realism
from gsrl_core.sim.settings import WorldSettings, action_dim
from gsrl_core.sim.states import PARTS
from gsrl_core.sim.task import body_names
from gsrl_core.sim.tasks import configured_task, told_instruction
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.scene import Scene

_PIXELS_AT_ONCE = 1 << 27
"""436 pictures of 640 x 480. With depth, alpha and body ids they take 1.7 GB before they are reduced."""


def make_env(
    sim: SimConfig,
    scene: Scene,
    rasterizer: Rasterizer,
    num_envs: int | None = None,
    perturbation: Perturbation | None = None,
) -> GsVecEnv:
    """Build the environment that ``sim`` describes.

    Args:
        sim: task, physics, cameras, realism.
        scene: splats of the bench, the robot and the objects; pictures and tensors are on its device.
        rasterizer: draws it.
        num_envs: overrides ``sim.num_envs``.
        perturbation: disturbs every episode; none is nominal.

    Raises:
        SimulationError: unknown or impossible task, unknown body, camera link or control mode, a lens or background
            that cannot be drawn, or physics that this machine lacks.
        WorkerError: a physics process could not be started.
    """
    played = configured_task(sim)
    count = sim.num_envs if num_envs is None else num_envs
    if count < 1:
        raise SimulationError(f"num_envs is {count}; at least 1 is needed")
    _check_bodies(scene, body_names(played))
    disturbed = (perturbation or Perturbation()).for_task(played.rewordings)
    rig = CameraRig(sim.cameras, sim.render_downscale, sim.render_supersample)
    realism = Realism(disturbed.realism_over(sim.realism), scene, rig.rays(), scene.gaussians.means.device)
    return GsVecEnv(sim, scene, rasterizer, rig, make_physics(sim, count), disturbed, realism)


def make_physics(sim: SimConfig, num_envs: int) -> Physics:
    """The configured physics backend for ``num_envs`` environments. Raises SimulationError, WorkerError."""
    if sim.physics_backend == "physx_cuda":
        from gsrl_core.sim.batch import BatchPhysics  # ManiSkill, many seconds

        return BatchPhysics(sim, num_envs)
    rates = (sim.sim_hz, sim.control_hz, sim.control_mode, sim.solver_iterations)
    settings = WorldSettings(fr3.prepare_urdf(), *rates, sim.task, sim.task_options)
    return Pool(settings, num_envs, sim.max_episode_steps, sim.workers)


class GsVecEnv:
    """B environments in one scene; see :class:`gsrl_core.interfaces.VecEnv` for the contract."""

    def __init__(
        self,
        sim: SimConfig,
        scene: Scene,
        rasterizer: Rasterizer,
        rig: CameraRig,
        physics: Physics,
        perturbation: Perturbation,
        realism: Realism | None = None,
    ) -> None:
        self.num_envs = len(physics.states.qpos)
        self.action_dim = action_dim(sim.control_mode)
        self.control_hz = float(sim.control_hz)
        self.max_episode_steps = sim.max_episode_steps
        self.device = scene.gaussians.means.device
        played = configured_task(sim)
        self._instruction = told_instruction(sim, played)
        self._objects = tuple(thing.name for thing in played.bodies)
        self._scene = scene
        self._rasterizer = rasterizer
        self._rig = rig
        self._realism = realism or Realism(RealismConfig(), scene, rig.rays(), self.device)
        self._physics = physics
        self._perturbation = perturbation
        self.bodies = body_names(played)
        """Names of the bodies of :meth:`body_poses`."""
        self._bodies = torch.tensor([self.bodies.index(name) for name in scene.names], dtype=torch.long)
        self._episodes: list[Episode] = []
        self._camera_motion = torch.eye(4).repeat(self.num_envs, 1, 1)
        self._pictures = {
            name: torch.zeros(self.num_envs, *size, 3, dtype=torch.uint8, device=self.device)
            for name, size in rig.sizes().items()
        }

    # ------------------------------------------------------------------ VecEnv
    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start one episode per seed. Raises SimulationError for a wrong number of seeds or a negative one."""
        if len(seeds) != self.num_envs:
            raise SimulationError(f"reset: {len(seeds)} seeds for {self.num_envs} environments; give one each")
        if min(seeds) < 0:
            raise SimulationError(f"reset: seed {min(seeds)} is negative; seeds are 0 or more")
        self._episodes = [self._perturbation.draw(int(seed)) for seed in seeds]
        jitter = self._realism.begin([int(seed) for seed in seeds])
        turns, shifts = ([getattr(e, name) for e in self._episodes] for name in ("camera_turn", "camera_shift"))
        self._camera_motion = jitter @ rigid_motions(turns, shifts)
        self._physics.reset([episode.spec for episode in self._episodes])
        self._draw(torch.arange(self.num_envs))
        return self._observation()

    def step_chunk(self, actions: Tensor) -> Step:
        """Execute a chunk, float32 [B, H, A] in control units.

        Raises:
            SimulationError: wrong shape, a number that is not finite in a running environment, or no episode yet.
            WorkerError: a physics process died again after every restart, or raised something unexpected; the
                environment is then closed. (One that dies now and then only costs episodes: ``Step.lost``.)
        """
        self._check_actions(actions)
        states = self._physics.states
        before = states.success.astype(bool)
        active = ~self._done()
        if active.any():
            horizon = min(actions.shape[1], self.max_episode_steps - int(states.elapsed[active].max()))
            chunk = actions[:, :horizon].detach().to("cpu", torch.float32).numpy()
            self._physics.step(chunk, active)
            self._draw(torch.from_numpy(np.flatnonzero(active)))
        else:
            states.executed[:] = 0
        success = states.success.astype(bool)
        return Step(
            observation=self._observation(),
            reward=self._tensor((success & ~before).astype(np.float32)),
            terminated=self._tensor(success),
            truncated=self._tensor(self._done() & ~success),
            success=self._tensor(success),
            success_seed=self._tensor(states.success_seed.astype(bool)),
            executed=self._tensor(states.executed.astype(np.int64)),
            lost=self._tensor(states.lost.astype(bool)),
        )

    def render_video_frame(self) -> Tensor:
        """The first camera's current pictures, uint8 [B, h, w, 3]."""
        return self._pictures[self._rig.first].clone()

    def close(self) -> None:
        """Stop the physics processes; calling it again does nothing."""
        self._physics.close()

    def __enter__(self) -> GsVecEnv:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ beyond VecEnv
    def privileged(self) -> dict[str, Tensor]:
        """The true state, for experts and metrics; see :func:`gsrl_core.sim.privileged.privileged`."""
        return privileged(self._physics.states, self._objects)

    def body_poses(self) -> Tensor:
        """Poses of ``bodies`` in the world, float32 [B, M, 4, 4] on the CPU."""
        return torch.from_numpy(self._physics.states.body_to_world.copy())

    def cameras(self) -> dict[str, Camera]:
        """Camera name -> the pinhole cameras of the current pictures, on the CPU; leading size 1 or B."""
        return self._rig.cameras(self.body_poses(), self._camera_motion)

    def success_parts(self) -> dict[str, Tensor]:
        """The parts of strict success as they are now: bool [B] each."""
        parts = self._tensor(self._physics.states.parts.astype(bool))
        return {name: parts[:, i] for i, name in enumerate(PARTS)}

    def frames(self) -> dict[str, Frames]:
        """Camera name -> the current pictures with depth, alpha and body id; drawn on request, not kept.

        ``rgb`` are the pictures of the observation. The others are those of the scene: realism changes them only by the
        cameras' poses and lenses. ``body_id`` counts ``Scene.names``.

        Raises:
            SimulationError: no episode yet.
        """
        if not self._episodes:
            raise SimulationError("frames before reset; start episodes first")
        return self._render(torch.arange(self.num_envs), extras=True)

    def pictures_by(self, rasterizer: Rasterizer) -> dict[str, Tensor]:
        """The current pictures as another rasterizer draws them, with lens and realism; see :class:`Observation`.

        Raises:
            SimulationError: no episode yet.
        """
        if not self._episodes:
            raise SimulationError("pictures before reset; start episodes first")
        drawn = self._render(torch.arange(self.num_envs), extras=False, rasterizer=rasterizer)
        return {name: frames.rgb for name, frames in drawn.items()}

    def instructions(self) -> list[str]:
        """The current episodes' sentences. Before the first reset: the task's own."""
        if not self._episodes:
            return [self._instruction] * self.num_envs
        return [episode.instruction or self._instruction for episode in self._episodes]

    def elapsed_steps(self) -> Tensor:
        """Control steps since the reset, int64 [B]."""
        return self._tensor(self._physics.states.elapsed.astype(np.int64))

    # ------------------------------------------------------------------ inside
    def _draw(self, envs: Tensor) -> None:
        """Renew the pictures of the environments ``envs`` (int64 [b])."""
        # Pictures that are drawn enlarged and reduced one group after another need no room for all at once.
        together = max(1, _PIXELS_AT_ONCE // self._rig.drawn_pixels())
        for part in envs.split(together):
            for name, frames in self._render(part, extras=False).items():
                self._pictures[name][part.to(self.device)] = frames.rgb

    def _render(self, envs: Tensor, *, extras: bool, rasterizer: Rasterizer | None = None) -> dict[str, Frames]:
        """Finished pictures of the environments ``envs`` (int64 [b], on the CPU) as they are now."""
        states, realism = self._physics.states, self._realism
        body_to_world = torch.from_numpy(states.body_to_world[envs.numpy()])
        elapsed = states.elapsed[envs.numpy()]
        gain = torch.stack([self._episodes[i].gain for i in envs.tolist()])
        tinted = bool((gain != 1).any())
        # On the CPU, where a rasteriser can compare them with those of the last frame.
        cameras = self._rig.cameras(body_to_world, self._camera_motion[envs])
        poses = body_to_world[:, self._bodies]
        with_extras = extras or realism.needs_extras
        drawn = (rasterizer or self._rasterizer).render(self._scene, poses.to(self.device), cameras, extras=with_extras)
        finished = {}
        for name, frames in drawn.items():
            seen = self._rig.finished(name, _on(frames, self.device))
            rgb = realism.on_scene(name, seen, cameras[name].to(self.device), poses, envs)
            rgb = _tinted(rgb, gain.to(self.device)) if tinted else rgb
            rgb = realism.on_sensor(name, rgb, elapsed, envs)
            finished[name] = replace(seen, rgb=rgb)
        return finished

    def _observation(self) -> Observation:
        return Observation(
            rgb={name: picture.clone() for name, picture in self._pictures.items()},
            state=self._tensor(self._physics.states.qpos),
            instruction=tuple(self.instructions()),
        )

    def _done(self) -> np.ndarray:
        states = self._physics.states
        return (states.success | states.lost).astype(bool) | (states.elapsed >= self.max_episode_steps)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def _check_actions(self, actions: Tensor) -> None:
        if not self._episodes:
            raise SimulationError("step_chunk before reset; start episodes first")
        shape = tuple(actions.shape)
        if len(shape) != 3 or shape[0] != self.num_envs or shape[2] != self.action_dim or not shape[1]:
            raise SimulationError(f"actions {shape}; expected [{self.num_envs}, H >= 1, {self.action_dim}]")
        running = torch.from_numpy(~self._done()).to(actions.device)
        if not torch.isfinite(actions[running]).all():
            raise SimulationError("actions hold numbers that are not finite; the policy diverged")


def _tinted(rgb: Tensor, gain: Tensor) -> Tensor:
    return (rgb.float() * gain[:, None, None, :]).round().clamp(0, 255).to(torch.uint8)


def _on(frames: Frames, device: torch.device) -> Frames:
    return Frames(
        *(None if t is None else t.to(device) for t in (frames.rgb, frames.depth, frames.alpha, frames.body_id))
    )


def _check_bodies(scene: Scene, moved: tuple[str, ...]) -> None:
    if unknown := [name for name in scene.names if name not in moved]:
        raise SimulationError(
            f"the scene has bodies {unknown} that physics does not move; allowed: {', '.join(moved)}. Was it assembled "
            "for another task? Assemble it again for sim.task"
        )
