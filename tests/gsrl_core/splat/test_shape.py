import math

import pytest
import torch

from gsrl_core.splat.shape import NEEDLE_RANK, effective_rank, needle_penalty


def logs(*scales):
    return torch.tensor([scales], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("scales", "rank"), [((2.0, 2.0, 2.0), 3.0), ((5.0, 5.0, 1e-6), 2.0), ((1.0, 1e-6, 1e-6), 1.0)]
)
def test_ball_disc_and_needle(scales, rank):
    assert float(effective_rank(logs(*scales))) == pytest.approx(rank, abs=1e-6)


def test_rank_by_hand_and_whatever_the_size():
    # Squared scales 4 : 1 : 1, shares 2/3, 1/6, 1/6.
    entropy = -(2 / 3 * math.log(2 / 3) + 2 / 6 * math.log(1 / 6))
    for size in (1.0, 1e-3):
        assert float(effective_rank(logs(2 * size, size, size))) == pytest.approx(math.exp(entropy))


def test_only_needles_pay_and_the_gradient_widens_them():
    assert float(needle_penalty(logs(1.0, 1.0, 1e-4))) == pytest.approx(0, abs=1e-4)
    needle = logs(1.0, 0.05, 0.04).requires_grad_()
    assert float(effective_rank(needle)) < NEEDLE_RANK + 0.02
    penalty = needle_penalty(needle)
    penalty.backward()
    assert float(penalty) > 3
    assert needle.grad[0, 0] > 0 > needle.grad[0, 1]


def test_the_penalty_is_a_mean():
    both = torch.cat([logs(1.0, 0.01, 0.01), logs(1.0, 1.0, 1.0)])
    assert float(needle_penalty(both)) == pytest.approx(float(needle_penalty(both[:1])) / 2)
