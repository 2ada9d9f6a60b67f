"""Contact shadows on a table that is seen from above at an angle; depth, alpha and body ids are given by hand."""

import pytest
import torch
from sim_helpers import cube_blobs

from gsrl_core.geometry import props
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import rotvec_to_matrix
from gsrl_core.sim import passes
from gsrl_core.sim.lens import pinhole_rays
from gsrl_core.sim.shadow import FADE_HEIGHT, ContactShadow
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene

WIDTH, HEIGHT = 61, 47
EYE = torch.tensor([0.1, -0.1, 0.5])
VIEW = look_at(EYE, torch.tensor([0.4, 0.1, 0.0]))
CAMERA = Camera(VIEW[None], intrinsics(70, 70, 30.5, 23.5)[None], WIDTH, HEIGHT)
RAYS = pinhole_rays(CAMERA)
NOTHING = Gaussians(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 1, 3))
SCENE = Scene.from_parts(NOTHING, {"cube": (cube_blobs(), torch.eye(4)), "plate": (NOTHING, torch.eye(4))})
ON_TABLE = (0.4, 0.1, props.CUBE_HALF)


def poses(*positions, turn=(0.0, 0.0, 0.0)):
    placed = torch.eye(4).repeat(len(positions), 2, 1, 1)
    placed[:, 0, :3, 3] = torch.tensor(positions)
    placed[:, 0, :3, :3] = rotvec_to_matrix(torch.tensor(turn))
    # The plate has no Gaussians here; it stays at the origin.
    return placed


def table(count, level=200):
    """Frames of an empty table that fills the picture."""
    world = RAYS @ VIEW[:2, 2:3] + VIEW[2, 2]
    depth = (-EYE[2] / world[..., 0]).expand(count, -1, -1)
    shape = (count, HEIGHT, WIDTH)
    rgb = torch.full((*shape, 3), level, dtype=torch.uint8)
    return Frames(rgb, depth, torch.ones(shape), torch.full(shape, -1, dtype=torch.int16))


def shadowed(intensity, frames, body_to_world):
    return ContactShadow(SCENE, intensity).darken(frames.rgb, frames, CAMERA, RAYS, body_to_world)


def at(picture, point):
    pixel, _ = CAMERA.project(torch.tensor([point]))
    column, row = pixel[0, 0].floor().int().tolist()
    return picture[0, row, column, 0].item()


def test_the_table_is_dark_under_the_body_and_untouched_away_from_it():
    picture = shadowed(0.5, table(1), poses(ON_TABLE))
    assert at(picture, (0.4, 0.1, 0.0)) == pytest.approx(100, abs=3)
    edge = at(picture, (0.4 + 1.2 * props.CUBE_HALF, 0.1, 0.0))
    assert 100 < edge < 170
    assert at(picture, (0.4 + 4 * props.CUBE_HALF, 0.1, 0.0)) == 200
    assert at(picture, (0.4, 0.1 - 4 * props.CUBE_HALF, 0.0)) == 200


def test_the_darkening_is_proportional_to_the_intensity():
    losses = [200 - shadowed(i, table(1), poses(ON_TABLE)).float() for i in (0.25, 0.5, 1.0)]
    assert (losses[1] - 2 * losses[0]).abs().max() <= 1.5
    assert (losses[2] - 2 * losses[1]).abs().max() <= 1.5
    assert losses[2].max() > 190
    assert torch.equal(shadowed(0.0, table(1), poses(ON_TABLE)), table(1).rgb)


def test_a_lifted_body_throws_a_wider_and_weaker_shadow_and_then_none():
    low, high = ((200 - shadowed(1.0, table(1), poses((0.4, 0.1, props.CUBE_HALF + h))).float()) for h in (0.0, 0.05))
    assert high.max() == pytest.approx(200 * (1 - 0.05 / FADE_HEIGHT) ** 2, abs=10)
    # Relative to its middle the shadow of the lifted cube reaches farther.
    assert (high > 0.25 * high.max()).sum() > (low > 0.25 * low.max()).sum()
    gone = shadowed(1.0, table(1), poses((0.4, 0.1, props.CUBE_HALF + FADE_HEIGHT + 0.01)))
    assert torch.equal(gone, table(1).rgb)


def test_the_shadow_moves_with_the_body():
    picture = shadowed(0.5, table(1), poses((0.3, 0.0, props.CUBE_HALF), turn=(0, 0, 0.5)))
    assert at(picture, (0.3, 0.0, 0.0)) < 105
    assert at(picture, (0.4, 0.1, 0.0)) == 200


def test_only_the_static_table_is_darkened():
    frames = table(1)
    body = Frames(frames.rgb, frames.depth, frames.alpha, torch.zeros_like(frames.body_id))
    glass = Frames(frames.rgb, frames.depth, torch.full_like(frames.alpha, 0.2), frames.body_id)
    wall = Frames(frames.rgb, frames.depth * 0.7, frames.alpha, frames.body_id)
    for other in (body, glass, wall):
        assert torch.equal(shadowed(1.0, other, poses(ON_TABLE)), frames.rgb)


def test_the_same_bits_in_every_batch(monkeypatch):
    spots = [(0.4, 0.1, 0.02), (0.3, 0.0, 0.05), (0.35, 0.1, 0.5), (0.45, 0.2, 0.03)]
    together = shadowed(0.7, table(4), poses(*spots))
    for i, spot in enumerate(spots):
        assert torch.equal(shadowed(0.7, table(1), poses(spot))[0], together[i])
    each = Camera(CAMERA.world_to_camera.repeat(4, 1, 1), CAMERA.K.repeat(4, 1, 1), WIDTH, HEIGHT)
    monkeypatch.setitem(passes.PASS_VALUES, "cpu", 3 * 3 * WIDTH * HEIGHT)
    frames = table(4)
    apart = ContactShadow(SCENE, 0.7).darken(frames.rgb, frames, each, RAYS, poses(*spots))
    assert torch.equal(apart, together)
