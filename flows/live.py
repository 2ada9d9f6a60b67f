"""The environment at work in the browser: bodies follow the physics in real time, cameras are frustums to jump to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import viser

from flows.viewer import Viewer, _wxyz
from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import rigid_inverse
from gsrl_core.sections import SimConfig
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.tasks import configured_task
from gsrl_core.splat.raster import make_rasterizer
from gsrl_core.splat.scene import Scene

EXPERT, RANDOM, STILL = "scripted expert", "random actions", "nothing"
_PAUSE_SECONDS = 1.0
"""Between the end of an episode and the next."""


class Live:
    """One environment, stepped at its control rate; what the policy would see is drawn by its own rasteriser."""

    def __init__(self, scene: Scene, sim: SimConfig, port: int) -> None:
        """Build the environment and start the server. Raises SimulationError."""
        task = configured_task(sim)
        self.title = task.name
        self._expert = task.expert()
        self._env = make_env(sim, scene, make_rasterizer(sim.rasterizer), num_envs=1)
        try:
            self._viewer = Viewer(scene, port)
        except BaseException:
            self._env.close()
            raise
        self._random, self._seed = np.random.default_rng(0), 0
        self._add_controls()
        self.reset(0)

    @property
    def viewer(self) -> Viewer:
        """The bodies' handles and the server."""
        return self._viewer

    def reset(self, seed: int) -> None:
        """Start the episode of ``seed``."""
        self._seed = seed
        self._show(self._env.reset([seed]).rgb)
        self.status.content = f"seed {seed}"
        self._done = False

    def step(self) -> None:
        """One control step by whoever acts now."""
        step = self._env.step_chunk(self._action()[:, None])
        self._show(step.observation.rgb)
        self._done = bool((step.terminated | step.truncated)[0])
        parts = ", ".join(name for name, value in self._env.success_parts().items() if value[0])
        outcome = "**success**" if step.success[0] else "**time is over**" if self._done else ""
        self.status.content = f"seed {self._seed}, step {int(self._env.elapsed_steps()[0])}: {parts or '-'} {outcome}"

    def run(self, stop: threading.Event) -> None:
        """Play episodes in real time until ``stop``."""
        due = time.monotonic()
        while not stop.is_set():
            if self._restart.is_set() or (self._done and self.actor.value != STILL):
                if not self._restart.is_set():
                    self._restart.wait(_PAUSE_SECONDS)
                self._restart.clear()
                self.reset(self._seed + 1)
            elif not self.paused.value and not self._done:
                self.step()
            # Late steps are not caught up: a slow machine shows slow motion.
            due = max(due + 1 / self._env.control_hz, time.monotonic())
            stop.wait(due - time.monotonic())

    def jump(self, name: str, client: viser.ClientHandle) -> None:
        """Put a browser's camera where the environment's camera ``name`` is now."""
        camera = self._cameras()[name]
        position, wxyz = _place(camera)
        with client.atomic():
            client.camera.wxyz, client.camera.position = wxyz, position
            client.camera.fov = _fov(camera)

    def close(self) -> None:
        """Stop server and physics."""
        self._viewer.close()
        self._env.close()

    # ------------------------------------------------------------------ inside
    def _action(self) -> torch.Tensor:
        if self.actor.value == EXPERT:
            return self._expert(self._env.privileged())
        if self.actor.value == RANDOM:
            return torch.from_numpy(self._random.uniform(-0.03, 0.03, (1, self._env.action_dim)).astype(np.float32))
        still = torch.zeros(1, self._env.action_dim)
        still[:, -1] = 1
        return still

    def _cameras(self) -> dict[str, Camera]:
        return self._env.cameras()

    def _show(self, pictures: Mapping[str, torch.Tensor]) -> None:
        poses, server = self._env.body_poses()[0].numpy(), self._viewer.server
        with server.atomic():
            self._viewer.move(poses, self._env.bodies)
            for name, camera in self._cameras().items():
                position, wxyz = _place(camera)
                self.frustums[name].position, self.frustums[name].wxyz = position, wxyz
            for name, image in self.images.items():
                image.image = pictures[name][0].cpu().numpy()

    def _add_controls(self) -> None:
        gui, scene = self._viewer.server.gui, self._viewer.server.scene
        self._restart = threading.Event()
        with gui.add_folder("Episode", order=-1):
            self.status = gui.add_markdown("")
            self.actor = gui.add_dropdown("acts", (EXPERT, RANDOM, STILL))
            self.paused = gui.add_checkbox("paused", initial_value=False)
            gui.add_button("next episode").on_click(lambda _: self._restart.set())
        self.frustums: dict[str, viser.CameraFrustumHandle] = {}
        self.images: dict[str, viser.GuiImageHandle] = {}
        self.jumps: dict[str, viser.GuiButtonHandle] = {}
        self._env.reset([0])
        with gui.add_folder("Cameras", order=0):
            for name, camera in self._cameras().items():
                self.frustums[name] = scene.add_camera_frustum(
                    f"/cameras/{name}", fov=_fov(camera), aspect=camera.width / camera.height, scale=0.06,
                    color=(220, 120, 20), thickness=1.5, thickness_units="screen",
                )  # fmt: skip
                self.frustums[name].on_click(self._jumper(name))
                self.jumps[name] = gui.add_button(f"look through {name}")
                self.jumps[name].on_click(self._jumper(name))
                blank = np.zeros((camera.height, camera.width, 3), np.uint8)
                self.images[name] = gui.add_image(blank, label=name, format="jpeg")

    def _jumper(self, name: str) -> Callable[[viser.GuiEvent | viser.SceneNodePointerEvent], None]:
        def jump(event: viser.GuiEvent | viser.SceneNodePointerEvent) -> None:
            for client in [event.client] if event.client else self._viewer.server.get_clients().values():
                self.jump(name, client)

        return jump


def _place(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Position [3] and quaternion wxyz of a camera in the world; OpenCV axes are viser's too."""
    world_from_camera = rigid_inverse(camera.world_to_camera[0]).numpy()
    return world_from_camera[:3, 3], _wxyz(world_from_camera)


def _fov(camera: Camera) -> float:
    """Vertical field of view (rad); viser's cameras look along their picture's middle."""
    return float(2 * np.arctan(camera.height / 2 / float(camera.K[0, 1, 1])))
