"""The compiled kernels as Python functions. Mirrors ``args.cuh`` field by field."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.cuda import build

CHUNK, RUN, WARPS, VIEW, CLASSES, TILE, STATE = 1024, 128, 8, 16, 4, 16, 8
"""Sizes that the kernels were written for; STATE is the number of uint32 that one pass keeps its counters in."""
OVER_LAYER, STATIC_ONLY, LIVE = 0, 1, 2
"""Bodies over a picture of the static part; that picture itself; both drawn together."""

_POINTERS = (
    *("mean_reach", "covariance_a", "covariance_b", "harmonics", "chunks", "runs", "poses", "world_to_camera", "K"),
    *("layer_color", "layer_open", "layer_picture", "layer_rows", "rgb", "depth", "alpha", "body"),
    *("views", "records", "depths", "visible", "counts", "bases", "starts", "queue", "state", "keys"),
)
_INTEGERS = (
    *("environments", "bodies", "camera_stride", "width", "height"),
    *("first_chunk", "chunk_count", "coefficients", "mode", "extras"),
)


class Args(ctypes.Structure):
    """Arguments of one pass; pointers as plain integers."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("room", ctypes.c_longlong),
        ("background", ctypes.c_float * 3),
        *((name, ctypes.c_int) for name in _INTEGERS),
    ]  # fmt: skip


class Library:
    """The functions of one compiled library.

    Raises:
        SceneError: it cannot be loaded, or was built from another version of the source.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self._render, self._error = self._library.gsrl_splat_render, self._library.gsrl_splat_error
            built_from, args_bytes = self._library.gsrl_splat_version, self._library.gsrl_splat_args_bytes
        except (OSError, AttributeError) as error:
            raise SceneError(
                f"{path} is not a library of this CUDA renderer ({error}); build it again: {build.REBUILD}"
            ) from error
        self._render.argtypes, self._error.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_char_p
        built_from.restype = ctypes.c_char_p
        found, expected = (built_from().decode(), args_bytes()), (build.version(), ctypes.sizeof(Args))
        if found != expected:
            raise SceneError(
                f"{path} was built from another version of the CUDA renderer ({found}, not {expected}); build it "
                f"again: {build.REBUILD}"
            )

    def render(self, args: Args, stream: int) -> None:
        """Enqueue one pass on a CUDA stream.

        Raises:
            SceneError: a launch failed.
        """
        code = self._render(ctypes.addressof(args), stream)
        if code:
            raise SceneError(f"the CUDA renderer failed to start: {self._error(code).decode()}")


def load(device: torch.device) -> Library:
    """The kernels for a CUDA device, compiled if need be.

    Raises:
        SceneError: see :func:`build.library`.
    """
    return _opened(build.library(device))


@cache
def _opened(path: Path) -> Library:
    return Library(path)
