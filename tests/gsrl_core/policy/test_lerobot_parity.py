"""The network against an independent implementation: lerobot's pi0.5, with the same random weights, cut to size."""

import dataclasses

import pytest
import torch
from policy_examples import SMALL

from gsrl_core.policy import flow
from gsrl_core.policy.keys import UNUSED, canonical, check_names
from gsrl_core.policy.pi05 import Pi05

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


@pytest.fixture(scope="module")
def pair():
    modeling = pytest.importorskip("lerobot.policies.pi05.modeling_pi05")
    configuration = pytest.importorskip("lerobot.policies.pi05.configuration_pi05")
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
        settings = configuration.PI05Config(
            chunk_size=CONFIG.horizon, n_action_steps=CONFIG.horizon, image_resolution=(56, 56), dtype="float32"
        )
        reference = modeling.PI05Pytorch(settings).eval()
    # The projector's width is fixed as well.
    projector = reference.paligemma_with_expert.paligemma.model.multi_modal_projector
    projector.linear = torch.nn.Linear(CONFIG.vision_width, CONFIG.width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    ours = dataclasses.replace(CONFIG, vision_mlp=4304)
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


def test_sampled_chunk_agrees(pair):
    reference, network = pair
    images, masks, ids, token_mask, noise = make_inputs()
    with torch.no_grad():
        expected = reference.sample_actions(images, masks, ids, token_mask, noise=noise, num_steps=5)
        slots = ("base_0_rgb", "left_wrist_0_rgb")
        prefix = network.embed_prefix(
            dict(zip(slots, images, strict=True)), dict(zip(slots, masks, strict=True)), ids, token_mask
        )
        actual = flow.sample_ode(lambda x, t: network.velocity(prefix, x, t), noise, 5)
    assert (actual - expected).norm() / expected.norm() < 1e-4
    # The second camera is masked, the last text columns are padding: neither was computed.
    assert prefix.valid.shape[1] == CONFIG.image_tokens + 8


def test_velocity_and_training_loss_agree(pair):
    reference, network = pair
    images, masks, ids, token_mask, noise = make_inputs()
    generator = torch.Generator().manual_seed(2)
    actions, t = torch.randn(noise.shape, generator=generator), torch.tensor([0.001, 0.4, 1.0])
    with torch.no_grad():
        expected = reference.forward(images, masks, ids, token_mask, actions, noise, t)
        slots = ("base_0_rgb", "left_wrist_0_rgb")
        prefix = network.embed_prefix(
            dict(zip(slots, images, strict=True)), dict(zip(slots, masks, strict=True)), ids, token_mask
        )
        x_t, target = flow.flow_matching_target(actions, noise, t)
        actual = (network.velocity(prefix, x_t, t) - target).square()
    assert (actual - expected).norm() / expected.norm() < 1e-4
