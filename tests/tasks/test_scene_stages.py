"""The gate after reconstruction is judged by the thresholds of the run, not by those of the fit."""

import json

import pytest

from gsrl_core.artifacts import Artifact
from gsrl_core.config import load
from gsrl_core.errors import GateError
from tasks import scene
from tasks.options import stage_key

QUALITY = {
    "registered": 30,
    "total": 30,
    "psnr": 24.0,
    "scale": {"metres_per_unit": 0.5, "residual_mm": 0.4, "tags": 7, "frame": "robot_base", "note": ""},
}


@pytest.fixture
def reconstruction(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    return Artifact(kind="reconstruction", path=tmp_path, sha256="0" * 64)


def test_a_threshold_decides_and_says_what_is_missing(reconstruction):
    scene.require_quality(load("laptop"), reconstruction)
    with pytest.raises(GateError, match=r"psnr is 24.0 \(needs 25.0\).*fit.steps"):
        scene.require_quality(load("laptop", {"quality.min_psnr": 25}), reconstruction)


def test_another_threshold_repeats_no_fit():
    def key(**changes):
        stage = scene.RECONSTRUCTION
        config = load("laptop", {name.replace("__", "."): value for name, value in changes.items()})
        return stage_key(stage.name, {}, config, stage.sections, stage.modules, scene._reconstruct)

    assert key(quality__min_psnr=25, quality__min_tags=5) == key()
    assert key(fit__steps=100) != key()


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.jpg", "b.jpg", "markers.json"], "."),
        (["walk.mp4"], "walk.mp4"),
        (["walk.MOV", "markers.json"], "walk.MOV"),
        (["walk.mp4", "a.jpg"], "."),
    ],
)
def test_a_video_is_found_also_beside_its_markers(tmp_path, files, chosen):
    for name in files:
        (tmp_path / name).touch()
    assert scene._photos(tmp_path) == tmp_path / chosen
