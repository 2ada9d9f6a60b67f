import logging
import weakref
from dataclasses import replace

import pytest
import torch
from policy_examples import SMALL, make_folder, make_observation
from test_update import CHUNKS, EPISODES, FROZEN, make_rollout
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsrl_core.dist.collective import SingleProcess
from gsrl_core.policy import storage
from gsrl_core.policy.checkpoint import load_policy
from gsrl_core.policy.storage import GIB, Memory, choose, free_memory, update_bytes
from gsrl_core.rl.ppo import Learner

PLACES = ("device", "host", "recompute")


def policy_that_keeps(folder, where, noise_method="flow_sde"):
    policy = load_policy(folder, denoise_steps=3, action_chunk=2, noise_method=noise_method)
    policy.keep_prefixes(where, samples=64, micro_batch=8)
    return policy


def gradients(folder, where, noise_method):
    """Of the log-probability and the value of two batches, whose prompts differ in length."""
    policy = policy_that_keeps(folder, where, noise_method)
    generator = torch.Generator().manual_seed(0)
    samples = [policy.act(make_observation(3, seed), generator, explore=True) for seed in range(2)]
    chain = {name: torch.cat([s.chain[name] for s in samples]) for name in samples[0].chain}
    now = policy.evaluate(chain)
    (now.log_prob.sum() + now.value.square().sum()).backward()
    groups = policy.trainable_parameters()
    slopes = torch.cat([p.grad.reshape(-1) for group in ("actor", "critic") for p in groups[group]])
    return now.log_prob.detach(), now.value.detach(), slopes, chain


