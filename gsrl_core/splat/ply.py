"""Splat files in the INRIA PLY layout.

Vertex properties: x y z [nx ny nz] f_dc_0..2 f_rest_0..(3k-1) opacity scale_0..2 rot_0..3. ``f_rest`` is channel-major
(all red coefficients, then green, then blue), opacity a logit, scales natural logarithms, rot wxyz.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.gaussians import Gaussians

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_BYTE_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "<"}
_REST_COUNTS = {0: 1, 9: 4, 24: 9, 45: 16}
_MAX_HEADER = 1 << 16


def read_ply(path: Path) -> Gaussians:
    """Gaussians of a splat file: ascii or binary, any SH degree 0 to 3, extra properties ignored.

    Raises:
        SceneError: unreadable, not a PLY, a property missing, body truncated, non-finite rows.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SceneError(f"{path}: cannot be read ({error.strerror or error}); give a splat file (.ply)") from error
    encoding, count, row, body = _parse_header(path, content)
    table = _parse_ascii(path, body, count, row) if encoding == "ascii" else _parse_binary(path, body, count, row)
    return _from_table(path, table)


def write_ply(path: Path, gaussians: Gaussians) -> None:
    """Write binary little-endian, atomically (a reader sees the old file or the whole new one)."""
    tensors = [tensor.detach().to("cpu", torch.float32).numpy() for tensor in gaussians.tensors()]
    means, quats, log_scales, logit_opacities, harmonics = tensors
    rest = harmonics[:, 1:].transpose(0, 2, 1).reshape(len(means), 3 * (harmonics.shape[1] - 1))
    columns = [means, np.zeros_like(means), harmonics[:, 0], rest, logit_opacities[:, None], log_scales, quats]
    names = ["x", "y", "z", "nx", "ny", "nz", *(f"f_dc_{i}" for i in range(3))]
    names += [f"f_rest_{i}" for i in range(rest.shape[1])]
    names += ["opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    _write_atomically(path, "\n".join(header).encode() + np.concatenate(columns, axis=1).astype("<f4").tobytes())


def _parse_header(path: Path, content: bytes) -> tuple[str, int, np.dtype, bytes]:
    if content[:3] != b"ply" or content[3:4] not in (b"\n", b"\r"):
        raise SceneError(f"{path}: not a PLY file (it starts with {content[:8]!r}); give a 3D Gaussian splat .ply")
    marker = content.find(b"end_header", 0, _MAX_HEADER)
    end = content.find(b"\n", marker)
    if marker < 0 or end < 0:
        raise SceneError(f"{path}: the PLY header has no end_header line; the file is cut off or not a PLY")
    encoding, elements = "", []
    for line in content[:marker].decode("latin-1").split("\n"):
        words = line.split()
        if words[:1] == ["format"] and len(words) >= 2:
            encoding = words[1]
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdigit():
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"] and elements:
            elements[-1][2].append(words[1:])
    if encoding not in _BYTE_ORDER:
        raise SceneError(f"{path}: PLY format {encoding!r}; allowed: {', '.join(_BYTE_ORDER)}")
    if not elements or elements[0][0] != "vertex":
        found = elements[0][0] if elements else "none"
        raise SceneError(f"{path}: the first PLY element is {found!r}, must be 'vertex'; this is not a splat file")
    _, count, properties = elements[0]
    return encoding, count, _row_type(path, properties, _BYTE_ORDER[encoding]), content[end + 1 :]


def _row_type(path: Path, properties: list[list[str]], order: str) -> np.dtype:
    if not properties:
        raise SceneError(f"{path}: its vertices have no properties; this is not a splat file")
    fields = []
    for words in properties:
        if len(words) != 2 or words[0] not in _TYPES:
            raise SceneError(f"{path}: vertex property {' '.join(words)!r} is not a number; this is not a splat file")
        fields.append((words[1], order + _TYPES[words[0]]))
    if len({name for name, _ in fields}) != len(fields):
        raise SceneError(f"{path}: a vertex property occurs twice in the header")
    return np.dtype(fields)


def _parse_binary(path: Path, body: bytes, count: int, row: np.dtype) -> np.ndarray:
    expected = count * row.itemsize
    if len(body) < expected:
        raise SceneError(
            f"{path}: truncated: {count} Gaussians of {row.itemsize} bytes need {expected} bytes after the header, "
            f"found {len(body)}; copy or export the file again"
        )
    return np.frombuffer(body, dtype=row, count=count)


def _parse_ascii(path: Path, body: bytes, count: int, row: np.dtype) -> np.ndarray:
    width = len(row.names or ())
    words = body.split()
    if len(words) < count * width:
        raise SceneError(
            f"{path}: truncated: {count} Gaussians of {width} values need {count * width} values, found {len(words)} "
            f"({len(body)} bytes); copy or export the file again"
        )
    try:
        values = np.array(words[: count * width], dtype=np.float64).reshape(count, width)
    except ValueError as error:
        raise SceneError(f"{path}: a value in the body is not a number ({error})") from error
    table = np.empty(count, dtype=row)
    for column, name in enumerate(row.names or ()):
        table[name] = values[:, column]
    return table


def _from_table(path: Path, table: np.ndarray) -> Gaussians:
    available = set(table.dtype.names or ())
    rest = sum(name.startswith("f_rest_") for name in available)
    if rest not in _REST_COUNTS:
        raise SceneError(f"{path}: {rest} f_rest properties; allowed: 0, 9, 24, 45 (spherical harmonics degree 0 to 3)")

    def columns(*names: str) -> torch.Tensor:
        missing = [name for name in names if name not in available]
        if missing:
            raise SceneError(
                f"{path}: property {', '.join(missing)} is missing; a splat file needs x y z, f_dc_0..2, opacity, "
                "scale_0..2, rot_0..3 (is this a point cloud or mesh?)"
            )
        return torch.from_numpy(np.stack([table[name] for name in names], axis=1).astype(np.float32))

    per_channel = _REST_COUNTS[rest] - 1
    base = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None, :]
    if per_channel:
        channel_major = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(-1, 3, per_channel)
        base = torch.cat([base, channel_major.transpose(1, 2)], dim=1)
    gaussians = Gaussians(
        means=columns("x", "y", "z"),
        quats=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        log_scales=columns("scale_0", "scale_1", "scale_2"),
        logit_opacities=columns("opacity")[:, 0],
        harmonics=base,
    )
    _check_rows(path, gaussians)
    return gaussians


def _check_rows(path: Path, gaussians: Gaussians) -> None:
    finite = torch.ones(len(gaussians), dtype=torch.bool)
    for tensor in gaussians.tensors():
        finite &= tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else tensor.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()[:, 0]
        raise SceneError(
            f"{path}: {len(bad)} of {len(gaussians)} Gaussians have a NaN or infinite value (first: row "
            f"{int(bad[0])}); remove them or export the file again"
        )
    zero = gaussians.quats.norm(dim=1) < 1e-12
    if zero.any():
        raise SceneError(f"{path}: {int(zero.sum())} Gaussians have a zero quaternion; export the file again")


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
