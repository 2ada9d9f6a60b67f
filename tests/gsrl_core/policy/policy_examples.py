from pathlib import Path

import torch

from gsrl_core.interfaces import Observation
from gsrl_core.policy.checkpoint import write_checkpoint
from gsrl_core.policy.config import Pi05Config
from gsrl_core.policy.pi05 import Pi05, initialise
from gsrl_core.policy.transforms import FieldStats

TOKENIZER = Path(__file__).parents[3] / "gsrl_core" / "bundled" / "pi05_tiny" / "tokenizer.model"

SMALL = Pi05Config(
    image_size=32,
    patch_size=16,
    vision_width=16,
    vision_depth=2,
    vision_heads=2,
    vision_mlp=24,
    width=24,
    depth=2,
    mlp=40,
    heads=4,
    kv_heads=1,
    head_dim=8,
    expert_width=16,
    expert_mlp=24,
    vocab_size=512,
    horizon=4,
    max_token_len=48,
    value_hidden=(16,),
    noise_hidden=(8,),
)


def stats(width, spread=1.0):
    ramp = torch.linspace(0.5, 1.5, width) * spread
    return FieldStats(torch.zeros(width), ramp / 2, -ramp, ramp)


def randomised(config, seed=0, everywhere=False):
    """A network whose adaRMS gates are open, so that every weight matters; ``everywhere`` makes it act wildly."""
    network = Pi05(config)
    initialise(network, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if everywhere or "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network.eval()


def make_folder(folder, config=SMALL, tokenizer=TOKENIZER, action_spread=0.05, everywhere=False):
    write_checkpoint(
        folder,
        network=randomised(config, everywhere=everywhere),
        tokenizer=tokenizer,
        state_stats=stats(9),
        action_stats=stats(7, action_spread),
        heads={},
        carried={},
        card="# A test checkpoint\n",
    )
    return folder


def make_observation(batch, seed=0, instruction="pick up the cube and put it on the plate"):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.randint(256, (batch, 24, 32, 3), generator=generator, dtype=torch.uint8)
    state = torch.rand(batch, 9, generator=generator) * 2 - 1
    return Observation({"3rd_view_camera": rgb}, state, (instruction,) * batch)
