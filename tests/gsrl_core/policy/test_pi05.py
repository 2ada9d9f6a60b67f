import dataclasses

import pytest
import torch
from policy_examples import SMALL, randomised

from gsrl_core.policy.config import PRESETS, Pi05Config, preset
from gsrl_core.policy.gemma import apply_rotary, grouped_attention, rotary
from gsrl_core.policy.keys import EMBEDDING, UNUSED, published
from gsrl_core.policy.pi05 import Pi05, initialise, sincos_time


def inputs(batch=3, tokens=12, slots=("base_0_rgb",), seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = SMALL.image_size
    images = {slot: torch.rand(batch, 3, side, side, generator=generator) * 2 - 1 for slot in slots}
    masks = {slot: torch.ones(batch, dtype=torch.bool) for slot in slots}
    ids = torch.randint(SMALL.vocab_size, (batch, tokens), generator=generator)
    x = torch.randn(batch, SMALL.horizon, SMALL.action_dim, generator=generator)
    return images, masks, ids, torch.ones(batch, tokens, dtype=torch.bool), x, torch.rand(batch, generator=generator)


def test_key_tree_and_size_of_the_published_model():
    with torch.device("meta"):
        network = Pi05(preset("pi05"))
    shapes = {published(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # 812 stored names, one of which (the expert's unused lm_head) is not computed here.
    assert len(shapes) == 811
    assert UNUSED not in shapes
    prefix, expert = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model."
    vision = prefix + "model.vision_tower.vision_model."
    for name, shape in {
        "action_in_proj.weight": (1024, 32),
        "action_out_proj.weight": (32, 1024),
        "time_mlp_in.bias": (1024,),
        prefix + "lm_head.weight": (257152, 2048),
        prefix + "model.language_model.layers.17.self_attn.k_proj.weight": (256, 2048),
        prefix + "model.language_model.layers.0.mlp.down_proj.weight": (2048, 16384),
        prefix + "model.language_model.norm.weight": (2048,),
        prefix + "model.multi_modal_projector.linear.bias": (2048,),
        vision + "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        vision + "embeddings.position_embedding.weight": (256, 1152),
        vision + "encoder.layers.26.mlp.fc1.weight": (4304, 1152),
        vision + "post_layernorm.bias": (1152,),
        expert + "layers.17.input_layernorm.dense.weight": (3072, 1024),
        expert + "layers.3.self_attn.o_proj.weight": (1024, 2048),
        expert + "norm.dense.bias": (3072,),
    }.items():
        assert shapes[name] == shape, name
    total = sum(tensor.numel() for tensor in network.state_dict().values()) + 257152 * 1024
    assert total == pytest.approx(3.617e9, rel=1e-3)
    trained = sum(p.numel() for p in network.trainable_in_ppo().values())
    assert trained == pytest.approx(427.9e6 + 2.17e6, rel=1e-3)


def test_tiny_fits_in_ten_megabytes():
    network = Pi05(preset("pi05_tiny"))
    assert sum(p.numel() for p in network.parameters()) * 4 < 9.9e6


def test_absent_and_masked_slots_are_the_same():
    network = randomised(SMALL)
    images, masks, ids, token_mask, x, t = inputs(slots=("base_0_rgb", "left_wrist_0_rgb"))
    masks["left_wrist_0_rgb"][:] = False
    alone = {"base_0_rgb": images["base_0_rgb"]}
    with torch.no_grad():
        masked = network.embed_prefix(images, masks, ids, token_mask)
        absent = network.embed_prefix(alone, masks, ids, token_mask)
        assert masked.keys.shape == absent.keys.shape
        assert torch.equal(network.velocity(masked, x, t), network.velocity(absent, x, t))


def test_dropping_is_exact():
    # Row 0 has its second camera masked inside a batch where row 1 shows it, and padded text: the same as alone.
    network = randomised(SMALL)
    images, masks, ids, token_mask, x, t = inputs(batch=2, slots=("base_0_rgb", "left_wrist_0_rgb"))
    masks["left_wrist_0_rgb"][0] = False
    token_mask[0, 7:] = False
    with torch.no_grad():
        together = network.velocity(network.embed_prefix(images, masks, ids, token_mask), x, t)
        first = {"base_0_rgb": images["base_0_rgb"][:1]}, {"base_0_rgb": masks["base_0_rgb"][:1]}
        alone = network.embed_prefix(*first, ids[:1, :7], token_mask[:1, :7])
        assert alone.key_mask is None
        torch.testing.assert_close(together[:1], network.velocity(alone, x[:1], t[:1]), atol=1e-5, rtol=1e-4)


def test_masked_content_does_not_matter():
    network = randomised(SMALL)
    images, masks, ids, token_mask, x, t = inputs()
    token_mask[1, 5:] = False
    with torch.no_grad():
        before = network.velocity(network.embed_prefix(images, masks, ids, token_mask), x, t)
        ids[1, 5:] = 7
        after = network.velocity(network.embed_prefix(images, masks, ids, token_mask), x, t)
    assert torch.equal(before, after)


def test_every_input_matters_and_gradients_reach_every_weight():
    network = randomised(SMALL)
    images, masks, ids, token_mask, x, t = inputs()
    image = images["base_0_rgb"].requires_grad_()
    x.requires_grad_()
    prefix = network.embed_prefix(images, masks, ids, token_mask)
    loss = network.velocity(prefix, x, t).square().sum() + prefix.hidden.square().sum()
    loss.backward()
    assert image.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_checkpointing_runs_layers_twice_and_changes_no_gradient():
    images, masks, ids, token_mask, x, t = inputs()
    found = []
    for checkpointing in (False, True):
        network, calls = randomised(SMALL), []
        network.gradient_checkpointing = checkpointing
        for stack in (network.expert, network.paligemma.language_model):
            for layer in stack.layers:
                layer.register_forward_pre_hook(lambda layer, _, calls=calls: calls.append(layer))
        prefix = network.embed_prefix(images, masks, ids, token_mask)
        loss = network.velocity(prefix, x, t).square().sum() + prefix.hidden.square().sum()
        loss.backward()
        assert len(calls) == 2 * SMALL.depth * (2 if checkpointing else 1)
        found.append([p.grad for p in network.parameters()])
        with torch.no_grad():
            calls.clear()
            network.embed_prefix(images, masks, ids, token_mask)
        assert len(calls) == SMALL.depth
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_time_conditions_the_velocity():
    network = randomised(SMALL)
    images, masks, ids, token_mask, x, t = inputs()
    with torch.no_grad():
        prefix = network.embed_prefix(images, masks, ids, token_mask)
        assert not torch.allclose(network.velocity(prefix, x, t), network.velocity(prefix, x, 1 - t), atol=1e-3)


def test_rotary_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).unbind(0)

    def score(i, j):
        rotated = [apply_rotary(v, rotary(torch.tensor([[p]]), 16)) for v, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(3, 5) == pytest.approx(score(103, 105), abs=1e-3)
    assert score(3, 5) != pytest.approx(score(3, 9), abs=1e-3)
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_grouped_attention_against_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 5, 8, generator=generator).unbind(0)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    out = grouped_attention(q, k, v, mask)
    for b in range(2):
        for head in range(4):
            group = head // 2
            scores = q[b, head] @ k[b, group].T / 8**0.5
            weights = scores.masked_fill(~mask[b], float("-inf")).softmax(-1)
            torch.testing.assert_close(out[b, :, head * 8 : head * 8 + 8], weights @ v[b, group])


def test_time_features():
    features = sincos_time(torch.tensor([0.0, 1.0]), 8)
    assert features[0].tolist() == [0.0] * 4 + [1.0] * 4
    # Longest period 4: sin(2 pi / 4) = 1, cos = 0.
    assert features[1, 3].item() == pytest.approx(1.0)
    assert features[1, 7].item() == pytest.approx(0.0, abs=1e-12)


def test_bfloat16_activations_keep_float32_masters():
    wide, narrow = randomised(SMALL), Pi05(SMALL, torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    images, masks, ids, token_mask, x, t = inputs()
    prefix = narrow.embed_prefix(images, masks, ids, token_mask)
    assert prefix.keys.dtype == torch.bfloat16
    velocity = narrow.velocity(prefix, x, t)
    assert velocity.dtype == torch.float32
    with torch.no_grad():
        exact = wide.velocity(wide.embed_prefix(images, masks, ids, token_mask), x, t)
    assert (velocity - exact).norm() / exact.norm() < 0.05
    velocity.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in narrow.parameters() if p.grad is not None)


def test_initialise_is_deterministic_and_starts_with_closed_gates():
    networks = [Pi05(SMALL) for _ in range(2)]
    for network in networks:
        initialise(network, 3)
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(not first[name].any() for name in first if "dense" in name)
    assert first[EMBEDDING].std().item() == pytest.approx(SMALL.width**-0.5, rel=0.05)


def test_presets_are_consistent():
    for config in PRESETS.values():
        assert config.image_size % config.patch_size == 0
        assert config.vision_width % config.vision_heads == 0
        assert config.heads % config.kv_heads == 0
    assert dataclasses.asdict(preset("pi05")) == dataclasses.asdict(Pi05Config())
