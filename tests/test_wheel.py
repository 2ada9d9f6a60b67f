"""What the built wheel holds, and that nothing else in the environment owns our top-level names."""

import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(["uv", "build", "--wheel", "--out-dir", out, ROOT], check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_top_level_is_our_three_packages(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flows", "tasks", "gsrl_core"}


def test_wheel_carries_presets_and_bundled_data(wheel):
    names = set(wheel.namelist())
    for preset in ("full", "one_gpu", "cluster", "laptop", "stack_cube", "pick_and_place"):
        assert f"gsrl_core/configs/{preset}.yaml" in names
    assert any(name.startswith("gsrl_core/bundled/capture_tabletop/") and name.endswith(".jpg") for name in names)
    assert "gsrl_core/bundled/pi05_tiny/model.safetensors" in names


def test_installed_wheel_loads_its_presets_outside_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = "from gsrl_core import config; print(config.config_dir()); print(config.load('laptop').sim.sim_hz)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[0] == str(tmp_path / "site" / "gsrl_core" / "configs")


def test_no_other_distribution_owns_our_names():
    owners = packages_distributions()
    for name in ("flows", "tasks", "gsrl_core"):
        assert set(owners.get(name, ["real2sim2real"])) == {"real2sim2real"}
