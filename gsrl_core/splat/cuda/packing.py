"""A scene as the arrays that the kernels read: Gaussians cut into chunks that lie close together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import quat_to_matrix
from gsrl_core.splat.constants import ALPHA_MIN
from gsrl_core.splat.cuda.library import CHUNK, RUN, WARPS
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene

MAX_CHUNKS = (1 << 24) // CHUNK
"""An entry of a tile's list names its Gaussian with 24 bits."""


@dataclass(frozen=True)
class Packed:
    """Arrays on the device; layouts as in ``args.cuh``."""

    mean_reach: Tensor
    covariance_a: Tensor
    covariance_b: Tensor
    harmonics: Tensor
    chunks: Tensor
    """int32 [C, 4]: first Gaussian, count, body (M: static part), 0 for the static part and 1 for bodies."""
    runs: Tensor
    """float32 [C, WARPS, 8]: sphere (centre, radius) around what one warp projects, largest reach, padding."""
    static_chunks: int
    """The first this many chunks are the static part's."""
    bodies: int
    coefficients: int

    @property
    def body_chunks(self) -> int:
        """Number of chunks of all bodies."""
        return len(self.chunks) - self.static_chunks


def pack(scene: Scene, device: torch.device) -> Packed:
    """Sort a scene's Gaussians by body and place, and compute what depends on neither pose nor camera.

    Gaussians too faint to be drawn are left out.

    Raises:
        SceneError: more Gaussians than the kernels can number (about 16 million).
    """
    opacity = torch.sigmoid(scene.gaussians.logit_opacities.double())
    drawn = torch.nonzero(opacity >= ALPHA_MIN)[:, 0]
    gaussians = scene.gaussians.select(drawn).to(device)
    body = scene.body.to(drawn.device)[drawn].to(device).long()
    order = torch.argsort(_place(gaussians.means, body), stable=True)
    gaussians, body = gaussians.select(order), body[order]
    counts = torch.bincount(body + 1, minlength=len(scene.names) + 1).tolist()
    chunks = _chunks(counts)
    if len(chunks) > MAX_CHUNKS:
        raise SceneError(f"the CUDA renderer draws at most {MAX_CHUNKS * CHUNK} Gaussians; the scene has {len(body)}")
    arrays, table = _arrays(gaussians), torch.tensor(chunks, dtype=torch.int32, device=device).reshape(-1, 4)
    return Packed(
        *arrays,
        chunks=table,
        runs=_runs(arrays[0], table),
        static_chunks=-(-counts[0] // CHUNK),
        bodies=len(scene.names),
        coefficients=gaussians.harmonics.shape[1],
    )


def _chunks(counts: list[int]) -> list[tuple[int, int, int, int]]:
    """Chunks of ``counts`` Gaussians of the static part and of each body."""
    bodies, chunks, first = len(counts) - 1, [], 0
    for part, count in enumerate(counts):
        owner = bodies if part == 0 else part - 1
        chunks += [(first + at, min(CHUNK, count - at), owner, int(part > 0)) for at in range(0, count, CHUNK)]
        first += count
    return chunks


def _place(means: Tensor, body: Tensor) -> Tensor:
    """Sort keys int64 [N]: by body, then along a Morton curve, so that a chunk covers few tiles."""
    if not len(means):
        return body
    low, high = means.amin(0), means.amax(0)
    cell = ((means - low) / (high - low).clamp_min(1e-9) * 1023).nan_to_num(0.0).clamp(0, 1023).long()
    code = torch.zeros_like(body)
    for bit in range(10):
        for axis in range(3):
            code |= (cell[:, axis] >> bit & 1) << (3 * bit + axis)
    return ((body + 1) << 30) + code


def _runs(mean_reach: Tensor, chunks: Tensor) -> Tensor:
    """``Packed.runs`` of Gaussians [N, 4] that lie in ``chunks`` one after another."""
    counts = chunks[:, 1].long()
    chunk = torch.repeat_interleave(torch.arange(len(chunks), device=chunks.device), counts)
    within = torch.arange(len(chunk), device=chunks.device) - chunks[:, 0].long()[chunk]
    run = chunk * WARPS + within // RUN

    def extreme(values: Tensor, reduce: str) -> Tensor:
        out = values.new_zeros(len(chunks) * WARPS, values.shape[1])
        return out.scatter_reduce(0, run[:, None].expand_as(values), values, reduce, include_self=False)

    means, reach = mean_reach[:, :3], mean_reach[:, 3:]
    center = (extreme(means, "amin") + extreme(means, "amax")) / 2
    radius = extreme((means - center[run]).norm(dim=1, keepdim=True), "amax") * 1.0001 + 1e-5
    padding = center.new_zeros(len(center), 3)
    return torch.cat([center, radius, extreme(reach, "amax"), padding], dim=1).reshape(-1, WARPS, 8).contiguous()


def _arrays(gaussians: Gaussians) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = gaussians.log_scales.double().exp()
    axes = quat_to_matrix(torch.nn.functional.normalize(gaussians.quats.double(), dim=-1)) * scales[:, None, :]
    covariance = axes @ axes.mT
    opacity = torch.sigmoid(gaussians.logit_opacities.double())
    reach = (2 * (opacity / ALPHA_MIN).log().clamp_min(0)).sqrt() * scales.amax(-1)
    xx, xy, xz, yy, yz, zz = (covariance[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
    columns = (
        torch.cat([gaussians.means.double(), reach[:, None]], dim=1),
        torch.stack([xx, xy, xz, yy], dim=1),
        torch.stack([yz, zz, opacity.log2(), torch.zeros_like(zz)], dim=1),
    )
    return (*(column.float().contiguous() for column in columns), gaussians.harmonics.float().contiguous())  # pyright: ignore[reportReturnType]
