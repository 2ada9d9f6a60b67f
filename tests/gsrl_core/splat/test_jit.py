"""Machine code is kept for one state of the sources and never used for another."""

import subprocess
import sys

import pytest

from gsrl_core.splat.jit import source_digest

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gsrl_core.splat import jit
jit.keep_machine_code(Path(sys.argv[1]))
import user
print(user.answer())
"""


@pytest.fixture
def package(tmp_path):
    (tmp_path / "user.py").write_text(
        "from constants import VALUE\nfrom gsrl_core.splat.jit import kernel\n"
        "@kernel\ndef answer():\n    return VALUE\n"
    )
    return tmp_path


def answer(package, value):
    (package / "constants.py").write_text(f"VALUE = {value}\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM, package], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_changed_constant_in_another_file_is_compiled_again(package):
    assert answer(package, 1) == 1
    assert len(list(package.glob("__pycache__/numba-*/**/*.nbi"))) == 1
    assert answer(package, 2) == 2
    assert answer(package, 1) == 1
    assert len(list(package.glob("__pycache__/numba-*/**/*.nbi"))) == 2


def test_the_digest_follows_names_and_content(tmp_path):
    (tmp_path / "a.py").write_text("x")
    first = source_digest(tmp_path)
    (tmp_path / "a.py").write_text("y")
    second = source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, source_digest(tmp_path)}) == 3
