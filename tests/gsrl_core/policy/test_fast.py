import dataclasses

import pytest
import torch
from policy_examples import SMALL, make_observation, randomised

from gsrl_core.dist.weights import WeightPublisher, WeightReceiver
from gsrl_core.policy import fast, fused
from gsrl_core.policy.checkpoint import load_policy, save_checkpoint
from gsrl_core.policy.fast import FastNetwork
from gsrl_core.policy.files import load_tensors
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.prompt import pack

STEPS = 3
GROUPED = dataclasses.replace(SMALL, kv_heads=2)


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(fast, "has_compiler", lambda: False)


def make_prompt(config, batch=3, masked=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side, slots = config.image_size, ("base_0_rgb", "left_wrist_0_rgb")
    images = {slot: torch.rand(batch, 3, side, side, generator=generator) * 2 - 1 for slot in slots}
    masks = {slot: torch.ones(batch, dtype=torch.bool) for slot in slots}
    tokens = torch.randint(config.vocab_size, (batch, 12), generator=generator)
    token_mask = torch.arange(12).expand(batch, 12) < 9
    if masked:
        masks["left_wrist_0_rgb"][0] = False
        token_mask = token_mask & (torch.arange(12) < torch.tensor([[9], [5], [7]]))
    return pack(images, masks, tokens, token_mask, config.image_tokens)


def pair(config=SMALL, dtype=torch.float32):
    network = Pi05(config, dtype)
    network.load_state_dict(randomised(config).state_dict())
    for name, parameter in network.named_parameters():
        if ".paligemma." in name and "norm" not in name and "embedding" not in name:
            parameter.data = parameter.data.to(dtype)
    network.requires_grad_(False).eval()
    return network, FastNetwork(network, STEPS, compiled=False)


def hidden_states(network, prefix, x):
    denoise = network.denoiser(prefix)
    times = [1.0, 2 / 3, 1 / 3]
    return torch.stack([denoise(x, torch.full((len(x),), t)) for t in times])


@pytest.mark.parametrize("masked", [False, True], ids=["complete", "masked"])
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["one group", "two groups"])
def test_the_twins_agree(config, masked):
    network, twin = pair(config)
    prompt = make_prompt(config, masked=masked)
    x = torch.randn(3, config.horizon, config.action_dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, quick = network.run_prefix(prompt), twin.run_prefix(prompt, features=True)
        close = {"atol": 2e-5, "rtol": 1e-4}
        valid = prompt.valid
        torch.testing.assert_close(quick.hidden[valid], plain.hidden[valid], **close)
        for name in ("keys", "values"):
            by_token = [getattr(cache, name).permute(0, 3, 1, 2, 4)[valid] for cache in (quick, plain)]
            torch.testing.assert_close(*by_token, **close)
        torch.testing.assert_close(hidden_states(twin, quick, x), hidden_states(network, plain, x), **close)


def test_without_features_the_expert_sees_the_same():
    network, twin = pair()
    prompt = make_prompt(SMALL)
    for backend in (network, twin):
        with torch.no_grad():
            full, short = (backend.run_prefix(prompt, features=features) for features in (True, False))
        assert short.hidden is None
        assert torch.equal(short.keys, full.keys)
        assert torch.equal(short.values, full.values)


def test_bfloat16_twins_agree_as_well_as_rounding_allows():
    network, twin = pair(dtype=torch.bfloat16)
    prompt = make_prompt(SMALL)
    x = torch.randn(3, SMALL.horizon, SMALL.action_dim, generator=torch.Generator().manual_seed(2))
    exact, _ = pair()
    with torch.no_grad():
        wanted = hidden_states(exact, exact.run_prefix(prompt), x)
        plain = hidden_states(network, network.run_prefix(prompt), x)
        quick = hidden_states(twin, twin.run_prefix(prompt, features=False), x)
    assert quick.dtype == torch.float32
    assert (quick - wanted).norm() < 1.5 * (plain - wanted).norm() < 0.05 * wanted.norm()


def test_frozen_weights_are_moved_not_copied():
    network, twin = pair()
    layer = network.paligemma.language_model.layers[0]
    reference = randomised(SMALL).state_dict()
    stack = twin._prefix[0].gate_up
    assert layer.mlp.gate_proj.weight.data_ptr() == stack.data_ptr()
    assert layer.mlp.up_proj.weight.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("noise_method", ["flow_sde", "flow_noise"])
def test_a_policy_with_the_twin_acts_the_same(folder, uncompiled, tmp_path, noise_method):
    settings = {"denoise_steps": STEPS, "action_chunk": 2, "noise_method": noise_method}
    plain = load_policy(folder, **settings)
    quick = load_policy(folder, **settings)
    quick._sampler.fast = FastNetwork(quick.network, STEPS)
    observation = make_observation(5)
    for explore in (False, True):
        first, second = (p.act(observation, torch.Generator().manual_seed(1), explore=explore) for p in (plain, quick))
        torch.testing.assert_close(second.actions, first.actions, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(second.value, first.value, atol=1e-5, rtol=1e-4)
        assert first.chain.keys() == second.chain.keys()
    # What it reports is what the network itself makes of its chain.
    torch.testing.assert_close(quick.evaluate(second.chain).log_prob, second.log_prob, atol=1e-3, rtol=1e-4)
    save_checkpoint(tmp_path / "saved", quick)
    stored, written = (load_tensors(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[name], written[name]) for name in stored)


def optimizer_step(policy):
    parameters = policy.trainable_parameters()["actor"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.01).step()


def new_state(policy):
    policy.load_state_dict_trainable({name: t + 0.01 for name, t in policy.state_dict_trainable().items()})


def new_weights_from_elsewhere(policy):
    weights = {name: tensor + 0.01 for name, tensor in policy.state_dict_trainable().items()}
    WeightReceiver().apply(WeightPublisher().changes(weights), policy.state_dict_trainable())


@pytest.mark.parametrize("change", [optimizer_step, new_state, new_weights_from_elsewhere])
def test_changed_weights_are_noticed(folder, uncompiled, change):
    policy = load_policy(folder, denoise_steps=STEPS, action_chunk=2)
    twin = policy._sampler.fast = FastNetwork(policy.network, STEPS)
    before = policy.act(make_observation(2), torch.Generator().manual_seed(0), explore=False).actions
    change(policy)
    quick = policy.act(make_observation(2), torch.Generator().manual_seed(0), explore=False).actions
    policy._sampler.fast = None
    plain = policy.act(make_observation(2), torch.Generator().manual_seed(0), explore=False).actions
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, before, atol=1e-3)
    copies = [layer.qkv.data_ptr() for layer in twin._expert]
    twin.refresh()
    # In place: captured graphs read them where they are.
    assert [layer.qkv.data_ptr() for layer in twin._expert] == copies


def test_one_compilation_serves_all_layers_and_batch_sizes(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compile_with(function, backend=backend, **kw))
    torch._dynamo.reset()
    functions = fused.compiled.__wrapped__()
    network, twin = pair()
    twin._functions = functions
    for batch in (3, 5, 1):
        prompt = make_prompt(SMALL, batch)
        x = torch.zeros(batch, SMALL.horizon, SMALL.action_dim)
        with torch.no_grad():
            quick = hidden_states(twin, twin.run_prefix(prompt, features=True), x)
            torch.testing.assert_close(
                quick, hidden_states(network, network.run_prefix(prompt), x), atol=2e-5, rtol=1e-4
            )
    assert len(graphs) == len(vars(functions))


@pytest.mark.slow
def test_compiled_kernels_agree():
    network, _ = pair()
    twin = FastNetwork(network, STEPS)
    prompt = make_prompt(SMALL)
    x = torch.zeros(3, SMALL.horizon, SMALL.action_dim)
    with torch.no_grad():
        quick = hidden_states(twin, twin.run_prefix(prompt, features=True), x)
        plain = hidden_states(network, network.run_prefix(prompt), x)
    torch.testing.assert_close(quick, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("noise_method", ["flow_sde", "flow_noise"])
def test_graphs_and_kernels_on_the_gpu_agree_with_the_network(folder, noise_method):
    settings = {"denoise_steps": STEPS, "action_chunk": 2, "noise_method": noise_method, "device": "cuda"}
    plain, quick = (load_policy(folder, **settings, compile=compile) for compile in ("never", "auto"))
    for batch in (1, 5, 40):
        observation = make_observation(batch)
        for explore in (True, False):
            samples = [p.act(observation, torch.Generator().manual_seed(1), explore=explore) for p in (plain, quick)]
            torch.testing.assert_close(samples[1].actions, samples[0].actions, atol=1e-3, rtol=1e-3)
        new_state(plain)
        new_state(quick)