@pytest.mark.parametrize("noise_method", ["flow_sde", "flow_noise"])
def test_the_place_changes_no_gradient(folder, noise_method):
    kept, *others = (gradients(folder, where, noise_method) for where in PLACES)
    assert kept[2].abs().max() > 0
    for other in others:
        for ours, theirs in zip(kept[:3], other[:3], strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    assert "prefix_keys" not in others[1][3]
    assert others[1][3]["image0"].dtype == torch.uint8


@pytest.mark.parametrize("where", PLACES)
def test_a_pass_reads_nothing_back_from_the_device(folder, where):
    policy = policy_that_keeps(folder, where)
    chain = policy.act(make_observation(3), torch.Generator().manual_seed(0), explore=True).chain
    assert chain["prefix_valid"].device.type == "cpu"
    extent = policy.store.extent(chain)
    assert 0 < extent.columns <= chain["prefix_valid"].shape[1]
    policy.network.to("meta")
    policy.value_head.to("meta")
    now = policy.evaluate(chain)  # the meta device has no numbers that could be read
    assert now.log_prob.device.type == now.value.device.type == "meta"


class CountedBytes(TorchDispatchMode):
    """Storages that are made under it and not given back yet, and the most bytes of them at a time."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return result


class OneOfTwo(SingleProcess):
    """The first process of a group whose second one has no samples."""

    world_size = 2

    def gather(self, tensor):
        return torch.stack([tensor, torch.zeros_like(tensor)])


@pytest.mark.parametrize(("collective", "micro_batch", "share"), [(SingleProcess(), 6, 0.5), (OneOfTwo(), 3, 0.8)])
def test_the_estimate_covers_an_update_counted_storage_by_storage(tmp_path, collective, micro_batch, share):
    # Prefixes much longer than chunks, as at full size.
    wide = replace(SMALL, image_size=128, width=32, expert_width=48, expert_mlp=128, head_dim=32)
    policy = load_policy(make_folder(tmp_path / "wide", wide), denoise_steps=3, action_chunk=2, precision="bfloat16")
    policy.keep_prefixes("device", CHUNKS * EPISODES, micro_batch)
    rollout = make_rollout(policy)
    # Two steps, so that the second meets moments.
    settings = replace(FROZEN, update_epochs=1, global_batch=6, micro_batch=micro_batch, learning_rate=1e-3)
    learner = Learner(policy, settings, collective)
    chains = [tensor for part in rollout.chain for tensor in part.values()]
    with CountedBytes([*policy.network.parameters(), *policy.value_head.parameters(), *chains]) as counted:
        learner.update(rollout)
    row = sum(rollout.chain[0][name][0].nbytes for name in ("prefix_keys", "prefix_values"))
    trained = sum(parameter.numel() for group in learner.groups.values() for parameter in group)
    estimate = update_bytes(trained, micro_batch, row)
    assert share * estimate < counted.peak <= estimate
    # Gradients, two moments, and the gradients on their way to the other process, all at once.
    assert collective.world_size == 1 or counted.peak >= 16 * trained


def test_pictures_come_back_bit_by_bit():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    network_range = levels.float() / 255.0 * 2.0 - 1.0
    assert torch.equal(storage._bytes(network_range), levels)
    rounded = network_range.to(torch.bfloat16).float()
    assert (storage._bytes(rounded).int() - levels.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("needed", "reserve", "on_host", "place"),
    [
        (50, 30, False, "device"),  # 80 <= 0.9 * 100
        (61, 30, False, "host"),  # 91 > 90, 61 <= 0.6 * 200
        (121, 0, False, "recompute"),
        (100, 20, True, "device"),  # on a CPU there is one memory: 120 <= 0.6 * 200
        (101, 20, True, "recompute"),
    ],
)
def test_the_first_place_that_is_large_enough(needed, reserve, on_host, place):
    free = Memory(device=100, host=200)
    assert choose("auto", needed, reserve, free, on_host=on_host) == place
    for wanted in PLACES:
        assert choose(wanted, needed, reserve, free, on_host=on_host) == wanted


def test_the_estimate_of_the_full_size_is_what_was_measured():
    # 18 layers, one group of 256, keys and values in bfloat16, 256 picture and 16 text tokens: 5.01 MB a sample.
    row = 2 * 18 * 256 * (256 + 16) * 2
    assert row * 10_240 / 1e9 == pytest.approx(51.3, abs=0.1)
    # 431 M parameters with gradient and two moments, and a copy: 16 bytes each; 128 samples with what autograd holds.
    assert update_bytes(431_000_000, 128, row) == 431_000_000 * 16 + 128 * 4 * row


def test_the_choice_is_logged_with_its_reasons_and_made_once(folder, caplog, monkeypatch):
    monkeypatch.setattr(storage, "free_memory", lambda device: Memory(0, 40 * GIB))
    policy = policy_that_keeps(folder, "auto")
    with caplog.at_level(logging.INFO):
        for seed in range(2):
            policy.act(make_observation(2, seed), torch.Generator().manual_seed(0), explore=True)
    lines = [record.message for record in caplog.records if "prefixes of 64 samples" in record.message]
    assert len(lines) == 1
    assert "40 GiB on the host: device" in lines[0]
    monkeypatch.setattr(storage, "free_memory", lambda device: Memory(0, 1000))
    policy = policy_that_keeps(folder, "auto")
    chain = policy.act(make_observation(2), torch.Generator().manual_seed(0), explore=True).chain
    assert policy.store.place == "recompute"
    assert sum(tensor.nbytes for tensor in chain.values()) > 0


def test_free_memory_is_less_than_the_machine_has():
    free = free_memory(torch.device("cpu"))
    assert free.device == 0
    assert 0 < free.host < 1 << 44


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", PLACES)
def test_places_on_the_gpu(folder, where):
    policy = load_policy(folder, denoise_steps=3, action_chunk=2, device="cuda")
    policy.keep_prefixes(where, samples=64, micro_batch=8)
    chain = policy.act(make_observation(3), torch.Generator().manual_seed(0), explore=True).chain
    kept = chain["prefix_keys" if "prefix_keys" in chain else "tokens"]
    assert kept.device.type == ("cpu" if where == "host" else "cuda")
    assert kept.is_pinned() == (where == "host")
    assert policy.evaluate(chain).log_prob.isfinite().all()
