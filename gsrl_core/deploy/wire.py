"""msgpack with numpy arrays, byte for byte as openpi's client and server write them.

An array is a map with BYTES keys {b"__ndarray__": True, b"data", b"dtype": "<f4", b"shape"}; a numpy scalar is
{b"__npgeneric__": True, b"data", b"dtype"}. Object, void and complex dtypes are refused on both sides.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from gsrl_core.errors import PackageError

MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes that one message may have; far above a few camera pictures."""

_REFUSED_KINDS = "VOc"


def pack(message: object) -> bytes:
    """Encode nested dicts, lists, scalars and numpy arrays. Raises PackageError for unsupported dtypes."""
    return msgpack.packb(message, default=_encode)


def unpack(message: bytes) -> Any:
    """Decode; arrays come back read-only (copy before editing).

    Raises:
        PackageError: not msgpack, or an array whose dtype, shape and data do not fit together.
    """
    try:
        return msgpack.unpackb(message, object_hook=_decode, strict_map_key=False)
    except PackageError:
        raise
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise PackageError(
            f"{len(message)} bytes are not a msgpack message ({type(error).__name__}: {error})"
        ) from error


def _encode(value: object) -> dict[bytes, object]:
    if not isinstance(value, np.ndarray | np.generic):
        raise PackageError(f"{type(value).__name__} cannot be sent; send numbers, texts, lists, dicts or numpy arrays")
    if value.dtype.kind in _REFUSED_KINDS:
        raise PackageError(f"arrays of dtype {value.dtype} cannot be sent; convert to a number or text dtype")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        dtype, shape, data = _dtype(value[b"dtype"]), tuple(value[b"shape"]), value[b"data"]
        if any(not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise PackageError(f"array of shape {shape} and dtype {dtype} does not fit its {len(data)} bytes of data")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    return value


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind in _REFUSED_KINDS:
        raise PackageError(f"arrays of dtype {dtype} are refused")
    return dtype
