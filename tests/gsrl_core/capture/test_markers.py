"""Scale and base frame: synthetic tags by hand, bad layouts, and the bundled capture against its truth."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gsrl_core.capture.dataset import Capture
from gsrl_core.capture.markers import MarkerLayout, align_capture, load_layout, locate_tags
from gsrl_core.errors import CaptureError
from gsrl_core.geometry.align import umeyama
from gsrl_core.geometry.camera import Camera, intrinsics, look_at

SIZE = 0.05
PLACES = {3: (0.0, 0.0), 8: (0.3, 0.0), 11: (0.1, 0.25)}


def _square(x, y, z=0.0):
    half = SIZE / 2
    return [[x - half, y + half, z], [x + half, y + half, z], [x + half, y - half, z], [x - half, y - half, z]]


def _layout(**changes):
    corners = {tag: torch.tensor(_square(*place), dtype=torch.float64) for tag, place in PLACES.items()}
    return replace(MarkerLayout("DICT_4X4_50", SIZE, corners), **changes)


@pytest.fixture(scope="module")
def flat_capture(tmp_path_factory):
    """Three tags on a plane in five photos, warped by OpenCV; the scan frame is the base frame times 4, shifted."""
    folder = tmp_path_factory.mktemp("flat")
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    pixels_per_metre = 2400
    page = np.full((1560, 1560), 0.6, np.float32)  # covers -0.15 .. 0.5 m of x and y
    for tag, (x, y) in PLACES.items():
        card = cv2.copyMakeBorder(
            cv2.aruco.generateImageMarker(dictionary, tag, 120), *[24] * 4, cv2.BORDER_CONSTANT, value=255
        )
        left, top = round((x - 0.035 + 0.15) * pixels_per_metre), round((0.5 - y - 0.035) * pixels_per_metre)
        page[top : top + 168, left : left + 168] = card / 255 * 0.8 + 0.03
    page_from_base = np.array([[pixels_per_metre, 0, 360], [0, -pixels_per_metre, 1200], [0, 0, 1.0]])
    K = intrinsics(520, 520, 321, 238)
    images, cameras = [], []
    for index, eye in enumerate(
        [(0.4, -0.3, 0.5), (-0.2, -0.2, 0.5), (0.1, 0.6, 0.45), (0.5, 0.4, 0.5), (0.1, 0.1, 0.7)]
    ):
        pose = look_at(torch.tensor(eye, dtype=torch.float64), torch.tensor([0.13, 0.1, 0.0], dtype=torch.float64))
        image_from_base = K.double().numpy() @ pose.numpy()[:3][:, [0, 1, 3]]
        shift = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])  # OpenCV's pixel centres
        fine = np.diag([3.0, 3.0, 1.0])
        warp = shift @ fine @ image_from_base @ np.linalg.inv(shift @ page_from_base)
        big = cv2.warpPerspective(page, warp, (1920, 1440), borderValue=0.3)
        linear = cv2.GaussianBlur(cv2.resize(big, (640, 480), interpolation=cv2.INTER_AREA), (0, 0), 0.5)
        srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        images.append(folder / f"{index}.png")
        Image.fromarray(np.repeat(np.round(255 * srgb).astype(np.uint8)[..., None], 3, -1)).save(images[-1])
        base_from_scan = torch.eye(4, dtype=torch.float64)
        base_from_scan[:3, :3] *= 0.25
        base_from_scan[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
        to_camera = pose @ base_from_scan
        to_camera[:3] *= 4  # a rigid transform again, in scan units
        cameras.append(Camera(to_camera.float()[None], K[None], 640, 480))
    return Capture(tuple(images), tuple(cameras), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8))


def test_tags_are_located(flat_capture):
    located = locate_tags(flat_capture, "DICT_4X4_50")
    assert sorted(located) == [3, 8, 11]
    for tag, (x, y) in PLACES.items():
        expected = (np.array(_square(x, y)) - [1, 2, 3]) * 4
        np.testing.assert_allclose(located[tag].corners, expected, atol=4 * 2e-4)
        np.testing.assert_allclose(located[tag].edges, 4 * SIZE, rtol=0.01)
        assert located[tag].views >= 4
        assert located[tag].reprojection_px < 0.2


def test_known_corners_give_the_base_frame(flat_capture):
    aligned = align_capture(flat_capture, _layout(), None)
    scale = aligned.residuals["scale"]
    assert scale["frame"] == "robot_base"
    assert scale["tags"] == 3
    assert scale["metres_per_unit"] == pytest.approx(0.25, rel=2e-3)
    assert scale["residual_mm"] < 0.3
    expected = torch.eye(4, dtype=torch.float64)
    expected[:3, :3] *= 0.25
    expected[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(aligned.base_from_scan, expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("layout", [MarkerLayout("DICT_4X4_50", SIZE), None], ids=["dictionary known", "nothing known"])
def test_size_alone_gives_a_table_frame(flat_capture, layout):
    aligned = align_capture(flat_capture, layout, None if layout else SIZE)
    scale = aligned.residuals["scale"]
    assert scale["frame"] == "table"
    assert "robot base is unknown" in scale["note"]
    assert scale["metres_per_unit"] == pytest.approx(0.25, rel=5e-3)
    table = aligned.base_from_scan
    centers = torch.cat([camera.centers for camera in flat_capture.cameras]).double() @ table[:3, :3].T + table[:3, 3]
    heights = torch.tensor([0.5, 0.5, 0.45, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(centers[:, 2], heights, atol=3e-3, rtol=0)


def test_a_misplaced_tag_is_left_out_and_named(flat_capture):
    layout = _layout()
    moved = {**layout.corners, 11: layout.corners[11] + torch.tensor([0.05, 0.0, 0.0])}
    scale = align_capture(flat_capture, replace(layout, corners=moved), None).residuals["scale"]
    assert scale["tags"] == 2
    assert "[11]" in scale["note"]
    assert scale["metres_per_unit"] == pytest.approx(0.25, rel=5e-3)


def test_small_misplacement_shows_in_the_residual(flat_capture):
    layout = _layout()
    moved = {**layout.corners, 11: layout.corners[11] + torch.tensor([0.015, 0.0, 0.0])}
    scale = align_capture(flat_capture, replace(layout, corners=moved), None).residuals["scale"]
    assert scale["tags"] == 3
    assert 3 < scale["residual_mm"] < 9


def test_tags_that_lie_elsewhere_are_an_error(flat_capture):
    layout = _layout()
    swapped = {3: layout.corners[8] * 1.6, 8: layout.corners[11] * 0.3, 11: layout.corners[3] - 0.4}
    with pytest.raises(CaptureError, match="not where markers"):
        align_capture(flat_capture, replace(layout, corners=swapped), None)


def test_no_tags_leave_the_scale_unknown(flat_capture):
    without = align_capture(flat_capture, None, None)
    assert without.base_from_scan is None
    assert without.residuals["scale"]["metres_per_unit"] is None
    unseen = align_capture(flat_capture, MarkerLayout("DICT_7X7_50", SIZE), None)
    assert unseen.base_from_scan is None
    assert unseen.residuals["scale"]["frame"] == "scan"
    assert "no tag was found" in unseen.residuals["scale"]["note"]


def test_contradicting_sizes(flat_capture):
    with pytest.raises(CaptureError, match=r"0\.1 m contradicts markers\.json \(0\.05 m\)"):
        align_capture(flat_capture, _layout(), 0.1)


def test_a_moved_tag_is_not_triangulated_from_photos_that_disagree(flat_capture):
    """With wrong cameras for two of five photos, the tag still comes out right, from the other three."""
    cameras = list(flat_capture.cameras)
    for index in (1, 3):
        shifted = cameras[index].world_to_camera.clone()
        shifted[:, 0, 3] += 0.2
        cameras[index] = replace(cameras[index], world_to_camera=shifted)
    located = locate_tags(replace(flat_capture, cameras=tuple(cameras)), "DICT_4X4_50")
    np.testing.assert_allclose(located[3].corners, (np.array(_square(0, 0)) - [1, 2, 3]) * 4, atol=4 * 1e-3)
    assert located[3].views <= 3


def test_layout_file(tmp_path):
    assert load_layout(tmp_path) is None
    document = {"dictionary": "DICT_4X4_50", "size": SIZE, "tags": {"3": _square(0.1, 0.2)}}
    (tmp_path / "markers.json").write_text(json.dumps(document))
    layout = load_layout(tmp_path)
    assert layout.size == SIZE
    assert layout.corners[3].tolist() == _square(0.1, 0.2)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "needed: dictionary"),
        ({"dictionary": "DICT_4X4_50"}, "KeyError: 'size'"),
        ({"dictionary": "DICT_9X9", "size": 0.05}, "allowed: .*DICT_4X4_50"),
        ({"dictionary": "DICT_4X4_50", "size": 60}, "60 mm is 0.06"),
        ({"dictionary": "DICT_4X4_50", "size": 0.05, "tags": {"50": _square(0, 0)}}, "ids 0 to 49"),
        ({"dictionary": "DICT_4X4_50", "size": 0.05, "tags": {"3": _square(0, 0)[:3]}}, r"shape \(3, 3\)"),
        ({"dictionary": "DICT_4X4_50", "size": 0.06, "tags": {"3": _square(0, 0)}}, "not a square of 0.06 m"),
        (
            {"dictionary": "DICT_4X4_50", "size": 0.05, "tags": {"3": [_square(0, 0)[i] for i in (0, 2, 1, 3)]}},
            "in the order top left",
        ),
    ],
)
def test_bad_layout_files(tmp_path, document, message):
    (tmp_path / "markers.json").write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(CaptureError, match=message):
        load_layout(tmp_path)


def _truth(folder, capture):
    frames = {frame["file"]: frame for frame in json.loads((folder / "ground_truth.json").read_text())["frames"]}
    return torch.tensor([frames[path.name]["camera_to_base"] for path in capture.images], dtype=torch.float64)


@pytest.fixture(scope="module")
def tabletop_aligned(tabletop, tabletop_scan):
    return align_capture(tabletop_scan[0], load_layout(tabletop), None)


def test_bundled_capture_against_its_truth(tabletop, tabletop_aligned):
    """Scale within 1 %, base frame within 5 mm and 0.5 degrees (camera centres and axes after mapping)."""
    capture = tabletop_aligned
    camera_to_base = _truth(tabletop, capture)
    centers = torch.cat([camera.centers for camera in capture.cameras]).double()
    best_scale = umeyama(centers, camera_to_base[:, :3, 3]).scale
    record = capture.residuals["scale"]
    assert record["tags"] == 7
    assert record["residual_mm"] < 1
    assert record["metres_per_unit"] == pytest.approx(best_scale, rel=0.01)
    similarity = capture.base_from_scan
    mapped = centers @ similarity[:3, :3].T + similarity[:3, 3]
    assert (mapped - camera_to_base[:, :3, 3]).norm(dim=-1).max() < 0.005
    axes = similarity[:3, :3] / record["metres_per_unit"] @ capture.world_to_camera[:, :3, :3].double().mT
    cosines = ((axes.mT @ camera_to_base[:, :3, :3]).diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2
    assert torch.rad2deg(torch.arccos(cosines.clamp(-1, 1))).max() < 0.5


def test_bundled_capture_with_the_tag_size_only(tabletop_aligned, tabletop_scan):
    known = tabletop_aligned
    measured = align_capture(tabletop_scan[0], MarkerLayout("DICT_4X4_50", 0.06), None)
    assert measured.residuals["scale"]["frame"] == "table"
    ratio = measured.residuals["scale"]["metres_per_unit"] / known.residuals["scale"]["metres_per_unit"]
    assert ratio == pytest.approx(1, abs=0.005)
    between = measured.base_from_scan @ torch.linalg.inv(known.base_from_scan)
    assert between[2, 2] == pytest.approx(1, abs=5e-3), "both frames have the table's normal as z"
    assert abs(between[2, 3]) < 0.003, "and the table at z = 0"
