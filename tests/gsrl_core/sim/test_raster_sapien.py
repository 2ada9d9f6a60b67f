"""SAPIEN's pictures against cameras' projections and against splats; without a Vulkan device against its refusal."""

import math

import numpy as np
import pytest
import torch
from sapien import render
from sim_helpers import PUT, bench_scene, cube_blobs, empty_scene, sim_config, skip_without_vulkan

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import props
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.sections import CameraConfig
from gsrl_core.sim.cameras import CameraRig
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.looks import body_meshes, object_mesh
from gsrl_core.sim.objects import SplatFile, TaskObject, cube
from gsrl_core.sim.raster_sapien import SapienRasterizer
from gsrl_core.splat.from_mesh import ColoredMesh
from gsrl_core.splat.ply import write_ply
from gsrl_core.splat.raster_numba import NumbaRasterizer

OFF_CENTRE = Camera(
    look_at(torch.tensor([[0.8, 0.6, 0.5]]), torch.tensor([[0.45, 0.1, 0.0]])),
    intrinsics(310.0, 330.0, 121.5, 158.25)[None],
    320,
    240,
)
"""Unequal focal lengths, principal point 38 px beside and below the centre."""

WHOLE = Camera(
    look_at(torch.tensor([[1.6, -1.2, 1.0]]), torch.tensor([[0.25, 0.0, 0.35]])),
    intrinsics(420.0, 420.0, 300.0, 260.0)[None],
    640,
    480,
)
"""The robot from its base to its hand."""


@pytest.fixture(scope="module")
def meshes():
    return body_meshes(PUT)


@pytest.fixture(scope="module")
def sapien(meshes):
    skip_without_vulkan()
    return SapienRasterizer(meshes)


@pytest.fixture
def alone():
    """Makes rasterizers of chosen meshes."""
    skip_without_vulkan()
    return SapienRasterizer


def poses(cube_at=(0.4, 0.2, 0.02), turn=(0.3, -0.2, 0.5), q=START_QPOS):
    """Bodies [1, M, 4, 4]: the robot at ``q``, a turned cube, the plate."""
    links = fr3().forward(q)
    objects = [
        make_rigid(rotvec_to_matrix(torch.tensor(turn)), torch.tensor(cube_at)),
        make_rigid(torch.eye(3), torch.tensor([0.5, 0.0, 0.02])),
    ]
    return torch.stack([*(links[name] for name in LINKS), *objects])[None].float()


def projected(camera, vertices, pose):
    """Image coordinates [V, 2] and depths [V] of a body's vertices."""
    pixels, depth = camera.project(torch.from_numpy(vertices).float() @ pose[:3, :3].T + pose[:3, 3])
    return pixels[0], depth[0]


def hull_mask(points, width, height):
    """Pixels [h, w] whose centres lie in the convex hull of image points [V, 2]."""
    from scipy.spatial import ConvexHull

    centres = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    planes = ConvexHull(points).equations
    return (centres @ planes[:, :2].T + planes[:, 2] <= 0).all(axis=-1)


def overlap(a, b):
    return float((a & b).sum() / (a | b).sum())


def centre(mask):
    """Mean row and column of a mask's pixels."""
    return torch.nonzero(torch.as_tensor(mask)).double().mean(dim=0)


