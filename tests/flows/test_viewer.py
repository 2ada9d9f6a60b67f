"""The viewer without a browser: what the server holds, and what it tells a client that speaks its protocol."""

from __future__ import annotations

import socket
import threading
from contextlib import closing

import numpy as np
import pytest
import torch

from flows import viewer
from gsrl_core.assemble import object_bodies
from gsrl_core.config import load
from gsrl_core.errors import SceneError
from gsrl_core.geometry.fr3 import LINKS
from gsrl_core.geometry.rotation import quat_to_matrix
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.scene import Scene, save_scene


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def blob(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        0.03 * torch.randn(count, 3, generator=generator),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), -5.0),
        torch.full((count,), 4.0),
        colors_to_harmonics(torch.rand(count, 3, generator=generator)),
    )


@pytest.fixture(scope="module")
def scene():
    links = {name: (blob(20, i), torch.eye(4)) for i, name in enumerate(LINKS)}
    return Scene.from_parts(blob(200, 99), links | object_bodies(load_task("StackCube-v0")))


@pytest.fixture(scope="module")
def live(scene, tmp_path_factory):
    from flows.live import Live

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSRL_HOME", str(tmp_path_factory.mktemp("home")))
        sim = load("stack-cube", {"sim.render_downscale": 16, "sim.workers": 1}).sim
        with closing(Live(scene, sim, free_port())) as live:
            yield live


def position(live, name):
    return np.array(live.viewer.bodies[name].position)


def test_a_saved_scene_has_one_handle_per_body_where_the_scene_puts_it(scene, tmp_path):
    save_scene(tmp_path / "scene", scene)
    loaded = viewer.load(tmp_path / "scene")
    with closing(viewer.Viewer(loaded, free_port())) as shown:
        assert set(shown.bodies) == {"static", *scene.names}
        cube = shown.bodies["red_cube"]
        np.testing.assert_allclose(cube.position, scene.rest_to_world[scene.index("red_cube"), :3, 3], atol=1e-6)
        # Splats stay in the body's own frame: only the handle moves.
        np.testing.assert_allclose(cube.centers, scene.part("red_cube").means, atol=1e-6)


def test_bodies_are_hidden_and_highlighted(scene):
    with closing(viewer.Viewer(scene, free_port())) as shown:
        shown.shown["red_cube"].value = False
        assert not shown.bodies["red_cube"].visible and shown.bodies["green_cube"].visible
        before = {name: np.array(handle.rgbs) for name, handle in shown.bodies.items()}
        shown.selected.value = "green_cube"
        assert np.abs(shown.bodies["green_cube"].rgbs - before["green_cube"]).max() > 0.1
        assert np.array_equal(shown.bodies["red_cube"].rgbs, before["red_cube"])
        shown.highlight("none")
        assert np.array_equal(shown.bodies["green_cube"].rgbs, before["green_cube"])


def test_a_splat_file_is_a_scene_without_bodies(tmp_path):
    from gsrl_core.splat.ply import write_ply

    write_ply(tmp_path / "scene.ply", blob(30, 1))
    assert viewer.load(tmp_path).names == () and len(viewer.load(tmp_path / "scene.ply").body) == 30
    with pytest.raises(SceneError, match="neither"):
        viewer.load(tmp_path / "nothing")


def test_bodies_follow_the_physics_to_success(live):
    live.actor.value = "scripted expert"
    live.reset(3)
    start = position(live, "red_cube")
    for _ in range(60):
        live.step()
        if "success" in live.status.content:
            break
    assert "success" in live.status.content and "inside" in live.status.content
    poses = live._env.body_poses()[0].numpy()
    for name in ("red_cube", "fr3_hand"):
        pose = poses[live._env.bodies.index(name)]
        np.testing.assert_allclose(position(live, name), pose[:3, 3], atol=1e-6)
        turn = quat_to_matrix(torch.tensor(np.array(live.viewer.bodies[name].wxyz), dtype=torch.float32))
        np.testing.assert_allclose(turn, pose[:3, :3], atol=1e-5)
    assert np.linalg.norm(position(live, "red_cube") - start) > 0.05


def test_who_acts_can_be_chosen(live):
    live.reset(3)
    live.actor.value = "nothing"
    rest = position(live, "red_cube")
    for _ in range(5):
        live.step()
    np.testing.assert_allclose(position(live, "red_cube"), rest, atol=1e-3)
    hand = position(live, "fr3_hand")
    live.actor.value = "random actions"
    for _ in range(5):
        live.step()
    assert np.linalg.norm(position(live, "fr3_hand") - hand) > 0.005


def test_cameras_are_frustums_with_their_picture(live):
    live.reset(3)
    configured = load("stack-cube").sim.cameras[0]
    frustum, shown = live.frustums[configured.name], live.images[configured.name].image
    np.testing.assert_allclose(frustum.position, configured.position, atol=1e-5)
    # viser's cameras look along z, SAPIEN's along x.
    forward = quat_to_matrix(torch.tensor(np.array(frustum.wxyz), dtype=torch.float32))[:, 2]
    np.testing.assert_allclose(forward, np.array(configured.rotation)[:, 0], atol=1e-5)
    assert shown.shape == (30, 40, 3)
    assert np.array_equal(shown, live._env.render_video_frame()[0].numpy())


class Client:
    """The camera of a browser as viser shows it to a server."""

    def __init__(self):
        from types import SimpleNamespace

        self.camera = SimpleNamespace(position=None, wxyz=None, fov=None)

    def atomic(self):
        from contextlib import nullcontext

        return nullcontext()


def test_a_preset_moves_the_browsers_camera_to_the_environments(live):
    client, configured = Client(), load("stack-cube").sim.cameras[0]
    live.jump(configured.name, client)
    np.testing.assert_allclose(client.camera.position, configured.position, atol=1e-5)
    np.testing.assert_allclose(client.camera.wxyz, live.frustums[configured.name].wxyz, atol=1e-6)
    assert client.camera.fov == pytest.approx(2 * np.arctan(configured.height / 2 / configured.fy), rel=1e-5)


def test_the_loop_plays_pauses_and_goes_on_to_the_next_seed(live):
    live.actor.value, live.paused.value = "nothing", False
    live.reset(7)
    stop = threading.Event()
    loop = threading.Thread(target=live.run, args=(stop,))
    loop.start()
    try:
        wait(lambda: live._env.elapsed_steps()[0] >= 3)
        live.paused.value = True
        live._restart.set()
        wait(lambda: "seed 8" in live.status.content)
    finally:
        stop.set()
        loop.join(10)
    assert not loop.is_alive()


def wait(condition, seconds=20.0):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
