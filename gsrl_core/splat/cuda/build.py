"""Compiling the CUDA kernels, once for each version of their source, and finding a library that was built before."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat import constants

LIBRARY_VARIABLE = "GSRL_CUDA_LIBRARY"
"""Path of a library built elsewhere (see :data:`REBUILD`); used instead of compiling."""
REBUILD = "python -m gsrl_core.splat.cuda.build OUT.so"
FOLDER = Path(__file__).parent
DEFINED = {
    "EPS2D": constants.EPS2D,
    "NEAR_PLANE": constants.NEAR_PLANE,
    "FAR_PLANE": constants.FAR_PLANE,
    "FRUSTUM_MARGIN": constants.FRUSTUM_MARGIN,
    "ALPHA_MAX": constants.ALPHA_MAX,
    "TRANSMITTANCE_MIN": constants.TRANSMITTANCE_MIN,
    "CONTACT_TOLERANCE": constants.CONTACT_TOLERANCE,
    "SURFACE_ALPHA": constants.SURFACE_ALPHA,
}
"""The numbers that all rasterisers share, compiled in."""

logger = logging.getLogger(__name__)


def library(device: torch.device) -> Path:
    """Path of the compiled kernels for a CUDA device; compiles them if this version was never built on this machine.

    Processes that need them at the same time wait for the first. One that is killed while it compiles leaves nothing
    that a later one would wait for or take.

    Raises:
        SceneError: the named library does not exist, or there is no working CUDA compiler.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise SceneError(f"{LIBRARY_VARIABLE} names {named}, which is no file; build it or unset the variable")
        return Path(named)
    try:
        return _built_once(_kept_in(), architecture(device))
    except (OSError, RuntimeError, SceneError) as error:
        raise SceneError(
            f"the CUDA renderer could not be compiled ({type(error).__name__}: {error}); install the CUDA toolkit "
            f"(nvcc of PyTorch's CUDA version), name a library built elsewhere ({REBUILD}) in {LIBRARY_VARIABLE}, or "
            "use rasterizer=gsplat"
        ) from error


def compile_library(out: Path, architecture: str = "sm_90") -> None:
    """Compile the kernels with nvcc alone: the result depends on neither PyTorch nor Python.

    Raises:
        SceneError: nvcc is missing or fails.
    """
    command = [_compiler(), f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", *_flags()]
    command += [f"-DVERSION={version()}", "-o", str(out), str(FOLDER / "kernels.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SceneError(f"nvcc failed on the CUDA renderer: {done.stderr.strip()[-2000:]}")


def architecture(device: torch.device) -> str:
    """What nvcc calls a CUDA device's generation, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def version() -> str:
    """Digest of all that decides what the kernels do: their source and the numbers compiled in."""
    digest = hashlib.sha256(" ".join(_flags()).encode())
    for source in sorted(FOLDER.glob("*.cu*")):
        content = source.read_bytes()
        digest.update(f"{source.name} {len(content)}\n".encode() + content)
    return f"v{digest.hexdigest()[:16]}"


def _built_once(folder: Path, architecture: str) -> Path:
    """The library of this version in ``folder``, compiled there if it is missing."""
    built = folder / f"gsrl_splat_{version()}_{architecture}.so"
    if built.is_file():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(built.with_suffix(".lock")):
        if not built.is_file():  # nobody built it while we waited
            logger.warning("compiling the CUDA kernels, up to a minute; they are kept in %s", folder)
            unfinished = f"building-{built.stem}-"
            for left in folder.glob(f"{unfinished}*"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            # A folder of its own: if we are killed, nvcc may live on and write.
            with tempfile.TemporaryDirectory(dir=folder, prefix=unfinished) as own:
                compile_library(Path(own) / built.name, architecture)
                (Path(own) / built.name).replace(built)
    return built


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Hold ``lock``; the system takes it from a process that dies, whatever becomes of the file."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _kept_in() -> Path:
    """Folder of the compiled libraries: where PyTorch is told to keep extensions, or the user's cache."""
    told = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsrl"


def _compiler() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise SceneError("no CUDA compiler: nvcc is neither on the PATH nor in CUDA_HOME; install the CUDA toolkit")
    return nvcc


def _flags() -> list[str]:
    return ["-std=c++17", "-O3", *(f"-D{name}={value!r}f" for name, value in DEFINED.items())]


def main() -> None:
    """Compile the kernels into a file that ``GSRL_CUDA_LIBRARY`` can name on a machine without a compiler."""
    parser = argparse.ArgumentParser(prog="python -m gsrl_core.splat.cuda.build", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.so", help="the file to write")
    parser.add_argument("architecture", nargs="?", default="sm_90", help="of the GPU (default: sm_90)")
    options = parser.parse_args()
    compile_library(options.out, options.architecture)


if __name__ == "__main__":
    main()
