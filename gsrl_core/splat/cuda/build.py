"""Compiling the CUDA kernels, once for each version of their source, and finding a library that was built before."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat import constants

LIBRARY_VARIABLE = "GSRL_CUDA_LIBRARY"
"""Path of a library built elsewhere (``python -m gsrl_core.splat.cuda.build OUT.so``); used instead of compiling."""
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


def library() -> Path:
    """Path of the compiled kernels; compiles them if this version was never built on this machine.

    Raises:
        SceneError: the named library does not exist, or there is no working CUDA compiler.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise SceneError(f"{LIBRARY_VARIABLE} names {named}, which is no file; build it or unset the variable")
        return Path(named)
    from torch.utils import cpp_extension

    name = f"gsrl_splat_{_version()}"
    build_folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    built = build_folder / f"{name}{cpp_extension.LIB_EXT}"
    if built.is_file():  # the name holds the version, so nothing needs to be checked
        return built
    try:
        cpp_extension.load(
            name, [str(FOLDER / "kernels.cu")], extra_cuda_cflags=_flags(), build_directory=str(build_folder),
            is_python_module=False,
        )  # fmt: skip
    except (OSError, RuntimeError, IndexError, subprocess.SubprocessError) as error:
        raise SceneError(
            f"the CUDA renderer could not be compiled ({type(error).__name__}: {error}); install the CUDA toolkit "
            f"(nvcc of PyTorch's CUDA version) and ninja, name a library built elsewhere in {LIBRARY_VARIABLE}, or use "
            "rasterizer=gsplat"
        ) from error
    return built


def compile_library(out: Path, architecture: str = "sm_90") -> None:
    """Compile the kernels with nvcc alone: the result depends on neither PyTorch nor Python.

    Raises:
        SceneError: nvcc is missing or fails.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SceneError("no CUDA compiler: nvcc is not on the PATH; install the CUDA toolkit")
    command = [nvcc, f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC", *_flags(), "-o", str(out)]
    done = subprocess.run([*command, str(FOLDER / "kernels.cu")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SceneError(f"nvcc failed on the CUDA renderer: {done.stderr.strip()[-2000:]}")


def _flags() -> list[str]:
    return ["-std=c++17", "-O3", *(f"-D{name}={value!r}f" for name, value in DEFINED.items())]


def _version() -> str:
    digest = hashlib.sha256(" ".join([*_flags(), str(torch.version.cuda)]).encode())
    for source in sorted(FOLDER.glob("*.cu*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    compile_library(Path(sys.argv[1]), *sys.argv[2:3])