def wrist_camera(poses):
    """On the hand, looking at the fingertips and what lies below."""
    config = CameraConfig(
        name="wrist", link="fr3_hand", width=320, height=240, fx=200.0, fy=200.0, cx=150.0, cy=130.0,
        position=(0.06, 0.0, 0.02), rotation=((0.0, 0.0, -1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
    )  # fmt: skip
    return CameraRig((config,), 1).cameras(poses, torch.eye(4)[None])["wrist"]


@pytest.mark.parametrize("at", [(0.4, 0.2, 0.02), (0.6, 0.15, 0.2)])
def test_the_cube_is_where_its_corners_project(sapien, at):
    bodies, index = poses(at), LINKS.index("fr3_hand") + 3
    cameras = {"off": OFF_CENTRE}
    frames = sapien.render(empty_scene(), bodies, cameras, extras=True)["off"]
    corners, depth = projected(OFF_CENTRE, props.cube_mesh()[0], bodies[0, index])
    expected = hull_mask(corners.numpy(), 320, 240)
    assert expected.sum() > 200
    mask = (frames.body_id[0] == index).numpy()
    assert overlap(mask, expected) > 0.99
    assert (centre(mask) - centre(expected)).abs().max() < 0.1
    # Red, and as far away as the cube.
    red, green, blue = frames.rgb[0][mask].float().mean(dim=0)
    assert red > 90 and red > 4 * green and red > 4 * blue
    assert depth.min() - 0.002 < frames.depth[0][mask].min() and frames.depth[0][mask].max() < depth.max() + 0.002


def test_a_wrist_camera_sees_the_fingers_and_follows_the_arm(sapien):
    for q in (START_QPOS, (0.4, 0.5, 0.1, -2.0, 0.2, 2.3, 0.2, 0.02, 0.02)):
        bodies = poses(q=q)
        # In front of the fingertips, all else out of the way.
        hand = bodies[0, LINKS.index("fr3_hand")]
        bodies[0, 11, :3, 3] = (hand @ torch.tensor([0.03, 0.0, 0.16, 1.0]))[:3]
        bodies[0, 12, :3, 3] = torch.tensor([-1.0, 0.0, 0.02])
        camera = wrist_camera(bodies)
        frames = sapien.render(empty_scene(), bodies, {"wrist": camera}, extras=True)["wrist"]
        corners, _ = projected(camera, props.cube_mesh()[0], bodies[0, 11])
        mask, expected = (frames.body_id[0] == 11).numpy(), hull_mask(corners.numpy(), 320, 240)
        assert expected.sum() > 500 and overlap(mask, expected) > 0.98
        assert {LINKS.index(name) for name in ("fr3_leftfinger", "fr3_rightfinger")} <= set(
            frames.body_id.unique().tolist()
        )


def test_the_links_cover_their_vertices(sapien, meshes):
    """Independent of SAPIEN: a link's vertex that is nearer than everything else is seen in its link's mask."""
    bodies, whole = poses(), WHOLE
    frames = sapien.render(empty_scene(), bodies, {"whole": whole}, extras=True)["whole"]
    for index, name in enumerate(LINKS):
        pixels, depth = projected(whole, meshes[name].vertices, bodies[0, index])
        column, row = pixels.floor().long().unbind(-1)
        there = frames.body_id[0][row, column] == index
        front = (frames.depth[0][row, column] - depth).abs() < 0.003
        # Among vertices at the seen depth some lie where a neighbouring link touches.
        assert front.sum() > 20 and there[front].float().mean() > 0.85, name


def test_robot_and_cube_have_the_outlines_of_their_splats(sapien):
    from gsrl_core.assemble import object_bodies, robot_bodies
    from gsrl_core.splat.scene import Scene

    scene = Scene.from_parts(cube_blobs().select(slice(0, 0)), robot_bodies(2500) | object_bodies(PUT))
    bodies = poses()
    near = CameraRig((CameraConfig(),), 1).cameras(bodies, torch.eye(4)[None])["3rd_view_camera"]
    cameras = {"near": near, "whole": WHOLE}
    ours, theirs = (r.render(scene, bodies, cameras, extras=True) for r in (NumbaRasterizer(), sapien))
    # Splats are soft: their outlines lie a pixel or two outside.
    for name, low, high, least in (("whole", 0, 11, 0.8), ("near", 11, 12, 0.75), ("near", 12, 13, 0.9)):
        ids = [torch.where(f[name].alpha[0] > 0.5, f[name].body_id[0], -1) for f in (ours, theirs)]
        splats, mesh = ((i >= low) & (i < high) for i in ids)
        assert overlap(splats, mesh) > least, name
        assert (centre(splats) - centre(mesh)).abs().max() < 1, name


def test_every_environment_has_its_own_picture(sapien):
    several = torch.cat([poses(), poses((0.45, -0.2, 0.02)), poses()])
    cameras = {"off": OFF_CENTRE, "wrist": wrist_camera(several)}
    frames = sapien.render(empty_scene(), several, cameras)
    assert frames["off"].rgb.shape == (3, 240, 320, 3) and frames["off"].rgb.dtype == torch.uint8
    assert frames["off"].depth is None
    assert torch.equal(frames["off"].rgb[0], frames["off"].rgb[2])
    assert not torch.equal(frames["off"].rgb[0], frames["off"].rgb[1])
    for i in range(3):
        single = {name: camera.select(i if len(camera) > 1 else 0) for name, camera in cameras.items()}
        one = sapien.render(empty_scene(), several[i : i + 1], single)
        assert all(torch.equal(one[name].rgb[0], frames[name].rgb[i]) for name in cameras)


def test_colours_are_the_meshes_own_under_the_splats_light(alone):
    """Tiles that look up, each in a colour of its own, against the formula of from_mesh.shade."""
    from gsrl_core.splat.from_mesh import Light, shade

    colors = np.random.default_rng(0).uniform(0.05, 0.9, (7, 3))
    left = np.arange(-0.35, 0.35, 0.1)
    corners = np.array([[[x, -0.2, 0.1], [x + 0.1, -0.2, 0.1], [x + 0.1, 0.2, 0.1], [x, 0.2, 0.1]] for x in left])
    faces = np.concatenate([4 * np.arange(7)[:, None] + triangle for triangle in ([0, 1, 2], [0, 2, 3])])
    camera = Camera(
        look_at(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), up=(0.0, 1.0, 0.0)),
        intrinsics(90.0, 90.0, 50.0, 50.0)[None], 100, 100,
    )  # fmt: skip
    tiles = alone({"tiles": ColoredMesh(corners.reshape(-1, 3), faces, np.concatenate([colors] * 2))})
    picture = tiles.render(empty_scene(("tiles",)), torch.eye(4)[None, None], {"top": camera})["top"].rgb[0]
    # 10 px a tile, world x to the right.
    seen = picture[50, 20:90:10].numpy()
    assert np.abs(seen - 255 * shade(colors, np.array([[0.0, 0, 1]] * 7), np.ones(7), Light())).max() < 2


def test_a_lens_bends_sapiens_pictures_too(sapien):
    """The environment's lens: a corner of the cube is where OpenCV's model puts it."""
    import cv2

    config = CameraConfig(width=320, height=240, fx=300.0, fy=300.0, cx=170.0, cy=110.0)
    distortion = (-0.25, 0.08, 0.002, -0.001, 0.0)
    sim = sim_config(num_envs=1, cameras=(config.model_copy(update={"distortion": distortion}),))
    with make_env(sim, empty_scene(), sapien) as env:
        env.reset([4])
        frames = env.frames()["3rd_view_camera"]
        pose = env.body_poses()[0, len(LINKS)]
    straight = CameraRig((config,), 1).cameras(pose[None, None], torch.eye(4)[None])["3rd_view_camera"]
    at_camera = straight.world_to_camera[0] @ pose
    corners, _ = cv2.projectPoints(
        props.cube_mesh()[0], cv2.Rodrigues(at_camera[:3, :3].double().numpy())[0], at_camera[:3, 3].double().numpy(),
        straight.K[0].double().numpy(), np.array(distortion),
    )  # fmt: skip
    mask = (frames.body_id[0] == len(LINKS)).numpy()
    assert overlap(mask, hull_mask(corners[:, 0], 320, 240)) > 0.95


def test_an_object_of_splats_alone_shows_its_collision_shape(tmp_path):
    write_ply(tmp_path / "cube.ply", cube_blobs())
    body = cube()
    scanned = TaskObject("thing", SplatFile(tmp_path / "cube.ply", np.eye(4)), 0.1, np.ones(3), box=body.box)
    mesh = object_mesh(scanned)
    assert np.allclose(mesh.colors, [0.8, 0.1, 0.1], atol=1e-3)
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (np.einsum("fi,fi->f", normals, corners.mean(axis=1)) > 0).all()
    assert math.isclose(np.linalg.norm(normals, axis=1).sum() / 2, 6 * 0.04**2)


def test_other_bodies_are_refused(sapien):
    with pytest.raises(SimulationError, match="meshes of"):
        sapien.render(bench_scene(), torch.eye(4)[None, None], {"off": OFF_CENTRE})


def test_without_vulkan_the_message_says_what_to_install(monkeypatch):
    def nothing():
        raise RuntimeError("failed to find a rendering device")

    monkeypatch.setattr(render, "RenderSystem", nothing)
    with pytest.raises(SimulationError, match=r"apt-get install libvulkan1 mesa-vulkan-drivers.*gs_rlinf"):
        SapienRasterizer({})
