"""Folders as inputs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gsrl_core import folders
from gsrl_core.artifacts import Store
from gsrl_core.errors import ArtifactError, CaptureError, HubError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "stats.json").write_text("{}")
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_an_unknown_bundled_name_lists_what_there_is():
    with pytest.raises(HubError, match=r"nothing bundled is called 'nope'; available: .*capture_tabletop"):
        folders.bundled_folder("bundled:nope")


def test_captures(tmp_path, store):
    with pytest.raises(CaptureError, match="is not named"):
        folders.locate_capture("")
    with pytest.raises(CaptureError, match="there is no capture"):
        folders.locate_capture(str(tmp_path / "nope"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match="is empty"):
        folders.locate_capture(str(tmp_path / "empty"))
    video = tmp_path / "walk.mp4"
    video.write_bytes(b"v")
    (tmp_path / "out").mkdir()
    assert folders.copy_capture(folders.locate_capture(str(video)), tmp_path / "out") == 1
    first = folders.capture_digest(video)
    (tmp_path / "markers.json").write_text("{}")
    with_tags = folders.capture_digest(video)
    assert folders.copy_capture(video, tmp_path / "out") == 2
    (tmp_path / "markers.json").write_text('{"size": 1}')
    assert len({first, with_tags, folders.capture_digest(video)}) == 3
    assert folders.locate_capture("bundled").name == "capture_tabletop"


def test_import_folder(tmp_path, store, folder):
    assert store.check(folders.import_folder(folder, "scene", store))
    with pytest.raises(ArtifactError, match="there is no folder"):
        folders.import_folder(tmp_path / "nope", "scene", store)


@pytest.mark.parametrize("linkable", [True, False])
def test_links_where_it_can_and_copies_where_it_cannot(tmp_path, folder, monkeypatch, linkable):
    def other_disk(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not linkable:
        monkeypatch.setattr(Path, "hardlink_to", other_disk)
    (folder / "link.json").symlink_to("assets/stats.json")  # as in a hub cache
    folders.copy_folder(folder, tmp_path / "out", link=True)
    copied = tmp_path / "out" / "link.json"
    assert not copied.is_symlink()
    assert copied.samefile(folder / "assets" / "stats.json") is linkable
    assert copied.read_text() == "{}"


def test_a_full_disk_is_not_taken_for_a_missing_link(tmp_path, folder, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", full)
    with pytest.raises(OSError, match="No space"):
        folders.copy_folder(folder, tmp_path / "out", link=True)
