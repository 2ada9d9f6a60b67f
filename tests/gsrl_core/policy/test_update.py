"""PPO's update of pi0.5: while no weight moves the ratio is 1, wherever prefixes are kept and in whatever precision."""

from dataclasses import replace

import pytest
import torch
from policy_examples import make_observation

from gsrl_core.dist.collective import SingleProcess
from gsrl_core.policy import fast
from gsrl_core.policy.checkpoint import load_policy
from gsrl_core.policy.fast import FastNetwork
from gsrl_core.rl.ppo import Learner, PpoSettings
from gsrl_core.rl.rollout import Rollout

CHUNKS, EPISODES = 3, 4
FROZEN = PpoSettings(
    iterations=10, warmup_steps=0, lr_schedule="constant",
    update_epochs=2, global_batch=4, micro_batch=3, learning_rate=0.0, value_learning_rate=0.0, weight_decay=0.01,
    max_grad_norm=1.0, gamma=0.99, gae_lambda=0.95, clip_low=0.2, clip_high=0.2, dual_clip=None, value_clip=0.2,
    huber_delta=10.0, value_coef=1.0, entropy_coef=0.0, kl_coef=0.0, target_kl=None, critic_warmup_iterations=0,
    normalize_advantages=True, recompute_log_prob="off", seed=0,
)  # fmt: skip
PLACES = ("device", "host", "recompute")


def make_policy(folder, place, precision="float32", device="cpu", noise_method="flow_sde"):
    sampling = {"denoise_steps": 3, "action_chunk": 2, "noise_method": noise_method}
    policy = load_policy(folder, **sampling, precision=precision, device=device)
    policy.keep_prefixes(place, CHUNKS * EPISODES, FROZEN.micro_batch)
    return policy


def make_rollout(policy):
    """Every chunk of other pictures, states (and prompts) and noise."""
    generator = torch.Generator().manual_seed(3)
    samples = [policy.act(make_observation(EPISODES, chunk), generator, explore=True) for chunk in range(CHUNKS)]
    log_prob, value = (torch.stack([getattr(s, name) for s in samples]).cpu() for name in ("log_prob", "value"))
    flags = torch.zeros(CHUNKS, EPISODES, dtype=torch.bool)
    reward = torch.rand(CHUNKS, EPISODES, generator=generator)
    chain = tuple(s.chain for s in samples)
    return Rollout(log_prob, value, value, reward, flags, flags, ~flags, chain, torch.arange(CHUNKS * EPISODES))


