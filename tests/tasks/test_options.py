"""Cache keys: they change with what decides a result and with nothing else."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import pytest
import trimesh
from prefect.states import Failed

from gsrl_core.config import load
from gsrl_core.errors import HubError
from gsrl_core.hub import InterruptedDownloadError, UnreachableHubError
from tasks import options

MODULE = "gsrl_core.reconstruct_like"


def fresh(build):
    """A stage's body."""


def key(config=None, **changes):
    values = {
        "stage": "fit",
        "inputs": {"capture": "aa", "scene": "bb"},
        "config": config or load("laptop"),
        "sections": ("fit", "capture"),
        "modules": ("gsrl_core.geometry.camera",),
    }
    return options.stage_key(**{**values, **changes})


def test_a_key_is_stable_and_independent_of_order():
    assert key() == key()
    assert key() == key(inputs={"scene": "bb", "capture": "aa"}, sections=("capture", "fit"))


def test_a_key_follows_stage_inputs_sections_and_code():
    keys = {
        key(),
        key(stage="other"),
        key(inputs={"capture": "aa"}),
        key(inputs={"capture": "bb", "scene": "aa"}),
        key(config=load("laptop", {"fit.steps": 7})),
        key(sections=("fit",)),
        key(modules=()),
        key(body=fresh),
    }
    assert len(keys) == 8


