"""transforms.json round trip, foreign files, scaled views and broken input."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gsrl_core.capture.dataset import Capture, load_transforms, load_views, moved, read_photo, write_transforms
from gsrl_core.errors import CaptureError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import rotvec_to_matrix


def _photo(path, width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)).save(path, quality=95)


@pytest.fixture
def capture(tmp_path):
    sizes = [(64, 48), (48, 64), (64, 48)]
    images, cameras = [], []
    for index, (width, height) in enumerate(sizes):
        path = tmp_path / "images" / f"IMG {index}.jpg"
        path.parent.mkdir(exist_ok=True)
        _photo(path, width, height, index)
        eye = torch.tensor([1.0 + index, 0.3 * index, 0.8], dtype=torch.float64)
        pose = look_at(eye, torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)).float()
        cameras.append(Camera(pose[None], intrinsics(50 + index, 51, width / 2 + 1.5, height / 2)[None], width, height))
        images.append(path)
    similarity = torch.eye(4, dtype=torch.float64)
    similarity[:3, :3] *= 0.37
    return Capture(
        tuple(images),
        tuple(cameras),
        torch.tensor([[0.1, 0.2, 0.3], [1.0, -2.0, 3.0]]),
        torch.tensor([[1, 2, 3], [250, 128, 0]], dtype=torch.uint8),
        similarity,
        {"registered": 3, "scale": {"tags": 6}},
    )


def test_transforms_round_trip_keeps_everything(capture, tmp_path):
    path = tmp_path / "transforms.json"
    write_transforms(path, capture)
    loaded = load_transforms(path)
    assert [image.name for image in loaded.images] == ["IMG 0.jpg", "IMG 1.jpg", "IMG 2.jpg"]
    torch.testing.assert_close(loaded.world_to_camera, capture.world_to_camera, atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.K, capture.K)
    assert [(c.width, c.height) for c in loaded.cameras] == [(64, 48), (48, 64), (64, 48)]
    torch.testing.assert_close(loaded.points, capture.points)
    assert torch.equal(loaded.colors, capture.colors)
    torch.testing.assert_close(loaded.base_from_scan, capture.base_from_scan)
    assert loaded.residuals == capture.residuals
    assert not list(tmp_path.glob("*.partial"))


def test_written_poses_are_opengl(capture, tmp_path):
    """The third column of an OpenGL camera-to-world points away from what the camera looks at."""
    path = tmp_path / "transforms.json"
    write_transforms(path, capture)
    frame = json.loads(path.read_text())["frames"][0]
    pose = np.array(frame["transform_matrix"])
    eye = np.array([1.0, 0.0, 0.8])
    np.testing.assert_allclose(pose[:3, 3], eye, atol=1e-6)
    backward = eye - np.array([0.1, 0.2, 0.0])
    np.testing.assert_allclose(pose[:3, 2], backward / np.linalg.norm(backward), atol=1e-6)
    assert pose[2, 1] > 0, "camera y axis points up in OpenGL"


def test_global_intrinsics_and_missing_extension(tmp_path):
    _photo(tmp_path / "a.png", 32, 24)
    document = {
        "fl_x": 30.0,
        "cx": 16.0,
        "cy": 12.0,
        "w": 32,
        "h": 24,
        "applied_transform": [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]],
        "frames": [{"file_path": "./a", "transform_matrix": np.eye(4).tolist()}],
    }
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(document))
    capture = load_transforms(path)
    assert capture.images[0].name == "a.png"
    assert capture.K[0].tolist() == [[30, 0, 16], [0, 30, 12], [0, 0, 1]]
    assert capture.world_to_camera[0].tolist() == np.diag([1.0, -1.0, -1.0, 1.0]).tolist()
    assert capture.points.shape == (0, 3)


def test_views_are_scaled_with_their_intrinsics(capture):
    views = load_views(capture, 32)
    assert [tuple(view.rgb.shape) for view in views] == [(24, 32, 3), (32, 24, 3), (24, 32, 3)]
    torch.testing.assert_close(views[0].camera.K[0, :2], capture.K[0, :2] / 2)
    assert views[1].name == "IMG 1.jpg"
    assert views[0].rgb.dtype == torch.uint8
    assert load_views(capture, 4000)[0].rgb.shape == (48, 64, 3), "never enlarged"


def test_lens_distortion_of_foreign_files_is_removed(tmp_path):
    """A point drawn where the distorted lens puts it must land where the pinhole model says."""
    K, k1, width, height = np.array([[60.0, 0, 50], [0, 60.0, 40], [0, 0, 1]]), 0.2, 100, 80
    x, y = 0.5, 0.3
    stretch = 1 + k1 * (x * x + y * y)
    image = np.zeros((height, width, 3), np.uint8)
    column, row = 60 * x * stretch + 50 - 0.5, 60 * y * stretch + 40 - 0.5
    rows, columns = np.mgrid[:height, :width]
    image[:] = (255 * np.exp(-((columns - column) ** 2 + (rows - row) ** 2) / 8))[..., None].astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist(), "fl_x": 60, "fl_y": 60, "cx": 50, "cy": 40}
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"camera_model": "OPENCV", "w": width, "h": height, "k1": k1, "frames": [frame]}))
    pixels = load_views(load_transforms(path))[0].rgb[..., 0].double().numpy()
    found = np.array([(pixels * columns).sum(), (pixels * rows).sum()]) / pixels.sum() + 0.5
    np.testing.assert_allclose(found, (K @ [x, y, 1])[:2], atol=0.15)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = image.getexif()
    exif[274] = 6  # rotate 90 degrees clockwise to display
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = read_photo(tmp_path / "a.jpg")
    assert pixels.shape == (40, 20, 3)
    assert pixels[5, 10, 2] > 200, "the left half (blue) is on top"
    assert pixels[35, 10, 0] > 200


def test_truncated_photo_is_named(tmp_path):
    _photo(tmp_path / "whole.jpg", 320, 240)
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError, match=r"half\.jpg.*cannot be decoded"):
        read_photo(tmp_path / "half.jpg")
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(CaptureError, match=r"text\.jpg"):
        read_photo(tmp_path / "text.jpg")


def test_changed_photo_is_refused(capture):
    _photo(capture.images[1], 64, 64)
    with pytest.raises(CaptureError, match=r"IMG 1\.jpg: is 64x64 but its camera says 48x64"):
        load_views(capture)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "KeyError: 'frames'"),
        ('{"frames": [{"file_path": "a.png"}]}', "transform_matrix"),
        ('{"camera_model": "OPENCV_FISHEYE", "frames": []}', "OPENCV_FISHEYE"),
        ('{"frames": [{"file_path": "b.png"}]}', "copy the photos"),
    ],
)
def test_broken_transforms(tmp_path, content, message):
    _photo(tmp_path / "a.png", 32, 24)
    path = tmp_path / "transforms.json"
    path.write_text(content)
    with pytest.raises(CaptureError, match=message):
        load_transforms(path)


def test_missing_transforms(tmp_path):
    with pytest.raises(CaptureError, match="no such file"):
        load_transforms(tmp_path / "transforms.json")


def test_a_moved_capture_projects_its_points_to_the_same_pixels():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20, 3, generator=generator)
    camera = Camera(
        look_at(torch.tensor([2.0, 1.0, 3.0]), torch.zeros(3))[None], intrinsics(90, 80, 32, 24)[None], 64, 48
    )
    similarity = torch.eye(4, dtype=torch.float64)
    similarity[:3, :3] = 0.25 * rotvec_to_matrix(torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64))
    similarity[:3, 3] = torch.tensor([0.4, -0.1, 2.0])
    capture = Capture((Path("a.jpg"),), (camera,), points, torch.zeros(20, 3, dtype=torch.uint8), similarity)
    there = moved(capture, similarity)
    assert there.base_from_scan is None

    def pixels(scan):
        seen = scan.points @ scan.cameras[0].world_to_camera[0, :3, :3].T + scan.cameras[0].world_to_camera[0, :3, 3]
        return (seen / seen[:, 2:]) @ scan.cameras[0].K[0].T, seen[:, 2]

    (before, depth), (after, scaled_depth) = pixels(capture), pixels(there)
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(scaled_depth, 0.25 * depth, atol=1e-5)
    assert torch.allclose(
        there.points[0].double(), similarity[:3, :3] @ points[0].double() + similarity[:3, 3], atol=1e-6
    )
