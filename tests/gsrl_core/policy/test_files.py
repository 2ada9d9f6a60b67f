"""Folders that are exchanged as a whole, whatever way they are named."""

from pathlib import Path

import pytest

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.files import replacing, require_replaceable


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk" / "checkpoint").mkdir(parents=True)
    (tmp_path / "disk" / "checkpoint" / "old").touch()
    link = tmp_path / "checkpoint"
    link.symlink_to(tmp_path / "disk" / "checkpoint")
    with replacing(link, {"old"}) as fresh:
        (fresh / "new").touch()
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "checkpoint").iterdir()] == ["new"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["checkpoint"]


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="working directory"):
        require_replaceable(tmp_path / "here")
    assert require_replaceable(tmp_path / "here" / "out") == tmp_path / "here" / "out"


def test_a_mount_point_is_refused():
    with pytest.raises(CheckpointError, match="mount point"):
        require_replaceable(Path("/proc"))
