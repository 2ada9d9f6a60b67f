"""The rig's cameras: the same alone and in a batch, at rest and moved."""

import pytest
import torch
from sim_helpers import BODIES, TINY_CAMERA

from gsrl_core.geometry.rotation import rotvec_to_matrix
from gsrl_core.sim.cameras import CameraRig

WRIST = TINY_CAMERA.model_copy(update={"name": "wrist", "link": "fr3_hand"})


def poses(count):
    generator = torch.Generator().manual_seed(1)
    placed = torch.eye(4).repeat(count, len(BODIES), 1, 1)
    placed[..., :3, :3] = rotvec_to_matrix(torch.randn(count, len(BODIES), 3, generator=generator))
    placed[..., :3, 3] = torch.randn(count, len(BODIES), 3, generator=generator)
    return placed


def motions(count):
    moved = torch.eye(4).repeat(count, 1, 1)
    moved[:, 0, 3] = 0.01 * torch.arange(1, count + 1)
    return moved


@pytest.mark.parametrize("shaken", [False, True])
def test_a_camera_is_the_same_alone_and_in_a_batch(shaken):
    rig = CameraRig((TINY_CAMERA, WRIST), 1)
    body_to_world = poses(3)
    motion = motions(3) if shaken else torch.eye(4).repeat(3, 1, 1)
    together = rig.cameras(body_to_world, motion)
    for i in range(3):
        alone = rig.cameras(body_to_world[i : i + 1], motion[i : i + 1])
        for name, camera in together.items():
            expected = camera.world_to_camera[i if len(camera) > 1 else 0]
            assert torch.allclose(alone[name].world_to_camera[0], expected), name


def test_a_wrist_camera_keeps_its_place_on_the_hand():
    rig = CameraRig((WRIST,), 1)
    body_to_world = poses(1)
    rest = CameraRig((TINY_CAMERA,), 1).cameras(body_to_world, torch.eye(4)[None])["3rd_view_camera"].world_to_camera[0]
    seen = rig.cameras(body_to_world, torch.eye(4)[None])["wrist"].world_to_camera[0]
    hand = body_to_world[0, BODIES.index("fr3_hand")]
    assert torch.allclose(seen @ hand, rest, atol=1e-5)


def test_resting_cameras_are_shared_by_all_environments():
    assert len(CameraRig((TINY_CAMERA,), 1).cameras(poses(3), torch.eye(4).repeat(3, 1, 1))["3rd_view_camera"]) == 1
