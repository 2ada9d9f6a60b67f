"""A scene in the browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flows.services import require_free_port
from gsrl_core.errors import SceneError


def show(path: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve ``path`` (scene folder, folder with scene.ply, or splat file) on loopback until interrupted.

    Raises:
        SceneError: there is no scene, or it is broken.
        ConfigError: the port is in use.
    """
    require_free_port(port, "--port")
    parts = _load(path)
    import viser

    server = viser.ViserServer(host="127.0.0.1", port=port, verbose=False)
    server.scene.set_up_direction("+z")
    for name, (centers, covariances, rgbs, opacities) in parts.items():
        server.scene.add_gaussian_splats(
            f"/{name}", centers=centers, covariances=covariances, rgbs=rgbs, opacities=opacities
        )
    say(f"{path} on http://127.0.0.1:{port}; Ctrl-C stops")
    while True:
        time.sleep(1)


def _load(path: Path) -> dict[str, tuple]:
    """Name of each part -> centres [N, 3], covariances [N, 3, 3], colours in [0, 1] [N, 3], opacities [N, 1]."""
    from gsrl_core.splat.ply import read_ply
    from gsrl_core.splat.scene import load_scene

    if (path / "scene.json").is_file():
        scene = load_scene(path)
        parts = {"static": scene.gaussians.select(scene.body < 0)}
        for index, name in enumerate(scene.names):
            pose = scene.rest_to_world[index]
            parts[name] = scene.gaussians.select(scene.body == index).transformed(pose[:3, :3], pose[:3, 3], 1.0)
    else:
        file = path / "scene.ply" if path.is_dir() else path
        if not file.is_file():
            raise SceneError(f"{path} is neither a scene folder (scene.json) nor a splat file (.ply)")
        parts = {"static": read_ply(file)}
    return {name: _for_viser(gaussians) for name, gaussians in parts.items() if len(gaussians.means)}


def _for_viser(gaussians: object) -> tuple:
    import torch

    from gsrl_core.geometry.rotation import quat_to_matrix
    from gsrl_core.splat.harmonics import C0

    axes = quat_to_matrix(gaussians.quats) * gaussians.log_scales.exp()[:, None, :]
    colors = (0.5 + C0 * gaussians.harmonics[:, 0]).clamp(0, 1)
    opacities = torch.sigmoid(gaussians.logit_opacities)[:, None]
    return tuple(t.numpy() for t in (gaussians.means, axes @ axes.mT, colors, opacities))
