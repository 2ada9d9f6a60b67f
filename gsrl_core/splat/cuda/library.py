"""The compiled kernels as Python functions. Mirrors ``args.cuh`` field by field."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from gsrl_core.errors import SceneError
from gsrl_core.splat.cuda import build

CHUNK, RUN, WARPS, VIEW, CLASSES, TILE, STATE = 1024, 128, 8, 16, 4, 16, 8
"""Sizes that the kernels were written for; STATE is the number of uint32 that one pass keeps its counters in."""
OVER_LAYER, STATIC_ONLY, LIVE = 0, 1, 2
"""Bodies over a picture of the static part; that picture itself; both drawn together."""

_POINTERS = (
    *("mean_reach", "covariance_a", "covariance_b", "harmonics", "chunks", "runs", "poses", "world_to_camera", "K"),
    *("layer_color", "layer_open", "layer_picture", "rgb", "depth", "alpha", "body"),
    *("views", "records", "depths", "visible", "counts", "bases", "starts", "queue", "state", "keys"),
)
_INTEGERS = (
    *("environments", "bodies", "camera_stride", "layer_stride", "width", "height"),
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
            built_with = self._library.gsrl_splat_built_with
        except (OSError, AttributeError) as error:
            raise SceneError(f"{path} is not a library of the CUDA renderer ({error}); build it again") from error
        self._render.argtypes, self._error.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_char_p
        values = (ctypes.c_double * 8)()
        built_with(values)
        expected = [float(ctypes.sizeof(Args)), *list(build.DEFINED.values())[:7]]
        if any(abs(a - b) > 1e-6 * abs(b) for a, b in zip(values, expected, strict=True)):
            raise SceneError(f"{path} was built from another version ({list(values)}, not {expected}); build it again")

    def render(self, args: Args, stream: int) -> None:
        """Enqueue one pass on a CUDA stream.

        Raises:
            SceneError: a launch failed.
        """
        code = self._render(ctypes.addressof(args), stream)
        if code:
            raise SceneError(f"the CUDA renderer failed to start: {self._error(code).decode()}")


@cache
def load() -> Library:
    """The kernels, compiled if need be.

    Raises:
        SceneError: see :func:`build.library`.
    """
    return Library(build.library())
