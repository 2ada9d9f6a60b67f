import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import rotvec_to_matrix
from gsrl_core.splat import harmonics as sh


def directions(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64, generator=generator), dim=-1)


def test_basis_agrees_with_scipy():
    # 3DGS uses the real basis with the Condon-Shortley phase kept: m < 0 -> sqrt(2) Im, m > 0 -> sqrt(2) Re.
    d = directions(50)
    theta, phi = np.arccos(d[:, 2].numpy()), np.arctan2(d[:, 1].numpy(), d[:, 0].numpy())
    columns = []
    for degree in range(4):
        for order in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(order), theta, phi)
            part = value.real if order >= 0 else value.imag
            columns.append(part * (1 if order == 0 else np.sqrt(2)))
    np.testing.assert_allclose(sh.sh_basis(d, 3).numpy(), np.stack(columns, axis=1), atol=1e-12)


def test_basis_is_orthonormal_on_the_sphere():
    # Gauss-Legendre in z, uniform in azimuth: exact for polynomials of this degree.
    z, weight = np.polynomial.legendre.leggauss(8)
    azimuth = 2 * np.pi * np.arange(16) / 16
    grid = np.array([[np.sqrt(1 - a * a) * np.cos(p), np.sqrt(1 - a * a) * np.sin(p), a] for a in z for p in azimuth])
    basis = sh.sh_basis(torch.from_numpy(grid), 3).numpy()
    gram = basis.T @ (np.repeat(weight, 16)[:, None] * basis) * (2 * np.pi / 16)
    np.testing.assert_allclose(gram, np.eye(16), atol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_rotating_coefficients_equals_looking_from_the_turned_direction(degree):
    generator = torch.Generator().manual_seed(degree)
    coefficients = torch.randn(30, (degree + 1) ** 2, 3, dtype=torch.float64, generator=generator)
    rotation = rotvec_to_matrix(torch.tensor([0.7, -1.9, 0.4], dtype=torch.float64))
    d = directions(30)
    turned = sh.sh_colors(sh.rotate_harmonics(coefficients, rotation), d @ rotation.T)
    torch.testing.assert_close(turned, sh.sh_colors(coefficients, d))


def test_rotations_compose():
    coefficients = torch.randn(5, 16, 3, dtype=torch.float64)
    a = rotvec_to_matrix(torch.tensor([0.3, 0.1, 2.0], dtype=torch.float64))
    b = rotvec_to_matrix(torch.tensor([-1.0, 0.5, 0.2], dtype=torch.float64))
    torch.testing.assert_close(
        sh.rotate_harmonics(sh.rotate_harmonics(coefficients, b), a), sh.rotate_harmonics(coefficients, a @ b)
    )


def test_colors_are_half_plus_the_sum_and_never_negative():
    coefficients = torch.zeros(1, 4, 3)
    coefficients[0, 0] = torch.tensor([1.0, -5.0, 0.0])
    coefficients[0, 2] = 0.5  # the z function
    color = sh.sh_colors(coefficients, torch.tensor([[0.0, 0.0, 3.0]]))[0]
    assert color.tolist() == pytest.approx([0.5 + sh.C0 + 0.5 * sh.C1, 0.0, 0.5 + 0.5 * sh.C1])


def test_flat_colors_are_seen_from_everywhere():
    colors = torch.rand(8, 3)
    flat = sh.colors_to_harmonics(colors)
    torch.testing.assert_close(sh.sh_colors(flat, directions(8).float()), colors)


def test_an_unknown_coefficient_count_is_refused():
    with pytest.raises(SceneError, match="1, 4, 9, 16"):
        sh.sh_degree(15)