def in_other_arithmetic(monkeypatch, policy):
    """Sampling is off as compiled bfloat16 kernels are: the expert's hidden states by some 1e-3."""
    monkeypatch.setattr(fast, "has_compiler", lambda: False)
    twin = policy._sampler.fast = FastNetwork(policy.network, 3)
    denoiser = twin.denoiser

    def rough(prefix):
        step = denoiser(prefix)
        return lambda x, t: step(x, t) * (1 + 4e-3 * torch.sin(100 * x.mean(dim=2, keepdim=True)))

    monkeypatch.setattr(twin, "denoiser", rough)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ratio_is_one_in_every_epoch_while_no_weight_moves(folder, place, precision):
    policy = make_policy(folder, place, precision)
    metrics = Learner(policy, FROZEN, SingleProcess()).update(make_rollout(policy))
    assert metrics["actor/optimizer_steps"] == 6
    # Uncompiled, both paths round alike; a stale prefix, wrong index or wrong mask would be off by tenths.
    tolerance = 1e-4 if precision == "float32" else 0.05
    assert metrics["rollout/log_prob_mismatch_max"] < tolerance
    assert abs(metrics["actor/approx_kl"]) < tolerance
    assert metrics["actor/kl_k3"] < tolerance**2
    assert metrics["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize(
    ("place", "noise_method"), [("device", "flow_noise"), ("host", "flow_sde"), ("recompute", "flow_sde")]
)
def test_levels_have_the_chunks_gradient_over_the_number_of_ratios(folder, place, noise_method):
    settings = replace(FROZEN, update_epochs=1, global_batch=1000, max_grad_norm=1e9)
    found = {}
    for level in ("chunk", "action", "token"):
        policy = make_policy(folder, place, noise_method=noise_method)
        policy.set_levels(level, "chunk")
        rollout, learner, taken = make_rollout(policy), Learner(policy, settings, SingleProcess()), []
        assert rollout.log_prob.shape[2:] == {"chunk": (), "action": (2,), "token": (2, 7)}[level]

        def step(policy=policy, taken=taken):
            actor = policy.trainable_parameters()["actor"]
            taken.append(torch.cat([parameter.grad.reshape(-1) for parameter in actor]))

        learner.optimizer.step = step
        metrics = learner.update(rollout)
        assert metrics["rollout/log_prob_mismatch_max"] < 1e-4 and metrics["actor/kl_k3"] < 1e-8
        found[level] = rollout.log_prob, taken[0]
    sums, gradient = found["chunk"]
    torch.testing.assert_close(found["token"][0].sum((2, 3)), sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["action"][0].sum(2), sums, rtol=1e-5, atol=1e-4)
    for level, ratios in (("action", 2), ("token", 14)):
        assert (found[level][1] * ratios - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("place", ["host", "recompute"])
def test_an_update_is_the_same_wherever_prefixes_are_kept(folder, place):
    settings = replace(FROZEN, learning_rate=1e-3, value_learning_rate=1e-3)
    gradients, kl = [], []
    for where in ("device", place):
        policy, taken = make_policy(folder, where), []
        learner = Learner(policy, settings, SingleProcess())
        step = learner._step

        def watched(step=step, policy=policy, taken=taken):
            actor = policy.trainable_parameters()["actor"]
            taken.append(torch.cat([parameter.grad.reshape(-1) for parameter in actor]))
            return step()

        learner._step = watched
        kl.append(learner.update(make_rollout(policy))["actor/approx_kl"])
        gradients.append(taken)
    assert abs(kl[0]) > 1e-4  # the weights did move
    assert kl[1] == pytest.approx(kl[0], rel=1e-2, abs=1e-5)
    for kept, other in zip(*gradients, strict=True):
        assert (other - kept).norm() < 1e-2 * kept.norm()


def test_an_update_leaves_what_prefixes_are_made_of_alone(folder):
    policy = make_policy(folder, "device")
    frozen = {n: p.clone() for n, p in policy.network.named_parameters() if ".paligemma." in n}
    settings = replace(FROZEN, learning_rate=1e-2, value_learning_rate=1e-2)
    Learner(policy, settings, SingleProcess()).update(make_rollout(policy))
    now = dict(policy.network.named_parameters())
    assert frozen and all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert not any(now[name].requires_grad for name in frozen)


@pytest.mark.parametrize("place", PLACES)
def test_the_learners_own_log_prob_makes_the_ratio_one(folder, monkeypatch, place):
    policy = make_policy(folder, place)
    in_other_arithmetic(monkeypatch, policy)
    rollout = make_rollout(policy)
    found = {
        wanted: Learner(policy, replace(FROZEN, recompute_log_prob=wanted), SingleProcess()).update(rollout)
        for wanted in ("off", "auto", "on")
    }
    assert found["off"]["actor/kl_k3"] > 1e-7
    assert found["off"]["rollout/log_prob_mismatch_max"] > 1e-3
    for wanted in ("auto", "on"):
        assert found[wanted]["rollout/log_prob_recomputed"] == 1
        assert found[wanted]["actor/kl_k3"] < 1e-10
        assert found[wanted]["rollout/log_prob_mismatch_max"] >= found["off"]["rollout/log_prob_mismatch_max"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", PLACES)
def test_the_ratio_is_one_after_compiled_sampling_on_the_gpu(folder, place):
    policy = make_policy(folder, place, "bfloat16", "cuda")
    settings = replace(FROZEN, recompute_log_prob="on", update_epochs=1)
    metrics = Learner(policy, settings, SingleProcess()).update(make_rollout(policy))
    assert metrics["rollout/log_prob_mismatch_max"] > 1e-6
    assert metrics["actor/approx_kl"] == metrics["actor/kl_k3"] == 0
