"""A scene, or an environment at work in it, in the browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flows.services import require_free_port
from gsrl_core.errors import SceneError

if TYPE_CHECKING:
    import viser

    from gsrl_core.sections import PipelineConfig
    from gsrl_core.splat.gaussians import Gaussians
    from gsrl_core.splat.scene import Scene

HIGHLIGHT = np.array([1.0, 0.75, 0.1])
"""Colour that a highlighted body takes on by half."""
_OFF = "none"


def show(path: Path, port: int, say: Callable[[str], None], config: PipelineConfig | None = None) -> None:
    """Serve ``path`` (scene folder, folder with scene.ply, or splat file) on loopback until interrupted.

    Args:
        path: what to show.
        port: of the server.
        say: hears the address.
        config: if given, its environment is played live in the scene, and its cameras are shown.

    Raises:
        SceneError: there is no scene, or it is broken.
        SimulationError: the environment cannot be built in this scene.
        ConfigError: the port is in use.
    """
    require_free_port(port, "--port")
    scene = load(path)
    if config is not None:
        from flows.live import Live

        with closing(Live(scene, config.sim, port)) as live:
            say(f"{live.title} in {path} on http://127.0.0.1:{port}; Ctrl-C stops")
            live.run(threading.Event())
        return
    with closing(Viewer(scene, port)):
        say(f"{path} on http://127.0.0.1:{port}; Ctrl-C stops")
        while True:
            time.sleep(1)


class Viewer:
    """A viser server with one splat object per body, which its pose moves; nothing is drawn here."""

    def __init__(self, scene: Scene, port: int) -> None:
        """Start the server on loopback."""
        import viser

        self.server = viser.ViserServer(host="127.0.0.1", port=port, verbose=False)
        self.server.scene.set_up_direction("+z")
        self.scene = scene
        self.bodies: dict[str, viser.GaussianSplatHandle] = {}
        """Handles by body; ``static`` is the bench."""
        self._colors: dict[str, np.ndarray] = {}
        for name in (None, *scene.names):
            gaussians = scene.part(name)
            if len(gaussians):
                self._add(name or "static", gaussians)
        self.move(scene.rest_to_world.numpy(), scene.names)
        self._add_controls()
        self.server.on_client_connect(self._look_at_the_bench)

    def move(self, body_to_world: np.ndarray, names: tuple[str, ...]) -> None:
        """Put the bodies ``names`` where ``body_to_world`` [M, 4, 4] says."""
        for pose, name in zip(body_to_world, names, strict=True):
            if name in self.bodies:
                self.bodies[name].wxyz, self.bodies[name].position = _wxyz(pose), pose[:3, 3]

    def highlight(self, name: str) -> None:
        """Tint one body; a name that is none takes the tint away."""
        for body, handle in self.bodies.items():
            colors = self._colors[body]
            tinted = 0.5 * colors + 0.5 * HIGHLIGHT if body == name else colors
            if not np.array_equal(handle.rgbs, tinted):
                handle.rgbs = tinted
        if self.selected.value != name and name in (_OFF, *self.bodies):
            self.selected.value = name

    def close(self) -> None:
        """Stop the server."""
        self.server.stop()

    def _add(self, name: str, gaussians: Gaussians) -> None:
        centers, covariances, rgbs, opacities = for_viser(gaussians)
        handle = self.server.scene.add_gaussian_splats(
            f"/{name}", centers=centers, covariances=covariances, rgbs=rgbs, opacities=opacities
        )
        self.bodies[name], self._colors[name] = handle, rgbs
        if name != "static":
            handle.on_click(lambda _: self.highlight(name))

    def _add_controls(self) -> None:
        gui = self.server.gui
        with gui.add_folder("Bodies"):
            self.selected = gui.add_dropdown("highlight", (_OFF, *self.bodies), hint="Or click a body in the scene.")
            self.selected.on_update(lambda _: self.highlight(self.selected.value))
            self.shown = {name: gui.add_checkbox(name, initial_value=True) for name in self.bodies}
        for name, box in self.shown.items():
            box.on_update(lambda _, name=name, box=box: setattr(self.bodies[name], "visible", box.value))

    def _look_at_the_bench(self, client: viser.ClientHandle) -> None:
        client.camera.position, client.camera.look_at = (1.25, -0.75, 0.85), (0.35, 0.0, 0.1)


def load(path: Path) -> Scene:
    """The scene behind ``path``; a splat file alone is a scene without bodies. Raises SceneError."""
    from gsrl_core.splat.ply import read_ply
    from gsrl_core.splat.scene import Scene, load_scene

    if (path / "scene.json").is_file():
        return load_scene(path)
    file = path / "scene.ply" if path.is_dir() else path
    if not file.is_file():
        raise SceneError(f"{path} is neither a scene folder (scene.json) nor a splat file (.ply)")
    return Scene.from_parts(read_ply(file), {})


def for_viser(gaussians: Gaussians) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centres [N, 3], covariances [N, 3, 3], colours in [0, 1] [N, 3] (of degree 0), opacities [N, 1]."""
    import torch

    from gsrl_core.geometry.rotation import quat_to_matrix
    from gsrl_core.splat.harmonics import C0

    axes = quat_to_matrix(gaussians.quats) * gaussians.log_scales.exp()[:, None, :]
    colors = (0.5 + C0 * gaussians.harmonics[:, 0]).clamp(0, 1)
    opacities = torch.sigmoid(gaussians.logit_opacities)[:, None]
    means, covariances, rgbs, alphas = (t.numpy() for t in (gaussians.means, axes @ axes.mT, colors, opacities))
    return means, covariances, rgbs, alphas


def _wxyz(pose: np.ndarray) -> np.ndarray:
    import torch

    from gsrl_core.geometry.rotation import matrix_to_quat

    return matrix_to_quat(torch.from_numpy(np.ascontiguousarray(pose[:3, :3]))).numpy()
