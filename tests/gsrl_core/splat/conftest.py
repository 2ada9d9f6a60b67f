import pytest
import torch

from gsrl_core.splat.gaussians import Gaussians


def _random_gaussians(count=6, degree=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, 3), (count, 4), (count, 3), (count,), (count, (degree + 1) ** 2, 3))
    return Gaussians(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.fixture
def random_gaussians():
    """A function ``(count, degree, seed) -> Gaussians`` with standard normal parameters."""
    return _random_gaussians
