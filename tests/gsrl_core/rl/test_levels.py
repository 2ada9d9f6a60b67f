"""One ratio for a chunk, for each action or for each entry, against arithmetic on paper."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from test_ppo import SETTINGS, Alone, Threads, rollout_of, weights
from torch import nn
from toy import GaussianPolicy

from gsrl_core.interfaces import Evaluation
from gsrl_core.rl.ppo import Learner
from gsrl_core.rl.rollout import Rollout, concatenate, split

LEVELS = ("chunk", "action", "token")
SUMS = {"chunk": (1, 2), "action": 2, "token": ()}


def at(level, entries):
    return entries.sum(dim=SUMS[level]) if SUMS[level] else entries


class Table(nn.Module):
    """Log-probabilities [1, 2, 2] that are parameters."""

    sharded = None

    def __init__(self, level, ratio):
        super().__init__()
        self.level = level
        self.entries = nn.Parameter(torch.tensor(ratio).log()[None])
        self.critic = nn.Parameter(torch.zeros(1))

    def evaluate(self, chain):
        return Evaluation(at(self.level, self.entries), at(self.level, 10.0 * self.entries), self.critic)

    def trainable_parameters(self):
        return {"actor": [self.entries], "critic": [self.critic]}


def updated(level, ratio=((1.5, 1.0), (0.5, 1.0)), **changes):
    """Metrics and the gradient [2, 2] of one step at A = 1 with the range 1 ± 0.2, where the old log-probs are 0."""
    policy, taken = Table(level, ratio), []
    zero, yes = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    old = at(level, torch.zeros(1, 2, 2))[None]
    rollout = Rollout(old, zero, zero, zero + 1, yes, ~yes, yes, ({"x": torch.zeros(1)},), torch.tensor([0]))
    fixed = {"update_epochs": 1, "normalize_advantages": False, "recompute_log_prob": "off", "max_grad_norm": 1e9}
    learner = Learner(policy, replace(SETTINGS, **(fixed | changes)), Alone())
    learner.optimizer.step = lambda: taken.append(policy.entries.grad[0].clone())
    return learner.update(rollout), taken[0]


# ratios of the entries 1.5 1.0 / 0.5 1.0; of the actions 1.5 / 0.5; of the chunk 0.75
@pytest.mark.parametrize(
    ("level", "loss", "clipped", "gradient"),
    [
        ("chunk", -0.75, 0.0, [[-0.75, -0.75], [-0.75, -0.75]]),
        ("action", -(1.2 + 0.5) / 2, 0.5, [[0.0, 0.0], [-0.25, -0.25]]),
        ("token", -(1.2 + 1.0 + 0.5 + 1.0) / 4, 0.25, [[0.0, -0.25], [-0.125, -0.25]]),
    ],
)
def test_the_surrogate_of_two_actions_of_two_entries_by_hand(level, loss, clipped, gradient):
    metrics, taken = updated(level)
    assert metrics["actor/loss"] == pytest.approx(loss)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(clipped)
    torch.testing.assert_close(taken, torch.tensor(gradient))


@pytest.mark.parametrize(
    ("level", "k3"),
    [
        ("chunk", -0.25 - math.log(0.75)),
        ("action", 0.5 - math.log(1.5) - 0.5 - math.log(0.5)),
        ("token", 0.5 - math.log(1.5) - 0.5 - math.log(0.5)),
    ],
)
def test_divergences_are_of_the_chunk_and_their_penalty_is_a_mean(level, k3):
    metrics, plain = updated(level)
    assert metrics["actor/approx_kl"] == pytest.approx(-math.log(0.75))
    assert metrics["actor/kl_k3"] == pytest.approx(k3)
    assert updated(level, target_kl=k3 / 1.4)[0]["actor/stopped_by_kl"] == 0
    with pytest.raises(IndexError):  # no step was made
        updated(level, target_kl=k3 / 1.6)
    # d k3 / d log ρ = ρ - 1, of every entry that ρ belongs to, over the number of ratios
    slopes = {"chunk": [[-0.25] * 2] * 2, "action": [[0.25] * 2, [-0.25] * 2], "token": [[0.125, 0], [-0.125, 0]]}
    torch.testing.assert_close(updated(level, kl_coef=1.0)[1] - plain, torch.tensor(slopes[level]))


@pytest.mark.parametrize(("level", "mean"), [("chunk", -2.8768), ("action", -1.4384), ("token", -0.7192)])
def test_the_entropy_is_summed_at_its_level_and_averaged_over_the_rest(level, mean):
    # Entries of 10 log ρ: 4.0547 0 / -6.9315 0, together -2.8768
    metrics, plain = updated(level)
    assert metrics["actor/entropy"] == pytest.approx(mean, abs=1e-4)
    gradient = updated(level, entropy_coef=0.1)[1] - plain
    torch.testing.assert_close(gradient, torch.full((2, 2), -1.0 / {"chunk": 1, "action": 2, "token": 4}[level]))


def toy(log_prob, entropy="chunk"):
    policy = GaussianPolicy()
    policy.set_levels(log_prob, entropy)
    return policy


def test_a_rollout_holds_its_level_through_concatenation_and_split():
    chunk, token = (rollout_of(toy(level), range(8)) for level in ("chunk", "token"))
    assert token.log_prob.shape == (*chunk.log_prob.shape, 2, 1)
    torch.testing.assert_close(token.log_prob.sum((2, 3)), chunk.log_prob)
    short = rollout_of(toy("token"), range(8, 10))
    joined = concatenate([token, short])
    for piece, part in zip(split(joined, 5), [*split(token, 4), short], strict=True):
        assert torch.equal(piece.samples(piece.log_prob), part.samples(part.log_prob))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_two_processes_make_the_update_of_one_at_finer_levels(level):
    shards = [rollout_of(toy(level), range(6), noise=1), rollout_of(toy(level), range(6, 20), noise=2)]
    settings = replace(SETTINGS, recompute_log_prob="on", global_batch=32, kl_coef=0.1)
    single, policies, metrics = toy(level), [toy(level), toy(level)], [None, None]
    expected = Learner(single, settings, Alone()).update(concatenate(shards))
    group = Threads(2)

    def work(rank):
        metrics[rank] = Learner(policies[rank], settings, group.member(rank)).update(shards[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert torch.allclose(weights(policies[0]), weights(single), atol=1e-5)
    assert metrics[0] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_levels_are_different_updates_once_ratios_differ():
    moved = []
    for level in LEVELS:
        policy = toy(level)
        settings = replace(SETTINGS, learning_rate=0.03)
        Learner(policy, settings, Alone()).update(concatenate([rollout_of(policy, range(16))]))
        moved.append(weights(policy))
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)
    assert torch.allclose(moved[1], moved[2])  # of this policy every action has one entry
