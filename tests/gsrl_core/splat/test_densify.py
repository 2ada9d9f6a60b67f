import math

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import intrinsics
from gsrl_core.splat.densify import Growth, Trainable, budget_at, split_along_longest_axis
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.raster_torch import project


@pytest.mark.parametrize(("step", "expected"), [(0, 100), (50, 175), (100, 200), (150, 200)])
def test_budget_by_hand(step, expected):
    assert budget_at(step, 0, 100, 100, 200) == expected


def test_budget_never_falls_below_what_is_there():
    assert budget_at(50, 0, 100, 300, 200) == 300


def test_a_split_keeps_mass_and_second_moment(random_gaussians):
    model = Trainable(random_gaussians(count=5, degree=1), 1.0)
    index = torch.tensor([1, 3])
    children = split_along_longest_axis(model, index)
    view = (torch.eye(4), intrinsics(1, 1, 0, 0), 1, 1)
    far = torch.tensor([0.0, 0.0, 1e3])  # far away the projection is orthographic

    def moment(values, rows):
        means = values["means"][rows]
        projected = project(means + far, values["quats"][rows], values["log_scales"][rows], *view)
        covariance = (projected.covariances2d - 0.3 * torch.eye(2)) * 1e6
        return means, covariance

    parents = {name: model[name].detach() for name in ("means", "quats", "log_scales")}
    parent_means, parent_covariance = moment(parents, index)
    a, cov_a = moment(children, torch.tensor([0, 1]))
    b, cov_b = moment(children, torch.tensor([2, 3]))
    assert torch.allclose((a + b) / 2, parent_means, atol=1e-5)
    # Mass along the split axis: opacity times deviation, halves together.
    deviation, axis = parents["log_scales"][index].max(-1)
    shrunk = children["log_scales"][:2].gather(1, axis[:, None])[:, 0].exp()
    opacity = torch.sigmoid(children["logit_opacities"][:2])
    assert torch.allclose(2 * opacity * shrunk, torch.sigmoid(model["logit_opacities"][index]) * deviation.exp())
    offset = ((a - b) / 2)[:, :2]
    assert torch.allclose((cov_a + cov_b) / 2 + offset[:, :, None] * offset[:, None], parent_covariance, atol=0.05)


def model_with_moments(gaussians):
    model = Trainable(gaussians, 100.0)
    for name in ("means", "quats", "log_scales", "logit_opacities", "base", "detail"):
        model[name].grad = torch.ones_like(model[name])
    model.step()
    return model


def test_growth_prunes_the_transparent_and_splits_the_ones_with_a_gradient(random_gaussians):
    gaussians = random_gaussians(count=6, degree=1)
    logits = torch.tensor([2.0, -9.0, 2.0, 2.0, 2.0, 2.0])
    model = model_with_moments(Gaussians(*gaussians.tensors()[:3], logits, gaussians.harmonics))
    growth = Growth(6)
    gradient = torch.zeros(6, 2)
    gradient[[2, 4]] = 1.0
    growth.observe(gradient, torch.ones(6), 100)
    before = model["means"].detach().clone()
    facts = growth.apply(model, 100, torch.Generator().manual_seed(0))
    assert facts == {"pruned": 1, "split": 2} and len(model) == 7
    kept = [0, 3, 5]  # untouched rows keep value and optimizer state
    assert torch.equal(model["means"].detach()[[0, 2, 4]], before[kept])
    moments = model.optimizer.state[model["means"]]
    assert (moments["exp_avg"][[0, 2, 4]] != 0).all()
    assert (moments["exp_avg"][[1, 3, 5, 6]] == 0).all()
    assert len(growth.score) == 7 and growth.score.sum() == 0


def test_growth_respects_the_budget(random_gaussians):
    model = model_with_moments(random_gaussians(count=50, degree=0))
    growth = Growth(50)
    growth.observe(torch.rand(50, 2), torch.ones(50), 100)
    growth.apply(model, 53, torch.Generator().manual_seed(0))
    assert len(model) <= 53


def test_unseen_gaussians_have_no_score():
    growth = Growth(2)
    growth.observe(torch.ones(2, 2), torch.tensor([0.0, 3.0]), 100)
    assert growth.score.tolist() == [0.0, pytest.approx(50 * math.sqrt(2))]
    assert growth.seen.tolist() == [0, 1]


def test_nothing_left_is_an_error(random_gaussians):
    gaussians = random_gaussians(count=4, degree=0)
    model = Trainable(Gaussians(*gaussians.tensors()[:3], torch.full((4,), -20.0), gaussians.harmonics), 1.0)
    with pytest.raises(SceneError, match="all 4 Gaussians"):
        Growth(4).apply(model, 10, torch.Generator())
