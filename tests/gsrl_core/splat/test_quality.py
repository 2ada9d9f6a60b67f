import math

import numpy as np
import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.quality import photometric_loss, psnr, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 6, 7, generator=generator), size=(37, 45), mode="bilinear"
    )
    photo = smooth[0].permute(1, 2, 0).contiguous()
    return (photo + 0.1 * torch.randn(37, 45, 3, generator=generator)).clamp(0, 1), photo


def test_psnr_of_a_constant_error():
    # Every value off by 0.1: mse 0.01, 20 dB.
    assert psnr(torch.full((20, 20, 3), 0.4), torch.full((20, 20, 3), 0.5)) == pytest.approx(20.0, abs=1e-4)


def test_equal_pictures(pair):
    _, photo = pair
    assert psnr(photo, photo) == math.inf
    assert ssim(photo, photo).item() == pytest.approx(1.0, abs=1e-6)


def test_ssim_of_constant_pictures_by_hand():
    # No variance: (2 a b + C1) / (a^2 + b^2 + C1).
    a, b = 0.2, 0.6
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    found = ssim(torch.full((20, 30, 3), a, dtype=torch.float64), torch.full((20, 30, 3), b, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_ssim_equals_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    picture, photo = pair
    expected = metrics.structural_similarity(
        picture.numpy(), photo.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
        channel_axis=2, truncate=3.34,
    )  # fmt: skip
    assert ssim(picture, photo).item() == pytest.approx(expected, abs=1e-5)


def test_ssim_by_explicit_windows(pair):
    picture, photo = (t[:14, :13].double().numpy() for t in pair)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    weights /= weights.sum()
    values = []
    for v in range(4):
        for u in range(3):
            for c in range(3):
                x, y = picture[v : v + 11, u : u + 11, c], photo[v : v + 11, u : u + 11, c]
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    found = ssim(torch.from_numpy(picture), torch.from_numpy(photo)).item()
    assert found == pytest.approx(float(np.mean(values)), abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_fused_loss_matches_autograd(pair, weight):
    picture, photo = pair
    fused = picture.clone().requires_grad_()
    value = photometric_loss(fused, photo, weight)
    (3 * value).backward()
    plain = picture.double().requires_grad_()
    expected = (1 - weight) * (plain - photo).abs().mean() + weight * (1 - ssim(plain, photo.double()))
    (3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (fused.grad - plain.grad).norm() <= 1e-3 * plain.grad.norm()


def test_other_dtypes_take_the_plain_path(pair):
    picture, photo = (t.double() for t in pair)
    assert photometric_loss(picture, photo, 0.2).item() == pytest.approx(
        photometric_loss(picture.float(), photo.float(), 0.2).item(), abs=1e-5
    )


@pytest.mark.parametrize(("size", "text"), [((10, 40, 3), "smaller"), ((40, 40, 1), "cannot be compared")])
def test_pictures_that_cannot_be_compared(size, text):
    with pytest.raises(SceneError, match=text):
        photometric_loss(torch.zeros(size), torch.zeros(size), 0.2)
