"""The network against an independent implementation, cut to size: lerobot's pi0.5 and pi0, with the same weights."""

import dataclasses

import pytest
import torch
from policy_examples import SMALL, TOKENIZER

from gsrl_core.policy import flow
from gsrl_core.policy.checkpoint import write_checkpoint
from gsrl_core.policy.files import load_tensors
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED, canonical, check_names
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.transforms import FieldStats

# lerobot fixes the vocabulary, patches of 14 px, eight heads and the vision MLP.
CONFIG = dataclasses.replace(
    SMALL,
    image_size=56,
    patch_size=14,
    heads=8,
    head_dim=16,
    vocab_size=257152,
    action_dim=32,
    width=32,
    expert_width=32,
    horizon=5,
)


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def pair(request):
    family = request.param
    modeling = pytest.importorskip(f"lerobot.policies.{family}.modeling_{family}")
    configuration = pytest.importorskip(f"lerobot.policies.{family}.configuration_{family}")
    from transformers.models.auto import CONFIG_MAPPING

    class Reduced:
        """CONFIG_MAPPING whose PaliGemma has this test's vision tower."""

        def __getitem__(self, name):
            if name != "paligemma":
                return CONFIG_MAPPING[name]

            def build():
                config = CONFIG_MAPPING[name]()
                vision = config.vision_config
                vision.hidden_size, vision.num_hidden_layers = CONFIG.vision_width, CONFIG.vision_depth
                vision.num_attention_heads = CONFIG.vision_heads
                return config

            return build

    def sizes(variant):
        width, mlp = (CONFIG.width, CONFIG.mlp) if variant == "gemma_2b" else (CONFIG.expert_width, CONFIG.expert_mlp)
        return modeling.GemmaConfig(width, CONFIG.depth, mlp, CONFIG.heads, CONFIG.kv_heads, CONFIG.head_dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "CONFIG_MAPPING", Reduced())
        patch.setattr(modeling, "get_gemma_config", sizes)
        settings = getattr(configuration, f"{family.upper()}Config")(
            chunk_size=CONFIG.horizon, n_action_steps=CONFIG.horizon, image_resolution=(56, 56), dtype="float32"
        )
        reference = getattr(modeling, f"{family.upper()}Pytorch")(settings).eval()
    # The projector's width is fixed as well.
    projector = reference.paligemma_with_expert.paligemma.model.multi_modal_projector
    projector.linear = torch.nn.Linear(CONFIG.vision_width, CONFIG.width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    ours = dataclasses.replace(CONFIG, vision_mlp=4304, family=family)
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
