"""pi0: the same class with a token of the state, and time in the actions."""

import dataclasses
import json

import pytest
import torch
from policy_examples import SMALL, make_folder, make_observation
from safetensors.torch import load_file

from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import Observation
from gsrl_core.policy.checkpoint import check_checkpoint, load_policy, read_config, save_checkpoint
from gsrl_core.policy.config import config_from_json, preset
from gsrl_core.policy.pi05 import Pi05

PI0 = dataclasses.replace(SMALL, family="pi0", discrete_state=False, normalization="mean_std")


@pytest.fixture(scope="module")
def pi0_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pi0"), PI0)


@pytest.fixture(params=["flow_sde", "flow_noise"])
def policy(pi0_folder, request):
    return load_policy(pi0_folder, denoise_steps=3, action_chunk=2, noise_method=request.param)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_published_names(pi0_folder):
    with torch.device("meta"):
        network = Pi05(dataclasses.replace(preset("pi05"), family="pi0"))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["state_proj.weight"] == (1024, 32)
    assert shapes["time_mlp_in.weight"] == (1024, 2048)
    assert not any("dense" in name for name in shapes)
    stored = load_file(pi0_folder / "model.safetensors")
    assert {"state_proj.bias", "action_time_mlp_in.weight", "action_time_mlp_out.bias"} <= set(stored)
    assert not any(name.startswith("time_mlp") for name in stored)


def test_evaluate_recomputes_what_act_reported(policy):
    sample = policy.act(make_observation(6), generator(), explore=True)
    now = policy.evaluate(sample.chain)
    torch.testing.assert_close(now.log_prob, sample.log_prob, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(now.value, sample.value)


def test_gradients_reach_every_trained_weight(policy):
    now = policy.evaluate(policy.act(make_observation(4), generator(), explore=True).chain)
    (now.log_prob.sum() + now.value.sum()).backward()
    groups = policy.trainable_parameters()
    assert all(p.grad is not None for group in groups.values() for p in group)
    assert policy.network.state_proj.weight.grad.any()
    frozen = [p for name, p in policy.network.named_parameters() if ".paligemma." in name]
    assert all(p.grad is None for p in frozen)


def test_the_state_reaches_the_actions_though_not_the_prompt(policy):
    base = make_observation(2)
    moved = Observation(base.rgb, base.state + 0.5, base.instruction)
    assert torch.equal(policy.prompt(base).tokens, policy.prompt(moved).tokens)
    first, second = (policy.act(o, generator(), explore=False).actions for o in (base, moved))
    assert not torch.allclose(first, second, atol=1e-6)
    torch.testing.assert_close(policy.value(base), policy.value(moved))


def test_masked_text_does_not_matter(policy):
    observation = make_observation(2)
    mixed = Observation(observation.rgb, observation.state, (observation.instruction[0], "pick up the cube"))
    together = policy.act(mixed, generator(), explore=False).actions
    noise = torch.randn(2, PI0.horizon, PI0.action_dim, generator=generator())
    alone = policy._sampler("ode", policy.prompt(mixed.select(torch.tensor([1]))), {"noise": noise[1:]})["x"]
    torch.testing.assert_close(together[1:], policy._actions(alone), atol=1e-5, rtol=1e-4)


def test_the_place_of_prefixes_changes_nothing(pi0_folder):
    found = []
    for where in ("device", "recompute"):
        policy = load_policy(pi0_folder, denoise_steps=3, action_chunk=2)
        policy.keep_prefixes(where, 8, 4)
        found.append(policy.evaluate(policy.act(make_observation(3), generator(), explore=True).chain).log_prob)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_round_trip(policy, tmp_path):
    save_checkpoint(tmp_path / "saved", policy)
    check_checkpoint(tmp_path / "saved", action_chunk=2, noise_method=policy.sampling.noise_method)
    again = load_policy(tmp_path / "saved", denoise_steps=3, action_chunk=2, noise_method=policy.sampling.noise_method)
    samples = [p.act(make_observation(2), generator(), explore=True).actions for p in (policy, again)]
    assert torch.equal(*samples)


def test_foreign_configurations(pi0_folder, tmp_path):
    lerobot = config_from_json({"type": "pi0", "chunk_size": 50})
    assert (lerobot.family, lerobot.discrete_state, lerobot.normalization) == ("pi0", False, "mean_std")
    assert lerobot.max_token_len == 48
    # openpi's converter does not name the family; the tensors do.
    target = make_folder(tmp_path / "openpi", PI0)
    (target / "config.json").write_text(json.dumps({"action_horizon": 50, "paligemma_variant": "gemma_2b"}))
    assert read_config(target).family == "pi0"
    with pytest.raises(CheckpointError, match="misshapen"):
        load_policy(target, denoise_steps=1, action_chunk=1)
