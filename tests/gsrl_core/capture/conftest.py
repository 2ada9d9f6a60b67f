"""The bundled capture, and one reconstruction of it for all tests that need one."""

from pathlib import Path

import pytest

import gsrl_core
from gsrl_core.capture.frames import list_photos
from gsrl_core.capture.sfm import estimate_cameras


@pytest.fixture(scope="session")
def tabletop() -> Path:
    return Path(gsrl_core.__file__).parent / "bundled" / "capture_tabletop"


@pytest.fixture(scope="session")
def tabletop_scan(tabletop, tmp_path_factory):
    """The capture in its scan frame, the workspace, and the progress that was told."""
    workspace = tmp_path_factory.mktemp("tabletop")
    heard: list[tuple[float, str]] = []
    capture = estimate_cameras(
        list_photos(tabletop), workspace, image_side=640, progress=lambda fraction, text: heard.append((fraction, text))
    )
    return capture, workspace, heard
