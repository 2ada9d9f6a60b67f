import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.cuda import build, library

DEVICE = torch.device("cuda", 0)
FORK = multiprocessing.get_context("fork")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are kept; a device of the generation sm_90."""
    monkeypatch.delenv(build.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return tmp_path / "kept"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that replaces nvcc by a shell script whose ``$out`` is the file to write; returns its diary."""
    diary = tmp_path / "diary"

    def replaced_by(script):
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir(exist_ok=True)
        nvcc = bin_folder / "nvcc"
        find_out = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done'
        nvcc.write_text(f"#!/bin/sh\necho run >> {diary}\n{find_out}\n{script}\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
        return diary

    return replaced_by


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def build_in_a_process():
    process = FORK.Process(target=build.library, args=(DEVICE,))
    process.start()
    return process


def test_a_version_is_compiled_once_and_that_is_said(folder, compiler, caplog):
    diary = compiler('echo code > "$out"')
    with caplog.at_level(logging.WARNING):
        first, second = build.library(DEVICE), build.library(DEVICE)
    assert first == second and first.parent == folder and first.read_text() == "code\n"
    assert first.name == f"gsrl_splat_{build.version()}_sm_90.so"
    assert diary.read_text() == "run\n"
    assert [record.message[:43] for record in caplog.records] == ["compiling the CUDA kernels, up to a minute;"]
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_each_generation_of_devices_has_a_library(folder, compiler, monkeypatch):
    compiler('echo code > "$out"')
    first = build.library(DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert build.library(DEVICE).name == first.name.replace("sm_90", "sm_120")


def test_two_processes_build_once(folder, compiler):
    diary = compiler('sleep 0.5; echo code > "$out"')
    processes = [build_in_a_process() for _ in range(2)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert diary.read_text() == "run\n"


def test_a_killed_build_leaves_neither_a_library_nor_a_lock(folder, compiler, tmp_path):
    half, end = tmp_path / "half", tmp_path / "end"
    diary = compiler(f'printf ha > "$out"; touch {half}; while [ ! -e {end} ]; do sleep 0.05; done; echo lf >> "$out"')
    process = build_in_a_process()
    wait_for(half.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]  # a folder with half a library
    compiler('echo code > "$out"')
    assert build.library(DEVICE).read_text() == "code\n"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]
    end.touch()  # the orphaned compiler goes on, but elsewhere
    time.sleep(0.3)
    assert build.library(DEVICE).read_text() == "code\n" and diary.read_text() == "run\nrun\n"


def test_a_failed_build_says_why_and_leaves_nothing(folder, compiler):
    compiler('echo half > "$out"; echo too old >&2; exit 1')
    with pytest.raises(SceneError, match=r"too old.*rasterizer=gsplat"):
        build.library(DEVICE)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_no_compiler_is_explained(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(SceneError, match=r"no CUDA compiler.*rasterizer=gsplat"):
        build.library(DEVICE)


def test_a_folder_that_cannot_be_written_is_named(folder, compiler):
    compiler('echo code > "$out"')
    folder.write_text("a file where the folder should be")
    with pytest.raises(SceneError, match="kept"):
        build.library(DEVICE)


@needs_nvcc
def test_the_compiled_layout_and_source_are_pythons(tmp_path, monkeypatch):
    out = tmp_path / "kernels.so"
    monkeypatch.setattr(sys, "argv", ["build", str(out)])
    build.main()
    library.Library(out)
    monkeypatch.setattr(build, "version", lambda: "v0123")
    with pytest.raises(SceneError, match=r"another version .*not \('v0123'.*build OUT\.so"):
        library.Library(out)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernels' source, to be changed."""
    for source in build.FOLDER.glob("*.cu*"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build.version.cache_clear()
    yield tmp_path
    build.version.cache_clear()


def test_the_version_follows_source_and_constants(sources, monkeypatch):
    versions = [build.version()]
    header = sources / "sort.cuh"
    header.write_text(header.read_text() + "\n")
    build.version.cache_clear()
    versions.append(build.version())
    monkeypatch.setitem(build.DEFINED, "SURFACE_ALPHA", 0.51)
    build.version.cache_clear()
    versions.append(build.version())
    assert len(set(versions)) == 3


def test_asking_the_builder_for_help_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["build", "--help"])
    with pytest.raises(SystemExit):
        build.main()
    assert "OUT.so" in capsys.readouterr().out and not list(Path.cwd().iterdir())


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(build.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(SceneError, match=r"none\.so"):
        build.library(DEVICE)
    (tmp_path / "none.so").write_bytes(b"no library")
    with pytest.raises(SceneError, match=r"not a library .*build OUT\.so"):
        library.load(DEVICE)
