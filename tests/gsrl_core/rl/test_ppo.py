import math
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
from toy import GaussianPolicy, ReachEnv

from gsrl_core.errors import TrainingError
from gsrl_core.rl import losses, ppo
from gsrl_core.rl.ppo import Learner, PpoSettings
from gsrl_core.rl.returns import generalized_advantages
from gsrl_core.rl.rollout import Rollout, collect, concatenate

SETTINGS = PpoSettings(
    iterations=10, warmup_steps=0, lr_schedule="constant",
    update_epochs=4, global_batch=128, micro_batch=64, learning_rate=3e-3, value_learning_rate=1e-2, weight_decay=0.0,
    max_grad_norm=1.0, gamma=0.95, gae_lambda=0.95, clip_low=0.2, clip_high=0.2, dual_clip=None, value_clip=0.5,
    huber_delta=10.0, value_coef=1.0, entropy_coef=0.0, kl_coef=0.0, target_kl=None, critic_warmup_iterations=0,
    normalize_advantages=True, recompute_log_prob="auto", seed=0,
)  # fmt: skip


class Alone:
    rank, world_size = 0, 1

    def sum(self, tensor):
        return tensor

    def gather(self, tensor):
        return tensor[None]


class Threads:
    """A collective between threads of this process (an independent twin of the torch.distributed one)."""

    def __init__(self, world_size):
        self.world_size, self.slots = world_size, [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)

    def member(self, rank):
        outer = self

        class Member:
            world_size = outer.world_size

            def gather(self, tensor):
                outer.barrier.wait()
                outer.slots[rank] = tensor.clone()
                outer.barrier.wait()
                return torch.stack(outer.slots)

            def sum(self, tensor):
                return tensor.copy_(self.gather(tensor).sum(0))

        Member.rank = rank
        return Member()


def rollout_of(policy, seeds, noise=0):
    generator = torch.Generator().manual_seed(noise)
    return collect([ReachEnv(len(seeds))], policy, seeds, generator, max_chunks=4)[0]


def weights(policy):
    return torch.cat([p.detach().reshape(-1) for p in policy.parameters()])


def test_ppo_learns_to_reach():
    policy = GaussianPolicy(std=0.5)
    learner = Learner(policy, SETTINGS, Alone())
    generator = torch.Generator().manual_seed(0)
    rates = []
    for iteration in range(25):
        seeds = range(1000 + 64 * iteration, 1064 + 64 * iteration)
        rollout, stats = collect([ReachEnv(64)], policy, seeds, generator, max_chunks=4)
        rates.append(stats.success.float().mean().item())
        metrics = learner.update(rollout)
    _, unseen = collect([ReachEnv(256)], policy, range(256), generator, max_chunks=4, explore=False)
    assert rates[0] < 0.5
    assert unseen.success.float().mean() > 0.9
    assert metrics["critic/explained_variance"] > 0.3


def test_one_full_batch_step_is_the_gradient_of_the_written_objective():
    policy, twin = GaussianPolicy(), GaussianPolicy()
    rollout = rollout_of(policy, range(16))
    settings = replace(SETTINGS, update_epochs=1, global_batch=10_000, micro_batch=7, entropy_coef=0.01, kl_coef=0.1)
    norm = Learner(policy, settings, Alone()).update(rollout)["actor/grad_norm"]

    now = twin.evaluate(rollout.chain_rows(torch.arange(rollout.num_samples)))
    advantages, returns = generalized_advantages(
        rollout.reward, rollout.value, rollout.next_value, rollout.terminated, rollout.truncated, rollout.valid,
        gamma=0.95, gae_lambda=0.95,
    )  # fmt: skip
    a = rollout.samples(advantages)
    a = (a - a.mean()) / (a.std(correction=0) + 1e-5)
    # At the old weights ρ = 1: the surrogate's gradient is that of -A log π, the KL penalty's is zero, V is unclipped.
    value_error = now.value - rollout.samples(returns)
    objective = (-a * now.log_prob - 0.01 * now.entropy + 0.5 * value_error**2).mean()
    gradient = torch.autograd.grad(objective, list(twin.parameters()))
    expected = torch.cat([g.reshape(-1) for g in gradient]).norm()
    assert norm == pytest.approx(expected.item(), rel=1e-4)


