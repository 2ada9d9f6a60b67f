"""What this machine has and lacks, what each missing thing disables, and the line that mends it (Debian names)."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsrl_core.artifacts import gsrl_home

_GIB = 2**30
_MIN_FREE_GIB = 5.0
_MIN_MEMORY_GIB = 6.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    ok: bool
    found: str
    disables: str = ""
    """What does not work without it; empty when all is well."""
    remedy: str = ""
    """The line that installs it, or what to do."""

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look at everything; takes a second or two and changes nothing."""
    return [
        check() for check in (_python, _cores, _memory, _disk, *_LIBRARIES, _gpu, _cuda_compiler, _ffmpeg, _realtime)
    ]


def _library(soname: str, package: str, disables: str) -> Callable[[], Finding]:
    def look() -> Finding:
        try:
            ctypes.CDLL(soname)
        except OSError:
            return Finding(soname, False, "missing", disables, f"sudo apt install {package}")
        return Finding(soname, True, "found")

    return look


def missing_libraries() -> list[str]:
    """Debian packages of the shared libraries that the pipeline cannot do without and that are not here."""
    return [package for soname, package, disables in _REQUIRED if not _library(soname, package, disables)().ok]


_REQUIRED = (
    ("libGL.so.1", "libgl1", "import of cv2: reconstruction from photos, videos, ArUco tags"),
    ("libglib-2.0.so.0", "libglib2.0-0", "import of cv2: reconstruction from photos, videos, ArUco tags"),
    ("libX11.so.6", "libx11-6", "import of sapien: the whole simulation"),
)
_LIBRARIES = (
    *(_library(*required) for required in _REQUIRED),
    _library(
        "libvulkan.so.1",
        "libvulkan1 mesa-vulkan-drivers",
        "SAPIEN's own pictures: render_interface env and env+gs (the pipeline draws splats and does not need them)",
    ),
    _library("libusb-1.0.so.0", "libusb-1.0-0", "open3d: nerfstudio's process-data and exporter, RealSense cameras"),
)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    ok = sys.version_info[:2] == (3, 12) and (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return Finding(
        "python", ok, found, "" if ok else "everything", "" if ok else "uv python install 3.12, on Linux x86-64"
    )


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count >= 2:
        return Finding("cores", True, str(count))
    return Finding(
        "cores", False, str(count), "the laptop preset in minutes (it takes twice as long)", "give it 2 cores"
    )


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    if gib >= _MIN_MEMORY_GIB:
        return Finding("memory", True, f"{gib:.1f} GiB")
    return Finding(
        "memory", False, f"{gib:.1f} GiB", "fine-tuning may be killed", "lower sim.num_envs and ppo.micro_batch"
    )


def _disk() -> Finding:
    root = gsrl_home()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    gib = shutil.disk_usage(existing).free / _GIB
    if gib >= _MIN_FREE_GIB:
        return Finding("disk", True, f"{gib:.1f} GiB free for {root}")
    return Finding(
        "disk", False, f"{gib:.1f} GiB free for {root}", "checkpoints and scenes may not fit",
        "free some space, or set GSRL_HOME to a larger disk",
    )  # fmt: skip


def _gpu() -> Finding:
    disables = "presets one-gpu, full and cluster at their speed (the laptop preset runs on CPU)"
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not listed:
        return Finding("gpu", False, "no NVIDIA GPU", disables, "install a GPU and its driver, or use --preset laptop")
    return Finding("gpu", True, "; ".join(listed.splitlines()))


def _cuda_compiler() -> Finding:
    found = shutil.which("nvcc") or next(iter(map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))), None)
    if found:
        return Finding("nvcc", True, found)
    return Finding(
        "nvcc", False, "missing", "the CUDA renderer's and gsplat's kernels, which are compiled on first use",
        "sudo apt install nvidia-cuda-toolkit (or NVIDIA's cuda-toolkit of torch's CUDA version)",
    )  # fmt: skip


def _ffmpeg() -> Finding:
    found = shutil.which("ffmpeg")
    if found:
        return Finding("ffmpeg", True, found)
    if importlib.util.find_spec("av"):
        return Finding("ffmpeg", True, "no program, but PyAV (videos are read and written with it)")
    return Finding("ffmpeg", False, "missing", "videos in and out", "sudo apt install ffmpeg")


def _realtime() -> Finding:
    if Path("/sys/kernel/realtime").exists():
        return Finding("realtime", True, "PREEMPT_RT kernel")
    return Finding(
        "realtime", False, "ordinary kernel", "deploying on a robot from this machine (not the emulator)",
        "install a PREEMPT_RT kernel on the robot computer: sudo apt install linux-image-rt-amd64",
    )  # fmt: skip


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
