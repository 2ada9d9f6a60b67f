"""Real spherical harmonics of degree 0 to 3 in the sign convention of INRIA's 3DGS and gsplat."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from gsrl_core.errors import SceneError

DEGREE_OF_COUNT = {1: 0, 4: 1, 9: 2, 16: 3}
"""Number of coefficients per colour channel -> degree."""
C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


def sh_degree(count: int) -> int:
    """The degree whose basis has ``count`` functions.

    Raises:
        SceneError: ``count`` is not 1, 4, 9 or 16.
    """
    if count not in DEGREE_OF_COUNT:
        raise SceneError(f"{count} spherical-harmonic coefficients per channel; allowed: 1, 4, 9, 16 (degree 0 to 3)")
    return DEGREE_OF_COUNT[count]


def sh_basis(direction: Tensor, degree: int) -> Tensor:
    """Basis values [..., (degree + 1)^2] in unit directions [..., 3] (3DGS, Kerbl et al. 2023, sh_utils.py)."""
    x, y, z = direction.unbind(-1)
    values = [torch.full_like(x, C0)]
    if degree >= 1:
        values += [-C1 * y, C1 * z, -C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        values += [
            C2[0] * x * y,
            C2[1] * y * z,
            C2[2] * (2 * zz - xx - yy),
            C2[3] * x * z,
            C2[4] * (xx - yy),
        ]
    if degree >= 3:
        xx, yy, zz = x * x, y * y, z * z
        values += [
            C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            C3[4] * x * (4 * zz - xx - yy),
            C3[5] * z * (xx - yy),
            C3[6] * x * (xx - 3 * yy),
        ]
    return torch.stack(values, dim=-1)


def sh_colors(harmonics: Tensor, direction: Tensor) -> Tensor:
    """Colours [..., N, 3], ``max(0, 0.5 + sum_k harmonics_k basis_k)``.

    Args:
        harmonics: [..., N, K, 3] coefficients, K in {1, 4, 9, 16}.
        direction: [..., N, 3] from the eye to the Gaussian, in the frame of the coefficients; any non-zero length.
    """
    degree = sh_degree(harmonics.shape[-2])
    if degree == 0:  # exact and without the cost of directions
        return (0.5 + C0 * harmonics[..., 0, :]).clamp_min(0)
    basis = sh_basis(torch.nn.functional.normalize(direction, dim=-1), degree)
    return (0.5 + (harmonics * basis[..., None]).sum(-2)).clamp_min(0)


def colors_to_harmonics(colors: Tensor) -> Tensor:
    """Degree-0 coefficients [N, 1, 3] that show ``colors`` [N, 3] (0 to 1) from every side."""
    return ((colors - 0.5) / C0)[..., None, :]


def rotate_harmonics(harmonics: Tensor, rotation: Tensor) -> Tensor:
    """Coefficients [N, K, 3] of the functions turned by ``rotation`` [3, 3].

    Law: ``sh_colors(rotate_harmonics(h, R), R d) == sh_colors(h, d)``. Each band maps onto itself by an orthogonal
    matrix, found by projection: with basis values A at sampled directions and B at the same directions turned back,
    ``A D = B``, solved exactly because A has full column rank.
    """
    degree = sh_degree(harmonics.shape[-2])
    if degree == 0:
        return harmonics
    directions, inverses = _samples(degree)
    turned_back = directions @ rotation.detach().to("cpu", torch.float64)
    basis = sh_basis(turned_back, degree)
    parts = [harmonics[..., :1, :]]
    for band in range(1, degree + 1):
        rows = slice(band * band, (band + 1) * (band + 1))
        matrix = (inverses[band - 1] @ basis[:, rows]).to(harmonics)
        parts.append(matrix @ harmonics[..., rows, :])
    return torch.cat(parts, dim=-2)


@cache
def _samples(degree: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    # A Fibonacci sphere: nearly uniform, so that every band's least-squares problem is well conditioned.
    count = 64
    index = torch.arange(count, dtype=torch.float64) + 0.5
    z = 1 - 2 * index / count
    azimuth = torch.pi * (1 + 5**0.5) * index
    radius = (1 - z * z).sqrt()
    directions = torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), z], dim=-1)
    basis = sh_basis(directions, degree)
    bands = range(1, degree + 1)
    return directions, tuple(torch.linalg.pinv(basis[:, b * b : (b + 1) * (b + 1)]) for b in bands)
