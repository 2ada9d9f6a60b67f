import math

import pytest
import torch

from gsrl_core.policy import flow


def test_sde_table_matches_the_published_vector():
    # facts: N = 5, noise_level = 0.5.
    w0, w1, std = flow.sde_table(5, 0.5)
    torch.testing.assert_close(w0, torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]))
    torch.testing.assert_close(w1, torch.tensor([0.6750, 0.4750, 0.3375, 0.1583, -0.03125]), atol=6e-5, rtol=0)
    torch.testing.assert_close(std, torch.tensor([0.5000, 0.4472, 0.2739, 0.1826, 0.1118]), atol=6e-5, rtol=0)


def test_sigma_matches_the_published_vector():
    # facts 1.1: sigma = 0.5 sqrt(t / (1 - t')), with t' = 0.8 at t = 1; std = sigma / sqrt(5)
    _, _, std = flow.sde_table(5, 0.5)
    expected = torch.tensor([1.1180, 1.0000, 0.6124, 0.4082, 0.2500])
    torch.testing.assert_close(std * math.sqrt(5), expected, atol=6e-5, rtol=0)
    # The scale is a factor, and the schedule does not know it.
    torch.testing.assert_close(flow.sde_table(5, 1.0)[2], 2 * std)


def test_sde_mean_is_the_papers_path_derived_anew_and_not_its_printed_equation_9():
    # facts 1.1: the paper's tau runs from noise to action, and v = a - eps. With tau = 1 - t and v = -u the step is
    #   mu = A + d [v - sigma^2 / (2 (1 - tau)) (A - tau v)];
    # its Eq. 9 as printed, A + d [v + sigma^2 / (2 tau) (A + (1 - tau) v)], is Flow-GRPO's and another number.
    steps, level = 5, 0.5
    x, u = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(11)).unbind(0)
    w0, w1, std = flow.sde_table(steps, level)
    for i, t in enumerate([1.0, 0.8, 0.6, 0.4, 0.2]):
        tau, v, sigma_squared = 1 - t, -u, float(std[i]) ** 2 * steps
        mean = flow.transition_mean(x, u, torch.tensor([t]), w0[i : i + 1], w1[i : i + 1])
        derived = x + (v - sigma_squared / (2 * (1 - tau)) * (x - tau * v)) / steps
        torch.testing.assert_close(mean, derived, atol=1e-6, rtol=1e-5)
        if tau > 0:
            printed = x + (v + sigma_squared / (2 * tau) * (x + (1 - tau) * v)) / steps
            assert (printed - mean).abs().max() > 1e-2


def test_sde_mean_equals_flow_grpo_form():
    # mu = x - d [v + sigma^2 / (2 t) (x + (1 - t) v)]
    steps, level = 5, 0.5
    x, v = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    w0, w1, std = flow.sde_table(steps, level)
    for i, t in enumerate([1.0, 0.8, 0.6, 0.4, 0.2]):
        sigma_squared = float(std[i]) ** 2 * steps
        expected = x - (v + sigma_squared / (2 * t) * (x + (1 - t) * v)) / steps
        mean = flow.transition_mean(x, v, torch.tensor([t]), w0[i : i + 1], w1[i : i + 1])
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-5)


def test_ode_weights_are_an_euler_step():
    x, v = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(1)).unbind(0)
    mean = flow.transition_mean(x, v, torch.tensor([0.6]), torch.tensor([0.6]), torch.tensor([0.4]))
    torch.testing.assert_close(mean, x - 0.2 * v)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_sde_table_is_finite(steps):
    assert all(table.isfinite().all() for table in flow.sde_table(steps, 0.7))


def marginal_velocity(x, t, mean=0.7, variance=0.09):
    # x_t = t e + (1 - t) a with a ~ N(mean, variance): v = E[e - a | x_t].
    total = t**2 + (1 - t) ** 2 * variance
    residual = x - (1 - t) * mean
    return t / total * residual - (mean + (1 - t) * variance / total * residual)


def integrate_sde(steps, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    w0, w1, std = flow.sde_table(steps, 0.5)
    x = torch.randn(samples, 1, 1, generator=generator)
    for i, t in enumerate(flow.timesteps(steps)[:-1]):
        v = marginal_velocity(x, t)
        mean = flow.transition_mean(x, v, t.expand(samples), w0[i].expand(samples), w1[i].expand(samples))
        x = mean + std[i] * torch.randn(x.shape, generator=generator)
    return x


def test_sde_keeps_the_marginal_as_steps_grow():
    # Data N(0.7, 0.09). At N = 5 the variance is a third too small (0.061); at 400 it is right.
    coarse, fine = integrate_sde(5, 40_000, 0), integrate_sde(400, 40_000, 1)
    assert coarse.mean().item() == pytest.approx(0.7, abs=0.01)
    assert coarse.var().item() == pytest.approx(0.061, abs=0.003)
    assert fine.mean().item() == pytest.approx(0.7, abs=0.01)
    assert fine.var().item() == pytest.approx(0.09, abs=0.004)


def test_ode_transports_noise_to_data():
    noise = torch.randn(40_000, 1, 1, generator=torch.Generator().manual_seed(2))
    x = flow.sample_ode(lambda x, t: marginal_velocity(x, t[0]), noise, 400)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01)
    assert x.var().item() == pytest.approx(0.09, abs=0.004)