def test_a_key_follows_the_file_of_the_body(tmp_path, monkeypatch):
    """What a task does around its driver decides the artefact too."""
    keys = []
    for text in ("def body(build): return 1", "def body(build): return 2", "def body(build): return 1"):
        (tmp_path / "some_task.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("some_task", None)
        options._file_version.cache_clear()
        keys.append(key(body=importlib.import_module("some_task").body))
    assert keys[0] == keys[2] != keys[1]


def task_key(reference, options=None):
    config = load("laptop", {"sim.task": reference, "sim.task_options": options or {}})
    return key(config=config, sections=("sim",))


def test_a_key_follows_the_task_its_options_its_file_and_the_files_it_names(tmp_path):
    keys = {task_key("PutCubeOnPlate-v0"), task_key("StackCube-v0"), task_key("PickAndPlace-v0")}
    keys.add(task_key("PickAndPlace-v0", {"goal": "plate"}))
    own = tmp_path / "own.py"
    for noun in ("mug", "jar"):
        own.write_text(
            "from gsrl_core.sim.tasks.pick_and_place import PickAndPlace\n"
            f"class Own(PickAndPlace):\n    instruction = 'put the {noun} away'\n"
        )
        keys.add(task_key(f"{own}:Own"))
    for size in (0.02, 0.03):
        mesh = tmp_path / "box.ply"
        trimesh.creation.box((size,) * 3).export(mesh)
        keys.add(task_key("PickAndPlace-v0", {"mesh": str(mesh)}))
    assert len(keys) == 8
    assert task_key("StackCube-v0") in keys
    # The file's name is the same, and so is the section: its bytes made the difference.
    assert key() == key(config=load("laptop", {"sim.task": "StackCube-v0"}))


def test_a_task_is_not_repeated_for_a_change_in_another_one():
    reached = options._closure("gsrl_core.sim.tasks.stack_cube")
    assert "gsrl_core.sim.tasks.stack_cube" in reached and "gsrl_core.sim.objects" in reached
    for driver in ("gsrl_core.finetune", "gsrl_core.assemble", "gsrl_core.evaluate"):
        closure = options._closure(driver)
        assert "gsrl_core.sim.task" in closure
        assert not [name for name in closure if name.startswith("gsrl_core.sim.tasks.")]


def test_other_sections_do_not_matter():
    assert key() == key(config=load("laptop", {"ppo.learning_rate": 0.5}))


def test_restricted_hides_what_the_key_omits():
    config = load("laptop", {"ppo.iterations": 3, "sim.num_envs": 8})
    seen = options.restricted(config, ("ppo",))
    assert seen.ppo == config.ppo
    assert seen.sim == type(config.sim)()
    assert seen.sim != config.sim


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small gsrl_core: driver -> maths -> (nothing), worker named by text, stranger."""
    root = tmp_path / "gsrl_core"
    (root / "sub").mkdir(parents=True)
    files = {
        "__init__": "",
        "driver": "def f():\n    from gsrl_core.sub import maths\n    import gsrl_core.errors\n",
        "sub/__init__": "",
        "sub/maths": "import gsrl_core.base\nWORKER = 'gsrl_core.worker'\n",
        "base": "",
        "worker": "from gsrl_core import driver\n",
        "errors": "",
        "stranger": "",
    }
    for name, text in files.items():
        (root / f"{name}.py").write_text(text)
    monkeypatch.setattr(options, "_ROOT", root)
    options._named.cache_clear()
    options.code_version.cache_clear()
    yield root
    options._named.cache_clear()
    options.code_version.cache_clear()


def test_code_is_followed_through_imports_names_and_circles(package):
    assert options._closure("gsrl_core.driver") == {
        "gsrl_core.driver",
        "gsrl_core.sub",
        "gsrl_core.sub.maths",
        "gsrl_core.base",
        "gsrl_core.worker",
    }


@pytest.mark.parametrize(
    ("file", "changes"), [("base", True), ("worker", True), ("sub/maths", True), ("stranger", False), ("errors", False)]
)
def test_the_version_changes_with_the_code_that_is_reached(package, file, changes):
    before = options.code_version("gsrl_core.driver")
    with (package / f"{file}.py").open("a") as stream:
        stream.write("# changed\n")
    options._named.cache_clear()
    options.code_version.cache_clear()
    assert (options.code_version("gsrl_core.driver") != before) is changes


@pytest.mark.parametrize(
    ("distribution", "changes"), [("numba", True), ("mani_skill", True), ("franky-sim", True), ("pycolmap", False)]
)
def test_the_version_changes_with_the_packages_that_are_used(package, monkeypatch, distribution, changes):
    """numba by a direct import, mani_skill two imports deep, franky-sim looked up by its name; pycolmap elsewhere."""
    (package / "driver.py").write_text("from numba import njit\nfrom gsrl_core.sub import maths\n")
    (package / "base.py").write_text("def f():\n    import mani_skill.envs\n")
    (package / "worker.py").write_text("found = find_spec('franky_sim')\n")
    (package / "stranger.py").write_text("import pycolmap\n")
    installed = metadata.version
    keys = []
    for version in ("1.0", "1.1"):
        options._named.cache_clear()
        options.code_version.cache_clear()
        options._installed.cache_clear()
        monkeypatch.setattr(metadata, "version", lambda name, v=version: v if name == distribution else installed(name))
        keys.append(options.code_version("gsrl_core.driver"))
    options._installed.cache_clear()
    assert (keys[0] != keys[1]) is changes


@pytest.mark.parametrize("distribution", sorted(options._PACKAGES.values()))
def test_the_table_of_packages_is_spelled_as_installed(distribution):
    assert options._installed(distribution) == metadata.version(distribution)


@pytest.mark.parametrize("module", ["finetune", "evaluate", "package", "assemble"])
def test_the_drivers_reach_the_maths(module):
    closure = options._closure(f"gsrl_core.{module}")
    assert "gsrl_core.geometry.rotation" in closure
    assert not closure & {"gsrl_core.config", "gsrl_core.artifacts"}


@pytest.mark.parametrize(
    ("error", "again"),
    [(InterruptedDownloadError("x"), True), (UnreachableHubError("x"), False), (HubError("x"), False)],
)
def test_only_a_broken_transfer_is_tried_again(error, again):
    assert options._broke_off(None, None, Failed(data=error)) is again


def test_settings_code_and_unrelated_parts_repeat_no_training():
    closure = options._closure("gsrl_core.finetune")
    assert {"gsrl_core.rl.ppo", "gsrl_core.sim.world", "gsrl_core.splat.raster_numba"} <= closure
    assert not [name for name in closure if name.startswith(("gsrl_core.capture", "gsrl_core.deploy"))]
    assert "gsrl_core.sections" not in closure
    assert not [name for name in options._closure("gsrl_core.reconstruct") if name.startswith("gsrl_core.deploy")]
