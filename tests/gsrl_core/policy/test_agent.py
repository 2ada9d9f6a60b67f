import pytest
import torch
from policy_examples import SMALL, make_observation

from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import Observation
from gsrl_core.policy.checkpoint import load_policy


def make_policy(folder, **changes):
    settings = {"denoise_steps": 3, "action_chunk": 2, "noise_method": "flow_sde", "device": "cpu"}
    return load_policy(folder, **(settings | changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["flow_sde", "flow_noise"])
def policy(folder, request):
    return make_policy(folder, noise_method=request.param)


def test_shapes_and_leading_batch(policy):
    sample = policy.act(make_observation(5), generator(), explore=True)
    assert sample.actions.shape == (5, 2, 7)
    assert (policy.horizon, policy.action_dim) == (2, 7)
    assert sample.log_prob.shape == sample.value.shape == (5,)
    assert all(len(tensor) == 5 for tensor in sample.chain.values())


def test_evaluate_recomputes_what_act_reported(policy):
    sample = policy.act(make_observation(6), generator(), explore=True)
    now = policy.evaluate(sample.chain)
    torch.testing.assert_close(now.log_prob, sample.log_prob, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(now.value, sample.value)


def test_evaluate_does_not_depend_on_the_batch(policy):
    sample = policy.act(make_observation(6), generator(), explore=True)
    whole = policy.evaluate(sample.chain)
    rows = torch.tensor([4, 1])
    part = policy.evaluate({name: tensor[rows] for name, tensor in sample.chain.items()})
    torch.testing.assert_close(part.log_prob, whole.log_prob[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.value, whole.value[rows])


def test_gradients_reach_the_trainable_parameters_only(policy):
    sample = policy.act(make_observation(4), generator(), explore=True)
    now = policy.evaluate(sample.chain)
    (now.log_prob.sum() + now.entropy.sum()).backward(retain_graph=True)
    groups = policy.trainable_parameters()
    assert all(p.grad is not None for p in groups["actor"])
    assert all(p.grad is None for p in groups["critic"])
    now.value.sum().backward()
    assert all(p.grad is not None for p in groups["critic"])
    frozen = [p for name, p in policy.network.named_parameters() if ".paligemma." in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert len({id(p) for group in groups.values() for p in group}) == len(policy.state_dict_trainable())


def test_log_prob_gradient_is_the_directional_derivative(folder):
    policy = make_policy(folder)
    sample = policy.act(make_observation(3), generator(), explore=True)
    weight = policy.network.action_out_proj.weight
    policy.evaluate(sample.chain).log_prob.sum().backward()
    direction = torch.randn(weight.shape, generator=generator(1))
    slope = (weight.grad * direction).sum().item()
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight.add_(step * direction)
            values.append(policy.evaluate(sample.chain).log_prob.sum().item())
            weight.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=2e-2)


def test_same_generator_state_same_sample(policy):
    observation = make_observation(3)
    first, second = (policy.act(observation, generator(7), explore=True) for _ in range(2))
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(first.log_prob, second.log_prob)
    other = policy.act(observation, generator(8), explore=True)
    assert not torch.equal(first.actions, other.actions)


def test_without_exploration_the_ode_is_followed(policy):
    observation = make_observation(3)
    sample = policy.act(observation, generator(7), explore=False)
    assert sample.chain == {}
    assert not sample.log_prob.any()
    x = torch.randn(3, SMALL.horizon, SMALL.action_dim, generator=generator(7))
    with torch.no_grad():
        prefix = policy.network.run_prefix(policy.prompt(observation))
        for t in (1.0, 2 / 3, 1 / 3):
            x = x - policy.network.velocity(prefix, x, torch.full((3,), t)) / 3
    expected = policy.action_normalizer.denormalize(x[:, :2])
    torch.testing.assert_close(sample.actions, expected, atol=1e-6, rtol=1e-5)
    assert not sample.value.any()


def test_the_critic_alone_is_the_critic_of_exploration(policy):
    observation = make_observation(3)
    torch.testing.assert_close(policy.value(observation), policy.act(observation, generator(), explore=True).value)


def test_entropy_is_minus_the_expected_log_prob(folder):
    policy = make_policy(folder, noise_method="flow_noise")
    observation = make_observation(1)
    many = Observation(
        {name: image.expand(4000, -1, -1, -1) for name, image in observation.rgb.items()},
        observation.state.expand(4000, -1),
        observation.instruction * 4000,
    )
    sample = policy.act(many, generator(3), explore=True)
    with torch.no_grad():
        entropy = policy.evaluate(sample.chain).entropy
    assert entropy.mean().item() == pytest.approx(-sample.log_prob.mean().item(), abs=0.15)


def test_fixed_noise_has_no_entropy_and_levels_keep_the_sum(folder):
    sample = make_policy(folder).act(make_observation(2), generator(), explore=True)
    assert not make_policy(folder).evaluate(sample.chain).entropy.any()
    learned = make_policy(folder, noise_method="flow_noise")
    chain = learned.act(make_observation(2), generator(), explore=True).chain
    total = learned.evaluate(chain).entropy
    for level, shape in (("action", (2, 2)), ("token", (2, 2, 7))):
        learned.set_levels("chunk", level)
        now = learned.evaluate(chain)
        assert now.log_prob.shape == (2,) and now.entropy.shape == shape
        torch.testing.assert_close(now.entropy.flatten(1).sum(1), total)


def test_joint_log_prob_is_the_mean_over_steps(folder):
    policy = make_policy(folder, noise_method="flow_noise", noise_std_range=(0.1, 0.100001))
    sample = policy.act(make_observation(2), generator(), explore=True)
    # 3 steps of deviation 0.1 and the unit normal start, 2 x 7 executed entries each.
    expected = (policy.evaluate(sample.chain).entropy * 4).mean().item()
    unit = 14 * 1.4189385
    narrow = 14 * (1.4189385 + torch.log(torch.tensor(0.1)).item())
    assert expected == pytest.approx(unit + 3 * narrow, rel=1e-3)


def test_padding_and_unexecuted_actions_carry_no_log_prob(folder):
    policy = make_policy(folder)
    sample = policy.act(make_observation(2), generator(), explore=True)
    chain = dict(sample.chain)
    spoiled = chain["x_next"].clone()
    spoiled[:, 2:] += 5.0
    spoiled[:, :, 7:] += 5.0
    chain["x_next"] = spoiled
    torch.testing.assert_close(policy.evaluate(chain).log_prob, policy.evaluate(sample.chain).log_prob)


def test_step_index_is_drawn_per_sample(folder):
    policy = make_policy(folder)
    steps = policy.act(make_observation(64), generator(), explore=True).chain["step"]
    assert set(steps.tolist()) == {0, 1, 2}


def test_chains_of_different_states_stack(policy):
    parts = [policy.act(make_observation(2, seed), generator(seed), explore=True) for seed in range(2)]
    joined = {name: torch.cat([part.chain[name] for part in parts]) for name in parts[0].chain}
    log_prob = policy.evaluate(joined).log_prob
    torch.testing.assert_close(log_prob, torch.cat([p.log_prob for p in parts]), atol=1e-4, rtol=1e-5)


def test_state_and_picture_change_the_action(folder):
    policy = make_policy(folder)
    base = make_observation(1)
    reference = policy.act(base, generator(), explore=False).actions
    moved = Observation(base.rgb, base.state + 0.5, base.instruction)
    darker = Observation({k: v // 3 for k, v in base.rgb.items()}, base.state, base.instruction)
    other = Observation(base.rgb, base.state, ("move the cube to the table",))
    for changed in (moved, darker, other):
        assert not torch.allclose(policy.act(changed, generator(), explore=False).actions, reference, atol=1e-6)


def test_trainable_state_round_trip(folder):
    first, second = make_policy(folder), make_policy(folder)
    with torch.no_grad():
        for parameter in (*first.trainable_parameters()["actor"], *first.trainable_parameters()["critic"]):
            parameter.add_(0.01)
    second.load_state_dict_trainable(first.state_dict_trainable())
    observation = make_observation(2)
    pair = [policy.act(observation, generator(), explore=True) for policy in (first, second)]
    assert torch.equal(pair[0].actions, pair[1].actions)
    assert torch.equal(pair[0].value, pair[1].value)
    with pytest.raises(CheckpointError, match="not a trainable tensor"):
        second.load_state_dict_trainable({"nonsense": torch.zeros(1)})


def test_wrong_observations_are_refused(folder):
    policy = make_policy(folder)
    base = make_observation(1)
    with pytest.raises(CheckpointError, match="state has 8 entries"):
        policy.value(Observation(base.rgb, base.state[:, :8], base.instruction))
    four = {f"camera{i}": base.rgb["3rd_view_camera"] for i in range(4)}
    with pytest.raises(CheckpointError, match="4 cameras given"):
        policy.value(Observation(four, base.state, base.instruction))


def test_chunk_longer_than_the_horizon_is_refused(folder):
    with pytest.raises(CheckpointError, match="allowed: 1 to 4"):
        make_policy(folder, action_chunk=5)


def test_one_gradient_step_raises_the_log_prob(policy):
    sample = policy.act(make_observation(8), generator(), explore=True)
    optimizer = torch.optim.SGD(policy.trainable_parameters()["actor"], lr=1e-5)
    before = policy.evaluate(sample.chain).log_prob.sum()
    (-before).backward()
    optimizer.step()
    with torch.no_grad():
        assert policy.evaluate(sample.chain).log_prob.sum() > before


def test_nothing_is_left_on_the_host(policy):
    # The meta device refuses to mix with host tensors, as CUDA does.
    policy.network.to("meta")
    policy.value_head.to("meta")
    if policy.noise_head is not None:
        policy.noise_head.to("meta")
    for explore in (True, False):
        sample = policy.act(make_observation(3), generator(), explore=explore)
        assert {tensor.device.type for tensor in (sample.actions, sample.log_prob, sample.value)} == {"meta"}
        on_host = {name for name, tensor in sample.chain.items() if tensor.device.type != "meta"}
        assert on_host == ({"prefix_valid"} if explore else set())  # the mask decides shapes