def velocity(x, t):
    return torch.sin(x) * t[:, None, None] + 0.3


def test_sample_sde_leaves_the_ode_at_one_step_only():
    generator = torch.Generator().manual_seed(3)
    noise, innovation = torch.randn(2, 5, 3, 2, generator=generator).unbind(0)
    index = torch.arange(5)
    x, before, after, log_prob = flow.sample_sde(velocity, noise, innovation, index, 5, 0.5)
    for row in range(5):
        # Up to step k the ODE; from x_{k+1} on the ODE again.
        ode, tau = noise[row : row + 1], flow.timesteps(5)
        for i in range(row):
            ode = ode - 0.2 * velocity(ode, tau[i : i + 1])
        torch.testing.assert_close(before[row : row + 1], ode)
        rest = after[row : row + 1]
        for i in range(row + 1, 5):
            rest = rest - 0.2 * velocity(rest, tau[i : i + 1])
        torch.testing.assert_close(x[row : row + 1], rest)
    mean, std = flow.sde_step(velocity, before, index, 5, 0.5)
    torch.testing.assert_close(after, mean + std * innovation)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(mean, std).log_prob(after), atol=1e-4, rtol=1e-4)


def test_without_innovation_variance_the_sample_is_reproducible():
    noise = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(4))
    index, zero = torch.tensor([0, 4]), torch.zeros(2, 3, 2)
    first = flow.sample_sde(velocity, noise, zero, index, 5, 0.5)
    second = flow.sample_sde(velocity, noise, zero, index, 5, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gaussian_log_prob_agrees_with_torch_and_is_zero_without_noise():
    x, mean = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(5)).unbind(0)
    std = torch.tensor([[0.1], [1.0], [3.0], [0.0]]).expand(4, 3)
    log_prob, entropy = flow.gaussian_log_prob(x, mean, std), flow.gaussian_entropy(std)
    reference = torch.distributions.Normal(mean[:3], std[:3])
    torch.testing.assert_close(log_prob[:3], reference.log_prob(x[:3]))
    torch.testing.assert_close(entropy[:3], reference.entropy())
    assert not log_prob[3].any()
    assert not entropy[3].any()


def test_joint_chain_steps_and_log_prob():
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(3, 2, 2, generator=generator)
    innovations = torch.randn(3, 4, 2, 2, generator=generator)

    def noisy(x, t):
        return velocity(x, t), 0.1 + 0.05 * torch.sigmoid(x)

    chain, log_prob = flow.sample_joint(noisy, noise, innovations, 4)
    assert chain.shape == log_prob.shape == (3, 5, 2, 2)
    torch.testing.assert_close(log_prob[:, 0], torch.distributions.Normal(0.0, 1.0).log_prob(noise))
    for i in range(4):
        mean, std = flow.joint_step(noisy, chain[:, i], i, 4)
        expected = torch.distributions.Normal(mean, std).log_prob(chain[:, i + 1])
        torch.testing.assert_close(log_prob[:, i + 1], expected, atol=1e-4, rtol=1e-4)


def test_noise_head_stays_in_its_range_and_has_the_published_size():
    head = flow.NoiseHead(1024, (128, 64), 32, (0.08, 0.16))
    assert sum(p.numel() for p in head.parameters()) == 141_536
    std = head(torch.randn(2, 5, 1024, generator=torch.Generator().manual_seed(7)) * 100)
    assert std.shape == (2, 5, 32)
    assert std.min() >= 0.08 - 1e-6
    assert std.max() <= 0.16 + 1e-6
    middle = flow.NoiseHead(4, (4,), 2, (0.05, 0.2))
    for parameter in middle.parameters():
        torch.nn.init.zeros_(parameter)
    # Half way in log-variance is the geometric mean of the bounds.
    torch.testing.assert_close(middle(torch.ones(1, 1, 4)), torch.full((1, 1, 2), math.sqrt(0.05 * 0.2)))


def test_training_time_distribution():
    # Beta(1.5, 1): mean 0.6, variance 1.5 / (2.5^2 * 3.5).
    t = flow.sample_training_time(200_000, torch.Generator().manual_seed(8))
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.999 * 0.6 + 0.001, abs=2e-3)
    assert t.var().item() == pytest.approx(0.999**2 * 1.5 / (2.5**2 * 3.5), abs=2e-3)


def test_flow_matching_target_is_the_derivative_of_the_path():
    actions, noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(9)).unbind(0)
    t = torch.tensor([0.1, 0.5, 0.9])
    x, target = flow.flow_matching_target(actions, noise, t)
    shifted, _ = flow.flow_matching_target(actions, noise, t + 0.01)
    torch.testing.assert_close((shifted - x) / 0.01, target, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flow.flow_matching_target(actions, noise, torch.zeros(3))[0], actions)
    torch.testing.assert_close(flow.flow_matching_target(actions, noise, torch.ones(3))[0], noise)