def gradients(rollout, **changes):
    """What the optimizer gets in one step on all samples at the old weights: {"actor": vector, "critic": vector}."""
    policy, taken = GaussianPolicy(), {}
    settings = replace(SETTINGS, **{"update_epochs": 1, "global_batch": 10_000, "max_grad_norm": 1e9} | changes)
    learner = Learner(policy, settings, Alone())

    def step():
        for name, group in learner.groups.items():
            taken[name] = torch.cat([parameter.grad.reshape(-1) for parameter in group])

    learner.optimizer.step = step
    learner.update(rollout)
    return taken


def critic_gradient(rollout, loss):
    """By autograd, of the mean of ``loss(value, old value, returns)``."""
    policy = GaussianPolicy()
    _, returns = advantages_and_returns(rollout)
    value = policy.evaluate(rollout.chain_rows(torch.arange(rollout.num_samples))).value
    total = loss(value, rollout.samples(rollout.value), returns).mean()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(policy.critic.parameters()))])


def advantages_and_returns(rollout):
    grids = generalized_advantages(
        rollout.reward, rollout.value, rollout.next_value, rollout.terminated, rollout.truncated, rollout.valid,
        gamma=0.95, gae_lambda=0.95,
    )  # fmt: skip
    return [rollout.samples(grid) for grid in grids]


@pytest.fixture
def rollout():
    return rollout_of(GaussianPolicy(), range(16))


def test_max_grad_norm_scales_the_gradient_of_actor_and_critic_together(rollout):
    free, held = gradients(rollout), gradients(rollout, max_grad_norm=0.01)
    norm = torch.cat([free["actor"], free["critic"]]).norm()
    assert norm > 0.01
    assert torch.cat([held["actor"], held["critic"]]).norm() == pytest.approx(0.01, rel=1e-3)
    for name in free:
        torch.testing.assert_close(held[name], free[name] * 0.01 / norm, rtol=1e-3, atol=1e-8)


def test_value_coef_weighs_the_critic_alone(rollout):
    one, three = gradients(rollout), gradients(rollout, value_coef=3.0)
    torch.testing.assert_close(three["critic"], 3 * one["critic"])
    torch.testing.assert_close(three["actor"], one["actor"])


def test_huber_delta_limits_the_pull_of_an_error(rollout):
    small = 1e-4
    expected = critic_gradient(rollout, lambda value, _, returns: small * (value - returns).abs())
    torch.testing.assert_close(gradients(rollout, huber_delta=small)["critic"], expected, rtol=1e-3, atol=1e-9)
    wide = critic_gradient(rollout, lambda value, _, returns: 0.5 * (value - returns) ** 2)
    torch.testing.assert_close(gradients(rollout, huber_delta=10.0)["critic"], wide, rtol=1e-4, atol=1e-8)


def test_value_clip_takes_the_gradient_where_the_critic_has_moved_too_far(rollout):
    # As if V had risen by 1 in half of the episodes since the rollout, and fallen by 1 in the others: limited to 0.5 it
    # lies half way, and where that is further from the return it counts, a constant.
    moved = torch.tensor([1.0, -1.0]).repeat(8)
    rollout = replace(rollout, value=torch.where(rollout.valid, rollout.value - moved, 0.0))
    counts = []

    def clipped(value, old, returns):
        limited = (value + old) / 2
        counts.append((limited - returns).abs() > (value - returns).abs())
        return torch.where(counts[0], 0.0, 0.5 * (value - returns) ** 2)

    expected = critic_gradient(rollout, clipped)
    assert counts[0].any() and not counts[0].all()
    torch.testing.assert_close(gradients(rollout, value_clip=0.5)["critic"], expected, rtol=1e-4, atol=1e-8)
    free = critic_gradient(rollout, lambda value, _, returns: 0.5 * (value - returns) ** 2)
    torch.testing.assert_close(gradients(rollout, value_clip=2.0)["critic"], free, rtol=1e-4, atol=1e-8)


