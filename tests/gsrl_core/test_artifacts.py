"""Laws of the store: whole or not at all, verified when read, safe between processes, honest about a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from gsrl_core.artifacts import Store, digest_folder, full_disk_is_an_error, gsrl_home, write_bytes, write_json
from gsrl_core.errors import ArtifactError


def commit(store, content="hello", kind="scene", **facts):
    with store.building(kind) as folder:
        (folder / "a.txt").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")
        return store.commit(kind, folder, facts)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_the_same_content_has_one_address(store):
    first, second, other = commit(store), commit(store), commit(store, "other")
    assert first == second
    assert first.sha256 != other.sha256
    assert digest_folder(first.path) == first.sha256
    assert first.path == store.root / "objects" / "scene" / first.sha256


def test_names_are_part_of_the_digest(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("same")
    assert digest_folder(tmp_path / "x") != digest_folder(tmp_path / "y")


def test_an_exception_while_building_leaves_nothing(store):
    with pytest.raises(RuntimeError), store.building("scene") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert not list((store.root / "tmp").iterdir())
    assert not (store.root / "objects").exists()


def test_check_names_what_is_wrong(store):
    artifact = commit(store)
    (artifact.path / "a.txt").write_text("tampered")
    with pytest.raises(ArtifactError, match="was altered"):
        store.check(artifact)
    store.discard(artifact.path)
    with pytest.raises(ArtifactError, match="is gone"):
        store.check(artifact)


def test_recall_returns_what_was_recorded(store):
    artifact = commit(store, psnr=27.5)
    assert store.recall("fit", "k") is None
    store.record("fit", "k", artifact)
    assert store.recall("fit", "k") == artifact
    assert store.recall("fit", "other") is None


def test_the_store_can_be_moved(store, tmp_path):
    artifact = commit(store)
    store.record("fit", "k", artifact)
    moved = Store(store.root.rename(tmp_path / "elsewhere"))
    assert moved.recall("fit", "k").path == tmp_path / "elsewhere" / "objects" / "scene" / artifact.sha256


@pytest.mark.parametrize("damage", ["alter", "add", "remove file", "remove folder"])
def test_a_damaged_artefact_is_not_recalled_but_made_again(store, damage):
    artifact = commit(store)
    store.record("fit", "k", artifact)
    match damage:
        case "alter":
            (artifact.path / "a.txt").write_text("hellO")
        case "add":
            (artifact.path / "new").touch()
        case "remove file":
            (artifact.path / "a.txt").unlink()
        case "remove folder":
            store.discard(artifact.path)
    assert store.recall("fit", "k") is None
    assert commit(store).path.is_dir()
    store.record("fit", "k", commit(store))
    assert store.check(store.recall("fit", "k"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "scene"}', '{"kind": 1, "sha256": 2, "facts": 3}'])
def test_a_broken_index_entry_is_a_miss(store, text):
    store.record("fit", "k", commit(store))
    next((store.root / "stages" / "fit").iterdir()).write_text(text)
    assert store.recall("fit", "k") is None


def test_commit_replaces_a_damaged_object_of_the_same_address(store):
    artifact = commit(store)
    (artifact.path / "a.txt").write_text("tampered")
    assert store.check(commit(store)) == artifact.path


BUILDER = """
import sys, time
from pathlib import Path
from gsrl_core.artifacts import Store
store = Store(Path(sys.argv[1]))
with store.building("scene") as folder:
    (folder / "big").write_bytes(b"x" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


def started(code, *arguments):
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


def test_sigkill_while_building_leaves_only_garbage_that_is_collected(store):
    process = started(BUILDER, store.root)
    try:
        assert store.collect_garbage() == []  # its owner lives
        assert len(list((store.root / "tmp").glob("scene-*/content/big"))) == 1
    finally:
        process.kill()
        process.wait()
    assert len(store.collect_garbage()) == 1
    assert not list((store.root / "tmp").iterdir())
    assert not (store.root / "objects").exists()


def test_workspaces_are_kept_for_a_month_and_while_somebody_works_in_them(store):
    old, held, fresh = (store.workspace(name) for name in ("fit-old", "fit-held", "fit-fresh"))
    (old / "deep").mkdir()
    for path in (old / "deep", old, held):
        os.utime(path, (0, 0))
    with store.locked("fit-held"):
        assert store.collect_garbage() == [old]
    assert held.is_dir()
    assert fresh.is_dir()


COMMITTER = """
import os, sys
from pathlib import Path
from gsrl_core.artifacts import Store
store = Store(Path(sys.argv[1]))
print("go", flush=True)
for i in range(10**6):
    with store.building("scene") as folder:
        (folder / "n").write_bytes(os.urandom(8) * 500)
        store.record("fit", str(i % 3), store.commit("scene", folder, {}))
"""


def count(folder):
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_sigkill_at_any_moment_leaves_whole_objects_and_whole_index_entries(store):
    scenes = store.root / "objects" / "scene"
    for delay in (0.02, 0.05, 0.09, 0.14):
        process = started(COMMITTER, store.root)
        before, deadline = count(scenes), time.monotonic() + 60
        while count(scenes) == before:  # its work is under way
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    store.collect_garbage()
    objects = list(scenes.iterdir())
    assert len(objects) >= 4
    assert all(digest_folder(path) == path.name for path in objects)
    entries = list((store.root / "stages" / "fit").glob("*.json"))
    assert all(store.recall("fit", path.stem) is not None for path in entries)


def test_a_lock_is_exclusive_and_freed_by_death(store):
    code = """
import sys, time
from pathlib import Path
from gsrl_core.artifacts import Store
with Store(Path(sys.argv[1])).locked("stage-k"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = started(code, store.root)
    taken = threading.Event()

    def take():
        with store.locked("stage-k"):
            taken.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert not taken.wait(0.3)
    process.kill()
    process.wait()
    assert taken.wait(60)


def test_concurrent_commits_of_the_same_content_agree(store):
    found = []
    threads = [threading.Thread(target=lambda: found.append(commit(store))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(a.path for a in found)) == 1
    assert store.check(found[0])


def test_a_real_write_that_does_not_fit_is_a_clear_error_and_leaves_nothing(store):
    """The kernel refuses the write (file size limit, the same class of error as a full disk)."""
    commit(store)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ArtifactError, match=r"is full.*GSRL_HOME"), store.building("scene") as folder:
            (folder / "big").write_bytes(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list((store.root / "tmp").iterdir())
    assert len(list((store.root / "objects" / "scene").iterdir())) == 1


WRITERS = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from gsrl_core.artifacts import full_disk_is_an_error, write_bytes
from gsrl_core.errors import ArtifactError
from gsrl_core.states import save_state
from gsrl_core.policy.files import save_tensors
from gsrl_core.policy.demonstrations import Episode, write_shard
out = Path(sys.argv[1])
big = torch.zeros(1_000_000)
rows = np.zeros((100_000, 9), np.float32)
writers = {
    "safetensors": lambda: save_tensors(out / "model.safetensors", {"a": big}),
    "torch.save to a stream": lambda: save_state(out / "checkpoint.pt", {"a": big}),
    "torch.save to a path": lambda: torch.save(big, out / "scratch" / "state.pt"),
    "numpy": lambda: write_shard(out, 0, [Episode(0, "go", {}, rows, rows)]),
    "python": lambda: write_bytes(out / "x", bytes(1_000_000)),
}
(out / "scratch").mkdir()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in writers.items():
    try:
        with full_disk_is_an_error(out):
            write()
    except ArtifactError as error:
        print(name, "|", error)
"""


def test_every_library_that_writes_gives_the_same_clear_error(tmp_path):
    """The kernel refuses the real calls of safetensors, torch and numpy, whose errors are of three other classes."""
    run = subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], capture_output=True, text=True, check=True)
    messages = dict(line.split(" | ", 1) for line in run.stdout.splitlines())
    assert list(messages) == [
        "safetensors", "torch.save to a stream", "torch.save to a path", "numpy", "python"
    ]  # fmt: skip
    for message in messages.values():
        assert f"the disk of {tmp_path} is full (writing failed: " in message
        assert "choose a folder on a larger disk" in message  # not GSRL_HOME: this is a folder of the user's
    assert [path.name for path in tmp_path.rglob("*")] == ["scratch", "state.pt"]  # temporary files are gone


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.EIO, "I/O error"), RuntimeError("PytorchStreamReader failed")],
)
def test_an_error_of_another_kind_passes_through(tmp_path, error):
    with pytest.raises(type(error)), full_disk_is_an_error(tmp_path):
        raise error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_in_the_index_is_a_clear_error_and_keeps_the_old_entry(store, monkeypatch, code):
    artifact = commit(store)
    store.record("fit", "k", artifact)

    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="is full"):
        store.record("fit", "k", artifact.model_copy(update={"facts": {"new": 1}}))
    monkeypatch.undo()
    assert store.recall("fit", "k") == artifact
    assert len(list((store.root / "stages" / "fit").iterdir())) == 1


def test_other_errors_of_the_system_are_not_called_a_full_disk(store):
    with pytest.raises(PermissionError), store.building("scene"):
        raise PermissionError(errno.EACCES, "denied")


def test_require_space(store, tmp_path):
    store.require_space(1)
    with pytest.raises(ArtifactError, match="is full"):
        store.require_space(2**60)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="GSRL_HOME"):
        Store(tmp_path / "file" / "below").require_space(1)


def test_write_is_atomic(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "x.json", "text")
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GSRL_HOME", str(tmp_path))
    assert gsrl_home() == tmp_path
    monkeypatch.setenv("GSRL_HOME", "")
    assert gsrl_home().name == ".gsrl"
    monkeypatch.setenv("GSRL_HOME", "relative")
    assert gsrl_home().is_absolute()


def test_garbage_is_collected_beside_a_writer_whose_files_come_and_go(tmp_path):
    store = Store(tmp_path)
    folder = store.workspace("busy") / "deep"
    folder.mkdir(parents=True)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for name in "abcdefgh":
                (folder / name).write_text("x")
            for name in "abcdefgh":
                (folder / name).unlink()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            assert store.collect_garbage() == []
    finally:
        stop.set()
        writer.join()
