"""Structure from motion: the bundled photos against their truth, lens removal, and every way to fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gsrl_core.capture import sfm
from gsrl_core.capture.dataset import load_transforms, load_views, read_photo, write_transforms
from gsrl_core.capture.frames import list_photos
from gsrl_core.capture.sfm import estimate_cameras, focal_prior, undistort
from gsrl_core.errors import CaptureError
from gsrl_core.geometry.align import umeyama

SHARED = Path(__file__).parents[4] / "shared" / "captures"


def _truth(folder, names):
    document = json.loads((folder / "ground_truth.json").read_text())
    frames = {frame["file"]: frame for frame in document["frames"]}
    return [frames[name] for name in names]


def test_all_bundled_photos_are_placed(tabletop, tabletop_scan):
    capture, workspace, heard = tabletop_scan
    assert [path.name for path in capture.images] == [f"bench_{index:02d}.jpg" for index in range(30)]
    assert all(path.parent == workspace / "images" for path in capture.images)
    assert capture.residuals["registered"] == capture.residuals["total"] == 30
    assert capture.residuals["not_registered"] == []
    assert capture.residuals["reprojection_px"] < 0.7
    assert len(capture.points) == len(capture.colors) > 2000
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_camera_centres_and_focal_length_match_the_truth(tabletop, tabletop_scan):
    capture = tabletop_scan[0]
    frames = _truth(tabletop, [path.name for path in capture.images])
    poses = torch.tensor([frame["camera_to_base"] for frame in frames], dtype=torch.float64)
    centers = torch.cat([camera.centers for camera in capture.cameras]).double()
    fit = umeyama(centers, poses[:, :3, 3])
    assert (fit.apply(centers) - poses[:, :3, 3]).norm(dim=-1).square().mean().sqrt() < 0.003
    sizes = [(camera.width, camera.height) for camera in capture.cameras]
    assert sizes == [(frame["w"], frame["h"]) for frame in frames], "portrait stays portrait"
    landscape = [camera.K[0] for camera in capture.cameras if camera.width > camera.height]
    assert landscape[0][0, 0] == pytest.approx(560, rel=0.01)
    assert landscape[0][0, 2] == pytest.approx(323.2, abs=3)
    assert landscape[0][1, 2] == pytest.approx(237.6, abs=3)


def test_transforms_of_a_scan_keep_the_photo_names(tabletop_scan, tmp_path):
    capture = tabletop_scan[0]
    path = tmp_path / "transforms.json"
    write_transforms(path, capture)
    loaded = load_transforms(path)
    assert [image.name for image in loaded.images] == [image.name for image in capture.images]
    torch.testing.assert_close(loaded.world_to_camera, capture.world_to_camera, atol=1e-5, rtol=0)
    assert load_views(loaded, 160)[0].rgb.shape == (120, 160, 3)


def test_same_photos_and_seed_give_the_same_cameras(tabletop, tmp_path):
    photos = list_photos(tabletop)[:6]
    first = estimate_cameras(photos, tmp_path / "a", image_side=640, seed=3)
    second = estimate_cameras(photos, tmp_path / "b", image_side=640, seed=3)
    assert torch.equal(first.world_to_camera, second.world_to_camera)
    assert torch.equal(first.K, second.K)
    assert torch.equal(first.points, second.points)


@pytest.mark.parametrize("k1", [0.15, -0.15])
def test_undistort_puts_points_where_the_pinhole_says(k1):
    """A dot drawn through the lens model lands on the pinhole projection, and no border is left empty."""
    K = np.array([[120.0, 0, 82], [0, 120, 58], [0, 0, 1]])
    x, y = 0.35, -0.25
    stretch = 1 + k1 * (x * x + y * y)
    rows, columns = np.mgrid[:120, :160] + 0.5
    column, row = 120 * x * stretch + 82, 120 * y * stretch + 58
    dot = np.exp(-((columns - column) ** 2 + (rows - row) ** 2) / 6)
    image = np.repeat((100 + 150 * dot)[..., None], 3, -1).astype(np.uint8)
    pinhole, new_K = undistort(image, K, k1)
    weight = np.clip(pinhole[..., 0].astype(float) - 101, 0, None)
    found = [(weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()]
    np.testing.assert_allclose(found, (new_K @ [x, y, 1])[:2], atol=0.1)
    assert new_K[0, 0] == new_K[1, 1] >= 120
    assert pinhole.min() >= 99
    for corner in ([0, 0], [160, 0], [0, 120], [160, 120]):
        ray = (np.array(corner) - new_K[:2, 2]) / new_K[0, 0]
        lens = K[:2, :2] @ ray * (1 + k1 * ray @ ray) + K[:2, 2]
        assert (lens >= -1e-6).all(), "what the border shows was in the photo"
        assert (lens <= np.array([160, 120]) + 1e-6).all()


def test_focal_prior_of_a_phone():
    """26 mm on 36 mm of film: 26/36 of the longest side, for both orientations."""
    assert focal_prior(26, 4032, 3024) == pytest.approx(2912)
    assert focal_prior(26, 3024, 4032) == pytest.approx(2912)


def test_photos_of_one_size_but_other_lenses_do_not_share_a_camera(tmp_path):
    picture = Image.fromarray(np.full((60, 80, 3), 90, np.uint8))
    photos = []
    for index, focal in enumerate([26, 26, 52, None]):
        exif = Image.Exif()
        exif[0x0110] = "Phone"
        if focal:
            exif.get_ifd(0x8769)[0xA405] = focal
        photos.append(tmp_path / f"{index}.jpg")
        picture.save(photos[-1], exif=exif)
    (tmp_path / "out").mkdir()
    groups = sfm._prepare(photos, tmp_path / "out", 640)
    assert [group["names"] for group in groups] == [["00000.png", "00001.png"], ["00002.png"], ["00003.png"]]
    assert [group["focal"] for group in groups] == [pytest.approx(26 / 36 * 80), pytest.approx(52 / 36 * 80), None]


def test_photos_that_do_not_overlap(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{index}.jpg"), cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC))
    with pytest.raises(CaptureError, match=r"only 0 of 4 photos could be placed.*overlap"):
        estimate_cameras(list_photos(tmp_path), tmp_path / "work", image_side=320)


def test_photos_without_any_texture(tmp_path):
    for index in range(3):
        Image.new("RGB", (320, 240), (100 + index, 120, 90)).save(tmp_path / f"{index}.jpg")
    with pytest.raises(CaptureError, match="only 0 of 3"):
        estimate_cameras(list_photos(tmp_path), tmp_path / "work", image_side=320)


def test_a_corrupt_photo_is_named(tabletop, tmp_path):
    for photo in list_photos(tabletop)[:4]:
        shutil.copy(photo, tmp_path)
    broken = tmp_path / "bench_02.jpg"
    broken.write_bytes(broken.read_bytes()[:20_000])
    with pytest.raises(CaptureError, match=r"bench_02\.jpg: cannot be decoded"):
        estimate_cameras(list_photos(tmp_path), tmp_path / "work", image_side=640)


def test_too_few_and_equally_named_photos(tabletop, tmp_path):
    photos = list_photos(tabletop)
    with pytest.raises(CaptureError, match="2 photos given"):
        estimate_cameras(photos[:2], tmp_path)
    copy = tmp_path / "other" / photos[0].name
    copy.parent.mkdir()
    shutil.copy(photos[0], copy)
    with pytest.raises(CaptureError, match=r"same name: bench_00\.jpg"):
        estimate_cameras([*photos[:3], copy], tmp_path)


def test_a_crash_is_reported_with_its_last_words(tmp_path):
    """The worker really dies: its request names a group without photos on disk."""
    (tmp_path / "images").mkdir()
    request = {
        "folder": str(tmp_path),
        "groups": [{"size": (64, 48), "focal": None, "names": ["missing.png"]}],
        "seed": 0,
        "exhaustive_limit": 80,
        "neighbours": 20,
        "overlap": 6,
    }
    with pytest.raises(CaptureError, match="stopped with code") as crash:
        sfm._run_worker(tmp_path, request, lambda fraction, text: None)
    assert len(str(crash.value).splitlines()) == 1
    assert "missing.png" in (tmp_path / "colmap.log").read_text()


def test_large_sets_are_paired_by_likeness(tabletop_scan):
    """Signatures of the bundled photos: chosen pairs share far more scene points than the others do."""
    _, workspace, _ = tabletop_scan
    script = f"""
