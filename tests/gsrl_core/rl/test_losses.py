import math

import pytest
import torch
from torch import tensor

from gsrl_core.rl import losses


def test_the_surrogate_by_hand():
    # ρ = 1.5, 0.5, 1.5, 0.5 with A = 2, 2, -1, -1 and the range [0.9, 1.3]
    # A>0: -min(2*1.5, 2*1.3) = -2.6; -min(2*0.5, 2*0.9) = -1.0
    # A<0: max(1.5, 1.3) = 1.5;       max(0.5, 0.9) = 0.9
    ratio = tensor([1.5, 0.5, 1.5, 0.5]).log()
    advantages = tensor([2.0, 2.0, -1.0, -1.0])
    loss = losses.policy_loss(ratio, advantages, clip_low=0.1, clip_high=0.3)
    assert loss.tolist() == pytest.approx([-2.6, -1.0, 1.5, 0.9])


def test_gradient_vanishes_exactly_where_the_clip_fraction_counts():
    ratio = tensor([1.5, 0.5, 1.5, 0.5, 1.0]).log().requires_grad_()
    advantages = tensor([2.0, 2.0, -1.0, -1.0, 3.0])
    losses.policy_loss(ratio, advantages, clip_low=0.1, clip_high=0.3).sum().backward()
    clipped = losses.policy_clipped(ratio.detach(), advantages, clip_low=0.1, clip_high=0.3)
    assert clipped.tolist() == [True, False, False, True, False]
    assert ((ratio.grad == 0) == clipped).all()
    assert ratio.grad[4].item() == pytest.approx(-3.0)  # at ρ = 1 the gradient is that of -A log π


def test_dual_clip_bounds_the_loss_of_bad_actions_that_became_likely():
    ratio = tensor([10.0, 2.0, 10.0]).log()
    loss = losses.policy_loss(ratio, tensor([-1.0, -1.0, 1.0]), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, 2.0, -1.2])  # without it the first would be 10


def test_an_absurd_log_ratio_leaves_loss_and_gradient_finite():
    new = tensor([1e6, -1e6, 1e6], requires_grad=True)
    ratio = losses.log_ratio(new, torch.zeros(3))
    loss = losses.policy_loss(ratio, tensor([1.0, 1.0, -1.0]), clip_low=0.2, clip_high=0.2).sum()
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()


def test_huber_is_quadratic_inside_and_linear_outside():
    # δ = 2: 1²/2 = 0.5; 2²/2 = 2; 2 * (5 - 1) = 8
    assert losses.huber(tensor([1.0, -2.0, 5.0]), 2.0).tolist() == [0.5, 2.0, 8.0]


def test_value_loss_takes_the_worse_of_free_and_clipped():
    # V_old = 0, clip 0.2. V = 1, R = 1: free 0, limited (0.2 - 1)²/2 = 0.32.  V = 0.1: both (0.9)²/2 = 0.405.
    # V = 1, R = -1: free 2, limited (1.2)²/2 = 0.72 -> 2
    loss = losses.value_loss(
        tensor([1.0, 0.1, 1.0]), torch.zeros(3), tensor([1.0, 1.0, -1.0]), value_clip=0.2, huber_delta=10.0
    )
    assert loss.tolist() == pytest.approx([0.32, 0.405, 2.0])


def test_value_clip_ratio_is_measured_before_clamping():
    moved = losses.value_clipped(tensor([1.0, 0.1, -0.5]), torch.zeros(3), value_clip=0.2)
    assert moved.tolist() == [True, False, True]


def test_kl_estimates_agree_with_the_closed_form_between_gaussians():
    # KL(N(0,1) || N(m,1)) = m²/2
    shift = 0.3
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = -((x - shift) ** 2) / 2 + x**2 / 2
    assert losses.kl_k1(ratio).mean().item() == pytest.approx(shift**2 / 2, abs=2e-3)
    assert losses.kl_k3(ratio).mean().item() == pytest.approx(shift**2 / 2, abs=5e-4)
    assert losses.kl_k3(ratio).min() >= 0
    assert losses.kl_k3(tensor([math.log(2.0)])).item() == pytest.approx(1 - math.log(2.0))