def test_dual_clip_takes_the_gradient_of_bad_actions_that_became_much_more_likely(rollout):
    # ρ = 5 for all: where A > 0 the plain clip holds; where A < 0 only the dual clip does (5 > c = 3).
    rollout = replace(rollout, log_prob=torch.where(rollout.valid, rollout.log_prob - math.log(5.0), 0.0))
    taken = partial(gradients, rollout, recompute_log_prob="off")
    assert taken()["actor"].abs().max() > 1e-3
    assert not taken(dual_clip=3.0)["actor"].any()
    torch.testing.assert_close(taken(dual_clip=6.0)["actor"], taken()["actor"])


def test_advantages_are_taken_as_they_are_unless_normalised(rollout):
    policy = GaussianPolicy()
    raw, _ = advantages_and_returns(rollout)
    log_prob = policy.evaluate(rollout.chain_rows(torch.arange(rollout.num_samples))).log_prob
    parameters = policy.trainable_parameters()["actor"]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad((-raw * log_prob).mean(), parameters)])
    plain = gradients(rollout, normalize_advantages=False)["actor"]
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(plain, gradients(rollout)["actor"], rtol=1e-2)


def rounded(rollout, size=0.05):
    """As if the rollout had been sampled by other arithmetic: log-probabilities off by up to ``size``."""
    noise = torch.rand(rollout.log_prob.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return replace(rollout, log_prob=torch.where(rollout.valid, rollout.log_prob + size * noise, 0.0))


FREEZE = {"learning_rate": 0.0, "value_learning_rate": 0.0, "global_batch": 32, "micro_batch": 10}


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_the_ratio_is_one_in_every_epoch_while_no_weight_moves(rollout, wanted):
    policy = GaussianPolicy()
    settings = replace(SETTINGS, **FREEZE, recompute_log_prob=wanted)
    metrics = Learner(policy, settings, Alone()).update(rounded(rollout))
    assert metrics["actor/optimizer_steps"] >= 8
    assert metrics["actor/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["actor/kl_k3"] == pytest.approx(0, abs=1e-7)
    assert metrics["rollout/log_prob_recomputed"] == 1
    # Uniform noise of +-0.05.
    assert metrics["rollout/log_prob_mismatch_mean"] == pytest.approx(0.025, abs=0.005)
    assert 0.04 < metrics["rollout/log_prob_mismatch_max"] < 0.051


def test_the_rollouts_own_log_prob_stays_the_old_one_where_asked(rollout):
    metrics = Learner(GaussianPolicy(), replace(SETTINGS, **FREEZE, recompute_log_prob="off"), Alone()).update(
        rounded(rollout)
    )
    assert metrics["actor/kl_k3"] > 1e-4
    assert metrics["rollout/log_prob_recomputed"] == 0
    assert metrics["rollout/log_prob_mismatch_max"] > 0.02  # it is reported all the same, of one micro-batch


def test_auto_evaluates_one_microbatch_where_both_agree(rollout):
    policy, sizes = GaussianPolicy(), []
    evaluate = policy.evaluate
    policy.evaluate = lambda chain: sizes.append(len(chain["state"])) or evaluate(chain)
    settings = replace(SETTINGS, update_epochs=1, global_batch=10_000, micro_batch=10)
    metrics = Learner(policy, settings, Alone()).update(rollout)
    assert metrics["rollout/log_prob_recomputed"] == 0
    assert metrics["rollout/log_prob_mismatch_max"] < 1e-5
    assert sum(sizes) == rollout.num_samples + sizes[0] and sizes[0] <= 10


def test_recomputing_gives_the_update_of_an_exact_rollout(rollout):
    policies = [GaussianPolicy(), GaussianPolicy()]
    for policy, given in zip(policies, (rollout, rounded(rollout)), strict=True):
        Learner(policy, SETTINGS, Alone()).update(given)
    torch.testing.assert_close(weights(policies[1]), weights(policies[0]), atol=1e-6, rtol=1e-5)


def test_processes_recompute_together():
    exact = exact_shards()
    # Only the second process's samples are off: all of both must be evaluated again, as they would be in one process.
    shards = [exact[0], rounded(exact[1])]
    group, policies, metrics = Threads(2), [GaussianPolicy(), GaussianPolicy()], [None, None]

    def work(rank):
        metrics[rank] = Learner(policies[rank], replace(SETTINGS, **FREEZE), group.member(rank)).update(shards[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert metrics[0] == metrics[1]
    assert metrics[0]["rollout/log_prob_recomputed"] == 1
    assert metrics[0]["actor/kl_k3"] == pytest.approx(0, abs=1e-7)
    samples = torch.cat([(s.log_prob - e.log_prob)[s.valid].abs() for s, e in zip(shards, exact, strict=True)])
    assert metrics[0]["rollout/log_prob_mismatch_mean"] == pytest.approx(samples.mean().item(), rel=1e-3)
    assert metrics[0]["rollout/log_prob_mismatch_max"] == pytest.approx(samples.max().item(), rel=1e-3)


def exact_shards():
    start = GaussianPolicy()
    return [rollout_of(start, range(10), noise=1), rollout_of(start, range(10, 40), noise=2)]


def test_microbatches_change_nothing_but_memory():
    results = []
    for micro in (5, 1000):
        policy = GaussianPolicy()
        Learner(policy, replace(SETTINGS, micro_batch=micro), Alone()).update(rollout_of(policy, range(40)))
        results.append(weights(policy))
    assert torch.allclose(*results, atol=1e-6)


def test_gradients_are_summed_in_buckets_of_neighbours(monkeypatch):
    monkeypatch.setattr(ppo, "BUCKET", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 25, 9, 1)]
    assert [[len(t) for t in bucket] for bucket in ppo._buckets(tensors)] == [[4, 6], [1], [25], [9, 1]]
    assert ppo._buckets([]) == []


@pytest.mark.parametrize("bucket", [40, ppo.BUCKET])
def test_two_processes_make_the_update_of_one_on_the_union(bucket, monkeypatch):
    monkeypatch.setattr(ppo, "BUCKET", bucket)
    start = GaussianPolicy()
    # Unequal shards, so that the weighting matters.
    shards = [rollout_of(start, range(10), noise=1), rollout_of(start, range(10, 40), noise=2)]
    single = GaussianPolicy()
    expected = Learner(single, SETTINGS, Alone()).update(concatenate(shards))
    group, policies, metrics = Threads(2), [GaussianPolicy(), GaussianPolicy()], [None, None]

    def work(rank):
        metrics[rank] = Learner(policies[rank], SETTINGS, group.member(rank)).update(shards[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert torch.equal(weights(policies[0]), weights(policies[1]))
    assert torch.allclose(weights(policies[0]), weights(single), atol=1e-5)
    assert metrics[0] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_critic_warmup_moves_the_critic_alone():
    policy = GaussianPolicy()
    settings = replace(SETTINGS, critic_warmup_iterations=1, weight_decay=0.1)
    learner, before = Learner(policy, settings, Alone()), policy.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    learner.update(rollout_of(policy, range(16)))
    moved = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("critic") for name in moved)
    learner.update(rollout_of(policy, range(16)))
    assert not torch.equal(policy.state_dict()["log_std"], before["log_std"])


def test_target_kl_stops_before_the_step_that_would_go_further():
    policy = GaussianPolicy()
    rollout = rollout_of(policy, range(64))
    free = Learner(GaussianPolicy(), replace(SETTINGS, learning_rate=0.1), Alone()).update(rollout)
    held = Learner(policy, replace(SETTINGS, learning_rate=0.1, target_kl=0.01), Alone()).update(rollout)
    assert free["actor/stopped_by_kl"] == 0 and held["actor/stopped_by_kl"] == 1
    assert held["actor/optimizer_steps"] < free["actor/optimizer_steps"]


def test_the_kl_penalty_keeps_the_policy_closer():
    drift = []
    for coefficient in (0.0, 10.0):
        policy = GaussianPolicy()
        rollout = rollout_of(policy, range(64))
        Learner(policy, replace(SETTINGS, kl_coef=coefficient, update_epochs=10), Alone()).update(rollout)
        now = policy.evaluate(rollout.chain_rows(torch.arange(rollout.num_samples)))
        drift.append(losses.kl_k3(now.log_prob - rollout.samples(rollout.log_prob)).mean().item())
    assert drift[1] < 0.5 * drift[0]


def test_the_entropy_bonus_widens_the_policy():
    width = []
    for coefficient in (0.0, 1.0):
        policy = GaussianPolicy()
        Learner(policy, replace(SETTINGS, entropy_coef=coefficient), Alone()).update(rollout_of(policy, range(32)))
        width.append(policy.log_std.mean().item())
    assert width[1] > width[0]


def test_every_named_metric_of_the_seed_is_there_and_means_what_it_says():
    policy = GaussianPolicy()
    rollout = rollout_of(policy, range(32))
    metrics = Learner(policy, replace(SETTINGS, update_epochs=1, global_batch=10_000), Alone()).update(rollout)
    for name in ("loss", "value_loss", "grad_norm", "approx_kl", "pg_clipfrac", "value_clip_ratio", "entropy"):
        assert f"actor/{name}" in metrics
    codes = {
        "actor/policy_loss": "actor/loss", "actor/clip_fraction": "actor/pg_clipfrac",
        "critic/value_loss": "actor/value_loss", "critic/value_clip_ratio": "actor/value_clip_ratio",
    }  # fmt: skip
    assert all(metrics[code] == metrics[specified] for code, specified in codes.items())
    for name, samples in zip(("advantages", "returns"), advantages_and_returns(rollout), strict=True):
        for statistic in ("min", "max", "mean"):
            expected = getattr(samples, statistic)().item()
            assert metrics[f"rollout/{name}_{statistic}"] == pytest.approx(expected, abs=1e-6)
    # One step on the samples' own weights: no drift, no clipping, and normalised advantages average to zero.
    assert metrics["actor/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] == metrics["actor/value_clip_ratio"] == 0
    assert metrics["actor/loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["rollout/samples"] == rollout.valid.sum()
    # γ = 0.95 per chunk and λ-returns: E[R] is E[A] + E[V]
    mean_value = rollout.samples(rollout.value).mean().item()
    assert metrics["rollout/returns_mean"] == pytest.approx(metrics["rollout/advantages_mean"] + mean_value, abs=1e-6)


def test_non_finite_numbers_name_the_tensor_and_leave_the_weights_alone():
    policy = GaussianPolicy()
    rollout = rollout_of(policy, range(16))
    with torch.no_grad():
        policy.critic[2].bias.fill_(float("nan"))
    before = weights(policy).nan_to_num()
    with pytest.raises(TrainingError, match=r"iteration 1, .*: non-finite numbers in loss, value;"):
        Learner(policy, SETTINGS, Alone()).update(rollout)
    assert torch.equal(weights(policy).nan_to_num(), before)


def test_resuming_from_the_state_gives_the_uninterrupted_numbers(tmp_path):
    def run(policy, learner, first, last):
        for iteration in range(first, last):
            learner.update(rollout_of(policy, range(iteration * 16, iteration * 16 + 16), noise=iteration))

    whole = GaussianPolicy()
    run(whole, Learner(whole, SETTINGS, Alone()), 0, 4)
    half = GaussianPolicy()
    learner = Learner(half, SETTINGS, Alone())
    run(half, learner, 0, 2)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    resumed = GaussianPolicy(seed=9)
    learner = Learner(resumed, SETTINGS, Alone())
    learner.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert learner.iteration == 2
    run(resumed, learner, 2, 4)
    assert torch.equal(weights(resumed), weights(whole))


def test_state_of_another_policy_is_refused():
    state = Learner(GaussianPolicy(horizon=3), SETTINGS, Alone()).state_dict()
    with pytest.raises(TrainingError, match="other trainable parameters"):
        Learner(GaussianPolicy(), SETTINGS, Alone()).load_state_dict(state)


def test_non_finite_gradients_name_the_parameter():
    policy = GaussianPolicy()
    rollout = rollout_of(policy, range(16))
    policy.critic[2].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(policy)
    with pytest.raises(TrainingError, match=r"non-finite gradients of critic\.2\.weight \(1 tensors\)"):
        Learner(policy, SETTINGS, Alone()).update(rollout)
    assert torch.equal(weights(policy), before)


def infinite(rollout, name, position, value=math.inf):
    """The rollout with an infinite number at one sample."""
    grid = getattr(rollout, name).clone()
    grid.view(-1)[rollout.position[position]] = value
    return replace(rollout, **{name: grid})


def second_minibatch(rollout, settings):
    """A sample that the first minibatch of the first epoch does not hold, and the second one does."""
    pieces = Learner(GaussianPolicy(), settings, Alone())._minibatches(rollout.num_samples)
    assert settings.update_epochs == 2 and len(pieces) >= 4
    return int(pieces[1][0])


LATER = replace(SETTINGS, update_epochs=2, global_batch=16, micro_batch=5, normalize_advantages=False)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("recompute", ["off", "auto"])
def test_an_infinite_old_log_prob_stops_though_the_loss_is_finite(rollout, value, recompute):
    settings = replace(LATER, recompute_log_prob=recompute)
    poisoned = infinite(rollout, "log_prob", second_minibatch(rollout, LATER), value)
    policy = GaussianPolicy()
    before = weights(policy)
    where = r"^iteration 1, update epoch 1 of 2, minibatch 2 of \d \(optimizer step 2 of the iteration\)"
    with pytest.raises(TrainingError, match=where + ": non-finite numbers in old_log_prob;"):
        Learner(policy, settings, Alone()).update(poisoned)
    assert not torch.equal(weights(policy), before)  # the first minibatch was sound


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_new_log_prob_stops_before_the_step(rollout, value):
    policy, calls = GaussianPolicy(), []
    evaluate = policy.evaluate

    def overflowing(chain):
        now = evaluate(chain)
        calls.append(now)
        # The first call tells how far rollout and learner are off; each of the others is a minibatch.
        return replace(now, log_prob=now.log_prob + value) if len(calls) == 1 + 4 else now

    policy.evaluate = overflowing
    settings = replace(LATER, recompute_log_prob="off", micro_batch=16)
    with pytest.raises(TrainingError, match=r"optimizer step 4 of .* in log_prob;"):
        Learner(policy, settings, Alone()).update(rollout)
    assert len(calls) == 5
    assert all(p.isfinite().all() for p in policy.parameters())


def test_an_infinite_value_or_return_stops(rollout):
    place = second_minibatch(rollout, LATER)
    with pytest.raises(TrainingError, match=r"iteration 1, .* in .*old_value"):
        Learner(GaussianPolicy(), replace(LATER, recompute_log_prob="off"), Alone()).update(
            infinite(rollout, "value", place)
        )
    with pytest.raises(TrainingError, match=r"minibatch 2 of .* in advantages, loss, returns;"):
        Learner(GaussianPolicy(), replace(LATER, gae_lambda=0.0), Alone()).update(infinite(rollout, "reward", place))


def test_all_processes_stop_at_the_same_minibatch():
    shards = exact_shards()
    shards[1] = infinite(shards[1], "log_prob", 3)
    group, said = Threads(2), [None, None]

    def work(rank):
        with pytest.raises(TrainingError) as caught:
            Learner(GaussianPolicy(), replace(LATER, recompute_log_prob="off"), group.member(rank)).update(shards[rank])
        said[rank] = str(caught.value)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert said[0] == said[1] and "in old_log_prob;" in said[0]


def predicted(values, returns):
    """Explained variance of a rollout of chunks that end at once with these returns."""
    value, reward = (torch.tensor([numbers]) for numbers in (values, returns))
    yes = torch.ones_like(value, dtype=torch.bool)
    state = {"state": torch.zeros(value.numel(), 2), "actions": torch.zeros(value.numel(), 2)}
    rollout = Rollout(value * 0, value, value, reward, yes, ~yes, yes, (state,), torch.arange(value.numel()))
    return Learner(GaussianPolicy(), SETTINGS, Alone()).update(rollout)["critic/explained_variance"]


def test_explained_variance_of_perfect_constant_and_known_predictions():
    returns = [0.0, 1.0, 2.0, 3.0]
    assert predicted(returns, returns) == 1.0
    assert predicted([7.0] * 4, returns) == pytest.approx(0.0)
    # Var(R) = 1.25; residuals (0, 0, 0, 2) have variance 3/4: 1 - 0.75/1.25 = 0.4
    assert predicted([0.0, 1.0, 2.0, 1.0], returns) == pytest.approx(0.4)
    assert predicted(returns, [1.0] * 4) == 0.0


def rates(settings, rollout, iterations, learner=None):
    """The learner, and its learning rates of actor and critic at each optimizer step."""
    learner, found = learner or Learner(GaussianPolicy(), settings, Alone()), []
    step = learner.optimizer.step

    def watched():
        found.append(tuple(group["lr"] for group in learner.optimizer.param_groups))
        step()

    learner.optimizer.step = watched
    metrics = [learner.update(rollout) for _ in range(iterations)]
    learner.optimizer.step = step
    return learner, found, metrics


SHORT = replace(SETTINGS, update_epochs=1, global_batch=20, learning_rate=1e-3, value_learning_rate=1e-2)


def test_both_learning_rates_warm_up_over_optimizer_steps(rollout):
    _, found, metrics = rates(replace(SHORT, warmup_steps=5), rollout, 3)
    expected = [min(1.0, (number + 1) / 5) for number in range(len(found))]
    assert len(found) > 6 and [actor for actor, _ in found] == pytest.approx([1e-3 * e for e in expected])
    assert [critic for _, critic in found] == pytest.approx([1e-2 * e for e in expected])
    a_step = len(found) // 3
    assert metrics[0]["actor/learning_rate"] == found[a_step - 1][0]
    assert metrics[-1]["critic/learning_rate"] == 1e-2


def test_the_actor_warms_up_after_the_critic_did(rollout):
    _, found, metrics = rates(replace(SHORT, warmup_steps=5, critic_warmup_iterations=1), rollout, 2)
    half = len(found) // 2
    assert [actor for actor, _ in found[:half]] == [0.0] * half and metrics[0]["actor/learning_rate"] == 0.0
    assert found[half][0] == pytest.approx(1e-3 / 5) and found[half][1] == pytest.approx(1e-2 * min(1, (half + 1) / 5))


def test_the_cosine_falls_from_iteration_to_iteration(rollout):
    _, _, metrics = rates(replace(SHORT, lr_schedule="cosine", iterations=4), rollout, 4)
    # (1 + cos(π k / 4)) / 2
    expected = [1.0, 0.8535534, 0.5, 0.1464466]
    assert [m["actor/learning_rate"] for m in metrics] == pytest.approx([1e-3 * e for e in expected], rel=1e-5)
    assert [m["critic/learning_rate"] for m in metrics] == pytest.approx([1e-2 * e for e in expected], rel=1e-5)
    assert {m["actor/learning_rate"] for m in rates(SHORT, rollout, 2)[2]} == {1e-3}


def test_a_resumed_learner_goes_on_in_the_schedule(rollout):
    settings = replace(SHORT, warmup_steps=8, lr_schedule="cosine", iterations=4, critic_warmup_iterations=1)
    whole, expected, _ = rates(settings, rollout, 4)
    half, first, _ = rates(settings, rollout, 2)
    resumed = Learner(GaussianPolicy(seed=9), settings, Alone())
    resumed.load_state_dict(half.state_dict())
    resumed, rest, _ = rates(settings, rollout, 2, resumed)
    assert first + rest == expected
    assert torch.equal(weights(resumed.policy), weights(whole.policy))


def test_a_warm_up_keeps_the_first_step_close(rollout):
    # Adam's first step is the learning rate in every weight, however small the gradient.
    drift = []
    for steps in (0, 10):
        settings = replace(SHORT, update_epochs=2, global_batch=10_000, learning_rate=0.03, warmup_steps=steps)
        drift.append(Learner(GaussianPolicy(), settings, Alone()).update(rollout)["actor/kl_k3"])
    assert drift[1] < 0.05 * drift[0]
