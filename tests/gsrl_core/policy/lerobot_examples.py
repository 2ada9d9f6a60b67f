"""lerobot's pi0.5 and pi0 cut to size."""

import dataclasses
import importlib
from contextlib import contextmanager

import pytest
import torch
from policy_examples import SMALL

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
    vision_mlp=4304,
)


@contextmanager
def small_lerobot(family="pi05"):
    """lerobot's modeling module of a family, with this module's sizes for the ones that it knows."""
    modeling = importlib.import_module(f"lerobot.policies.{family}.modeling_{family}")
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

    network = getattr(modeling, f"{family.upper()}Pytorch")
    build = network.__init__

    def build_narrow(self, *args, **kwargs):
        build(self, *args, **kwargs)
        # The projector's width is fixed as well.
        projector = self.paligemma_with_expert.paligemma.model.multi_modal_projector
        projector.linear = torch.nn.Linear(CONFIG.vision_width, CONFIG.width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "CONFIG_MAPPING", Reduced())
        patch.setattr(modeling, "get_gemma_config", sizes)
        patch.setattr(network, "__init__", build_narrow)
        yield modeling


def randomise(module, seed=0):
    """Weights that all matter: unit-variance outputs, open gates, no zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if "norm" in name or name.endswith("bias") else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
