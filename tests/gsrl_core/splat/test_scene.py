import json

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene, load_scene, save_scene

POSE = make_rigid(rotvec_to_matrix(torch.tensor([0.1, 0.2, 0.3])), torch.tensor([0.4, 0.2, 0.02]))


@pytest.fixture
def scene(random_gaussians):
    bodies = {"cube": (random_gaussians(4, 0, 1), POSE), "plate": (random_gaussians(5, 2, 2), torch.eye(4))}
    return Scene.from_parts(random_gaussians(7, 1), bodies)


def test_parts_know_their_body(scene):
    assert scene.names == ("cube", "plate") and scene.body.tolist() == [-1] * 7 + [0] * 4 + [1] * 5
    assert [len(scene.part(name)) for name in (None, "cube", "plate")] == [7, 4, 5]
    with pytest.raises(SceneError, match=r"no body 'robot'.*cube, plate"):
        scene.part("robot")


def test_a_saved_scene_is_loaded_unchanged(scene, tmp_path):
    save_scene(tmp_path / "s", scene)
    loaded = load_scene(tmp_path / "s")
    assert loaded.names == scene.names and torch.equal(loaded.body, scene.body)
    torch.testing.assert_close(loaded.rest_to_world, scene.rest_to_world, atol=0, rtol=0)
    for a, b in zip(scene.gaussians.tensors(), loaded.gaussians.tensors(), strict=True):
        assert torch.equal(a, b)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["cube.ply", "plate.ply", "scene.json", "static.ply"]


def test_posing_moves_bodies_only(scene):
    moved = scene.posed(torch.stack([POSE, POSE]))
    torch.testing.assert_close(moved.means[:7], scene.part(None).means)
    plate = scene.part("plate").means
    torch.testing.assert_close(moved.means[11:], plate @ POSE[:3, :3].T + POSE[:3, 3])
    torch.testing.assert_close(scene.posed().means[11:], plate)


def test_a_scene_without_bodies_is_allowed(tmp_path, random_gaussians):
    save_scene(tmp_path, Scene.from_parts(random_gaussians(3), {}))
    assert load_scene(tmp_path).names == ()


@pytest.mark.parametrize("name", ["static", "", "a/b", ".hidden"])
def test_names_that_cannot_be_files_are_refused(tmp_path, name, random_gaussians):
    with pytest.raises(SceneError, match="file name"):
        save_scene(tmp_path, Scene.from_parts(Gaussians.empty(), {name: (random_gaussians(1), torch.eye(4))}))


def test_broken_folders_are_refused(scene, tmp_path):
    with pytest.raises(SceneError, match=r"scene\.json is missing"):
        load_scene(tmp_path)
    save_scene(tmp_path, scene)
    (tmp_path / "cube.ply").unlink()
    with pytest.raises(SceneError, match=r"cube\.ply"):
        load_scene(tmp_path)
    save_scene(tmp_path, scene)
    description = json.loads((tmp_path / "scene.json").read_text())
    for key, value in [("format", "other/9"), ("bodies", [{"name": "cube"}]), ("bodies", 3)]:
        (tmp_path / "scene.json").write_text(json.dumps({**description, key: value}))
        with pytest.raises(SceneError, match=r"scene\.json"):
            load_scene(tmp_path)
    (tmp_path / "scene.json").write_text("{")
    with pytest.raises(SceneError, match="broken"):
        load_scene(tmp_path)


def test_inconsistent_scenes_are_refused(random_gaussians):
    gaussians = random_gaussians(2)
    body = torch.tensor([-1, 0], dtype=torch.int16)
    with pytest.raises(SceneError, match="int16"):
        Scene(gaussians, body.long(), ("a",), torch.eye(4)[None])
    with pytest.raises(SceneError, match=r"-1 \.\. 0"):
        Scene(gaussians, body + 1, ("a",), torch.eye(4)[None])
    with pytest.raises(SceneError, match="distinct"):
        Scene(gaussians, body, ("a", "a"), torch.eye(4).expand(2, 4, 4))
    with pytest.raises(SceneError, match="rest_to_world"):
        Scene(gaussians, body, ("a",), torch.eye(4))
