"""The network against an independent implementation, cut to size: lerobot's pi0.5 and pi0, with the same weights."""

import dataclasses
import importlib

import pytest
import torch
from lerobot_examples import CONFIG, randomise, small_lerobot
from policy_examples import TOKENIZER

from gsrl_core.policy import flow
from gsrl_core.policy.checkpoint import write_checkpoint
from gsrl_core.policy.files import load_tensors
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED, canonical, check_names
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.transforms import FieldStats


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def pair(request):
    family = request.param
    pytest.importorskip(f"lerobot.policies.{family}.modeling_{family}")
    configuration = importlib.import_module(f"lerobot.policies.{family}.configuration_{family}")
    with small_lerobot(family) as modeling:
        settings = getattr(configuration, f"{family.upper()}Config")(
            chunk_size=CONFIG.horizon, n_action_steps=CONFIG.horizon, image_resolution=(56, 56), dtype="float32"
        )
        reference = getattr(modeling, f"{family.upper()}Pytorch")(settings).eval()
    randomise(reference)
    ours = dataclasses.replace(CONFIG, family=family)
    with torch.device("meta"):
        network = Pi05(ours)
    weights = {canonical(name): tensor for name, tensor in reference.state_dict().items()}
    weights.pop(UNUSED)
    check_names(weights, network.state_dict(), "lerobot")
    network.load_state_dict(weights, assign=True)
    return reference, network.eval()


def make_inputs(batch=3, tokens=9):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(batch, 3, 56, 56, generator=generator) * 2 - 1 for _ in range(2)]
    masks = [torch.ones(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)]
    ids = torch.randint(257152, (batch, tokens), generator=generator)
    token_mask = torch.ones(batch, tokens, dtype=torch.bool)
    token_mask[0, 6:] = False
    token_mask[:, 8:] = False
    noise = torch.randn(batch, CONFIG.horizon, 32, generator=generator)
    return images, masks, ids, token_mask, noise


def make_state(network):
    """pi0's further argument, or none."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 32, generator=generator)] if network.config.family == "pi0" else []


def test_sampled_chunk_agrees(pair):
    reference, network = pair
    images, masks, ids, token_mask, noise = make_inputs()
    state = make_state(network)
    with torch.no_grad():
        expected = reference.sample_actions(images, masks, ids, token_mask, *state, noise=noise, num_steps=5)
        slots = ("base_0_rgb", "left_wrist_0_rgb")
        prefix = network.embed_prefix(
            dict(zip(slots, images, strict=True)), dict(zip(slots, masks, strict=True)), ids, token_mask
        )
        # The second camera is masked, the last text columns are padding: neither was computed.
        assert prefix.valid.shape[1] == CONFIG.image_tokens + 8
        prefix = network.with_state(prefix, *state) if state else prefix
        actual = flow.sample_ode(lambda x, t: network.velocity(prefix, x, t), noise, 5)
    assert (actual - expected).norm() / expected.norm() < 1e-4


def test_velocity_and_training_loss_agree(pair):
    reference, network = pair
    images, masks, ids, token_mask, noise = make_inputs()
    state = make_state(network)
    generator = torch.Generator().manual_seed(2)
    actions, t = torch.randn(noise.shape, generator=generator), torch.tensor([0.001, 0.4, 1.0])
    with torch.no_grad():
        expected = reference.forward(images, masks, ids, token_mask, *state, actions, noise, t)
        slots = ("base_0_rgb", "left_wrist_0_rgb")
        prefix = network.embed_prefix(
            dict(zip(slots, images, strict=True)), dict(zip(slots, masks, strict=True)), ids, token_mask
        )
        prefix = network.with_state(prefix, *state) if state else prefix
        x_t, target = flow.flow_matching_target(actions, noise, t)
        actual = (network.velocity(prefix, x_t, t) - target).square()
    assert (actual - expected).norm() / expected.norm() < 1e-4


def test_lerobot_reads_what_is_written(pair, tmp_path):
    reference, network = pair
    stats = FieldStats(torch.zeros(7), torch.ones(7), -torch.ones(7), torch.ones(7))
    write_checkpoint(
        tmp_path / "saved", network=network, tokenizer=TOKENIZER, state_stats=stats, action_stats=stats, heads={},
        carried={}, card="",
    )  # fmt: skip
    written = load_tensors(tmp_path / "saved" / "model.safetensors")
    own = reference.state_dict()
    assert set(written) <= set(own)
    # What is missing is unused, or what lerobot makes of lm_head when it loads a file.
    assert set(own) - set(written) == {EMBEDDING, UNUSED}
    assert torch.equal(written.pop(TIED_EMBEDDING), own[EMBEDDING])
    assert [name for name in written if not torch.equal(written[name], own[name])] == []
