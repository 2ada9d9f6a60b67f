import pytest
import torch

from gsrl_core.rl.returns import generalized_advantages


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)[:, None]


def advantages(reward, value, next_value, terminated, truncated, valid, gamma=0.9, gae_lambda=0.5):
    result = generalized_advantages(
        column(*reward), column(*value), column(*next_value), flags(*terminated), flags(*truncated), flags(*valid),
        gamma=gamma, gae_lambda=gae_lambda,
    )  # fmt: skip
    return [tensor.squeeze(1).tolist() for tensor in result]


def test_gae_of_an_episode_that_terminates():
    # δ2 = 1 + 0 - 0.5                 = 0.5     (terminated: the 9.0 is not read)
    # δ1 = 0 + 0.9 * 0.5 - 0.4         = 0.05    A1 = 0.05 + 0.45 * 0.5    = 0.275
    # δ0 = 0 + 0.9 * 0.4 - 0.3         = 0.06    A0 = 0.06 + 0.45 * 0.275  = 0.18375
    gae, returns = advantages([0, 0, 1], [0.3, 0.4, 0.5], [0.4, 0.5, 9.0], [0, 0, 1], [0, 0, 0], [1, 1, 1])
    assert gae == pytest.approx([0.18375, 0.275, 0.5])
    assert returns == pytest.approx([0.48375, 0.675, 1.0])


def test_truncation_bootstraps_from_the_final_observation_and_cuts_the_trace():
    # δ1 = 0 + 0.9 * 2.0 - 0.5 = 1.3 = A1 (nothing of the episode after it)
    # δ0 = 0 + 0.9 * 0.5 - 0.4 = 0.05, A0 = 0.05 + 0.45 * 1.3 = 0.635
    gae, _ = advantages([0, 0, 7], [0.4, 0.5, 1.0], [0.5, 2.0, 3.0], [0, 0, 0], [0, 1, 0], [1, 1, 1])
    assert gae[:2] == pytest.approx([0.635, 1.3])


def test_termination_differs_from_truncation_by_exactly_the_discounted_bootstrap():
    arguments = ([0.0], [0.5], [2.0])
    ended, _ = advantages(*arguments, [1], [0], [1])
    cut, _ = advantages(*arguments, [0], [1], [1])
    assert cut[0] - ended[0] == pytest.approx(0.9 * 2.0)


def test_invalid_chunks_are_zero_and_do_not_leak_even_if_they_hold_nan():
    nan = float("nan")
    gae, returns = advantages([1, nan], [0.5, nan], [nan, nan], [1, 0], [0, 0], [1, 0])
    assert gae == [0.5, 0.0]
    assert returns == [1.0, 0.0]


def test_lambda_one_gives_the_discounted_sum_and_lambda_zero_the_td_error():
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.rand(6, 3, generator=generator), torch.rand(7, 3, generator=generator)
    never = torch.zeros(6, 3, dtype=torch.bool)
    arguments = (reward, value[:-1], value[1:], never, never, ~never)
    gae, returns = generalized_advantages(*arguments, gamma=0.9, gae_lambda=1.0)
    discounts = 0.9 ** torch.arange(6.0)[:, None]
    assert torch.allclose(returns[0], (discounts * reward).sum(0) + 0.9**6 * value[-1])
    gae, _ = generalized_advantages(*arguments, gamma=0.9, gae_lambda=0.0)
    assert torch.allclose(gae, reward + 0.9 * value[1:] - value[:-1])


def test_episodes_side_by_side_do_not_touch_each_other():
    gae_alone, _ = advantages([0, 1], [0.1, 0.2], [0.2, 0], [0, 1], [0, 0], [1, 1])
    pair = generalized_advantages(
        torch.tensor([[0.0, 5], [1, 5]]), torch.tensor([[0.1, 3], [0.2, 3]]), torch.tensor([[0.2, 3], [0, 3]]),
        torch.tensor([[False, True], [True, False]]), torch.zeros(2, 2, dtype=torch.bool),
        torch.tensor([[True, True], [True, False]]), gamma=0.9, gae_lambda=0.5,
    )[0]  # fmt: skip
    assert pair[:, 0].tolist() == pytest.approx(gae_alone)
    assert pair[:, 1].tolist() == [2.0, 0.0]


def test_shapes_that_differ_are_refused():
    grid, flag = torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        generalized_advantages(torch.zeros(3, 1), grid, grid, flag, flag, flag, gamma=0.9, gae_lambda=0.9)
