import math

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import quat_to_matrix, rotvec_to_matrix
from gsrl_core.splat.gaussians import Gaussians


def covariances(gaussians):
    axes = quat_to_matrix(gaussians.quats) * gaussians.log_scales.exp()[:, None, :]
    return axes @ axes.mT


ROTATION = rotvec_to_matrix(torch.tensor([0.4, -0.2, 1.3]))


def test_a_similarity_maps_means_and_covariances(random_gaussians):
    gaussians = random_gaussians()
    moved = gaussians.transformed(ROTATION, torch.tensor([1.0, 2.0, 3.0]), 0.5)
    torch.testing.assert_close(moved.means, 0.5 * gaussians.means @ ROTATION.T + torch.tensor([1.0, 2.0, 3.0]))
    expected = 0.25 * ROTATION @ covariances(gaussians) @ ROTATION.T
    torch.testing.assert_close(covariances(moved), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.log_scales, gaussians.log_scales - math.log(2))


def test_transforming_back_restores_everything(random_gaussians):
    gaussians = random_gaussians()
    there = gaussians.transformed(ROTATION, torch.tensor([1.0, 2.0, 3.0]), 2.0)
    back = there.transformed(ROTATION.T, -0.5 * ROTATION.T @ torch.tensor([1.0, 2.0, 3.0]), 0.5)
    torch.testing.assert_close(back.means, gaussians.means, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back.harmonics, gaussians.harmonics, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(covariances(back), covariances(gaussians), atol=1e-4, rtol=1e-3)


def test_an_anisotropic_stretch_maps_covariances_exactly(random_gaussians):
    gaussians, factors = random_gaussians(), torch.tensor([0.5, 2.0, 1.5])
    stretched = gaussians.stretched(factors)
    expected = torch.diag(factors) @ covariances(gaussians) @ torch.diag(factors)
    torch.testing.assert_close(covariances(stretched), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stretched.means, gaussians.means * factors)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scales_that_are_not_positive_are_refused(scale, random_gaussians):
    with pytest.raises(SceneError, match="positive"):
        random_gaussians().transformed(torch.eye(3), torch.zeros(3), scale)
    with pytest.raises(SceneError, match="positive"):
        random_gaussians().stretched(torch.tensor([1.0, scale, 1.0]))


def test_concatenation_pads_the_lower_degree(random_gaussians):
    low, high = random_gaussians(2, 0), random_gaussians(3, 3)
    both = Gaussians.concatenate([low, high])
    assert len(both) == 5 and both.sh_degree == 3
    assert both.harmonics[:2, 1:].abs().sum() == 0
    torch.testing.assert_close(both.select(slice(2, 5)).harmonics, high.harmonics)
    with pytest.raises(SceneError, match="no parts"):
        Gaussians.concatenate([])


def test_degree_can_be_cut_and_restored(random_gaussians):
    gaussians = random_gaussians(4, 3)
    cut = gaussians.with_sh_degree(1)
    torch.testing.assert_close(cut.harmonics, gaussians.harmonics[:, :4])
    assert cut.with_sh_degree(3).harmonics[:, 4:].abs().sum() == 0


def test_selection_by_mask_and_index_agree(random_gaussians):
    gaussians = random_gaussians()
    mask = torch.tensor([True, False, True, False, False, True])
    for a, b in zip(gaussians.select(mask).tensors(), gaussians.select(mask.nonzero()[:, 0]).tensors(), strict=True):
        assert torch.equal(a, b)


def test_inconsistent_shapes_are_refused(random_gaussians):
    means, quats, log_scales, opacities, harmonics = random_gaussians().tensors()
    for wrong in [
        (means, quats[:, :3], log_scales, opacities, harmonics),
        (means, quats, log_scales, opacities[:, None], harmonics),
        (means[:2], quats, log_scales, opacities, harmonics),
        (means, quats, log_scales, opacities, harmonics[:, :5]),
        (means, quats, log_scales, opacities, harmonics[..., :2]),
    ]:
        with pytest.raises(SceneError):
            Gaussians(*wrong)