import json, numpy as np, pycolmap
from gsrl_core.capture.sfm_worker import _descriptors, _pairs, similar_pairs
database = {str(workspace / "sfm" / "database.db")!r}
names = [f"{{i:05d}}.png" for i in range(30)]
with pycolmap.Database.open(database) as opened:
    chosen = similar_pairs([_descriptors(opened, name) for name in names], 4, seed=0)
    ids = [opened.read_image_with_name(name).image_id for name in names]
    strength = {{(i, j): opened.read_two_view_geometry(ids[i], ids[j]).inlier_matches.shape[0]
                if opened.exists_two_view_geometry(ids[i], ids[j]) else 0 for i in range(30) for j in range(i + 1, 30)}}
request = {{"exhaustive_limit": 10, "neighbours": 4, "overlap": 2, "seed": 0}}
print(json.dumps({{
    "count": len(chosen),
    "chosen": float(np.mean([strength[pair] for pair in chosen])),
    "others": float(np.mean([value for pair, value in strength.items() if pair not in chosen])),
    "pairs": len(_pairs(database, names, request)),
    "exhaustive": len(_pairs(database, names, {{**request, "exhaustive_limit": 30}})),
}}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    values = json.loads(result.stdout.splitlines()[-1])
    assert 60 <= values["count"] <= 120
    assert values["chosen"] > 2 * values["others"]
    assert values["count"] <= values["pairs"] <= values["count"] + 57
    assert values["exhaustive"] == 435


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "monstree").is_dir(), reason="the shared monstree photos are not on this machine")
def test_real_photos_in_both_orientations(tmp_path):
    capture = estimate_cameras(list_photos(SHARED / "monstree"), tmp_path)
    assert capture.residuals["registered"] == 23
    assert capture.residuals["reprojection_px"] < 0.5
    assert {(camera.width, camera.height) for camera in capture.cameras} == {(756, 1008), (1008, 756)}
    assert [path.name for path in capture.images] == [path.name for path in list_photos(SHARED / "monstree")]
    assert read_photo(capture.images[0]).shape == (1008, 756, 3)
