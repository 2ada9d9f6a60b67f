from __future__ import annotations

import ctypes
import json

from gsrl_core import doctor


def test_every_missing_thing_says_what_it_disables_and_what_to_do():
    findings = doctor.examine()
    assert {f.name for f in findings} >= {"python", "cores", "memory", "disk", "libGL.so.1", "gpu", "nvcc", "ffmpeg"}
    for finding in findings:
        assert finding.found
        assert bool(finding.disables) == bool(finding.remedy) == (not finding.ok)
    assert json.loads(json.dumps([f.as_json() for f in findings]))


def test_a_missing_library_names_the_debian_package(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    found = {f.name: f for f in doctor.examine()}
    assert not found["libGL.so.1"].ok
    assert found["libGL.so.1"].remedy == "sudo apt install libgl1"
    assert "cv2" in found["libGL.so.1"].disables
    assert found["libusb-1.0.so.0"].remedy == "sudo apt install libusb-1.0-0"


def test_what_the_pipeline_cannot_do_without_is_named_by_package(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert doctor.missing_libraries() == ["libgl1", "libglib2.0-0", "libx11-6"]


def test_a_small_disk_is_found_also_before_the_store_exists(monkeypatch, tmp_path):
    monkeypatch.setenv("GSRL_HOME", str(tmp_path / "not" / "yet"))
    assert next(f for f in doctor.examine() if f.name == "disk").found.endswith(str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor, "_MIN_FREE_GIB", 1e9)
    disk = next(f for f in doctor.examine() if f.name == "disk")
    assert not disk.ok
    assert "GSRL_HOME" in disk.remedy
