"""The 3.4 B network against lerobot's pi0.5, an independent implementation, with the same random weights.

    PYTHONPATH=. python benchmarks/parity.py [--precision bfloat16 float32] [--depth 18]

Both hold the same tensors, so the memory is that of one network: 7.5 GB in bfloat16 and 13.5 GB in float32, with the
numbers of bfloat16. One picture and two masked slots, a prompt of 30 of 200 tokens, 50 actions. lerobot integrates the
flow in 10 steps; what it computes at the steps' times is compared with this repository's velocity at the same points,
and its chunk with this repository's from the same noise. Relative errors are |ours - lerobot's| / |lerobot's|.

In bfloat16 the two do not round alike: lerobot keeps the vision tower in float32. How far bfloat16 is from float32 in
either is the yardstick, and told if both were asked for. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gsrl_core.policy import flow
from gsrl_core.policy.config import IMAGE_SLOTS, Pi05Config, preset
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED
from gsrl_core.policy.pi05 import Pi05

STEPS = 10
PROMPT_TOKENS = 30
SHOWN_STEPS = (0, 4, 9)
"""Integration steps whose velocities are told: t = 1, 0.6 and 0.1."""
_FLOAT32 = ("vision_tower", "multi_modal_projector", "layernorm", "model.norm", "action_", "time_mlp")
"""What lerobot computes in float32 in a model of dtype bfloat16."""


@dataclass(frozen=True)
class Inputs:
    """One observation, its noise; the second and third picture are masked."""

    images: list[Tensor]
    """float32 [1, 3, S, S] in [-1, 1], one for each slot."""
    masks: list[Tensor]
    """bool [1]."""
    tokens: Tensor
    """int64 [1, T]."""
    token_mask: Tensor
    """bool [1, T]."""
    noise: Tensor
    """float32 [1, H, A]."""


@dataclass(frozen=True)
class Found:
    """What one precision gave, on the CPU."""

    errors: Mapping[str, float]
    """Of ours against lerobot's, relative."""
    ours: Tensor
    """Chunk float32 [1, H, A]."""
    theirs: Tensor
    seconds: Mapping[str, float]
    """Of the chunks."""


def make_inputs(config: Pi05Config, device: torch.device, seed: int = 1) -> Inputs:
    """Noise of the shapes of a camera's picture and a prompt."""
    generator = torch.Generator().manual_seed(seed)
    size, length = config.image_size, config.max_token_len
    images = [torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for _ in IMAGE_SLOTS]
    masks = [torch.tensor([slot == IMAGE_SLOTS[0]]) for slot in IMAGE_SLOTS]
    tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
    token_mask = torch.arange(length)[None] < min(PROMPT_TOKENS, length)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
    return Inputs([i.to(device) for i in images], masks, tokens.to(device), token_mask, noise.to(device))


def make_weights(config: Pi05Config, precision: str, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under our names, drawn in bfloat16: every precision gets the same numbers."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Pi05(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        std = 0.1 if len(shape) == 1 else shape[1:].numel() ** -0.5
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator)
        wide = precision == "float32" or any(part in name for part in _FLOAT32)
        weights[name] = drawn.float() if wide else drawn
    return weights


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside get parameters without memory; their buffers (tables of angles) are real."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    with mock.patch.object(nn.Module, "register_parameter", registered):
        yield


def make_reference(config: Pi05Config, weights: Mapping[str, Tensor], precision: str, device: torch.device) -> Any:
    """The network of lerobot on ``weights``, not copied."""
    from lerobot.policies.pi05 import modeling_pi05 as modeling
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    published = modeling.get_gemma_config

    def cut(variant: str) -> Any:
        sizes = published(variant)
        sizes.depth = config.depth
        return sizes

    settings = PI05Config(
        dtype=precision,
        chunk_size=config.horizon,
        n_action_steps=config.horizon,
        max_action_dim=config.action_dim,
        image_resolution=(config.image_size, config.image_size),
        device="cpu",
    )
    with parameters_on_meta(), mock.patch.object(modeling, "get_gemma_config", cut):
        reference = modeling.PI05Pytorch(settings)
    embedding = weights[EMBEDDING]
    unused = {
        TIED_EMBEDDING: embedding,
        UNUSED: torch.zeros(1, dtype=embedding.dtype, device=device).expand(len(embedding), config.expert_width),
    }
    reference.load_state_dict({**weights, **unused}, assign=True)
    return reference.to(device).eval()


def make_ours(config: Pi05Config, weights: Mapping[str, Tensor], precision: str) -> Pi05:
    """This repository's network on ``weights``, not copied."""
    with torch.device("meta"):
        network = Pi05(config, getattr(torch, precision))
    network.load_state_dict(dict(weights), assign=True)
    return network.eval()


@torch.no_grad()
def compare(config: Pi05Config, precision: str, device: torch.device) -> Found:
    """Velocities and the chunk of both networks on the same inputs."""
    weights, inputs = make_weights(config, precision, device), make_inputs(config, device)
    reference, seconds = make_reference(config, weights, precision, device), {}
    visited: list[tuple[Tensor, Tensor, Tensor]] = []
    step = reference.denoise_step

    def recorded(**arguments: Tensor) -> Tensor:
        velocity = step(**arguments)
        visited.append((arguments["x_t"].clone(), arguments["timestep"], velocity))
        return velocity

    reference.denoise_step = recorded
    start = time.perf_counter()
    masks = [mask.to(device) for mask in inputs.masks]
    theirs = reference.sample_actions(
        inputs.images, masks, inputs.tokens, inputs.token_mask.to(device), noise=inputs.noise, num_steps=STEPS
    ).cpu()
    seconds["lerobot"] = time.perf_counter() - start

    network = make_ours(config, weights, precision)
    start = time.perf_counter()
    prefix = network.embed_prefix(
        dict(zip(IMAGE_SLOTS, inputs.images, strict=True)), dict(zip(IMAGE_SLOTS, inputs.masks, strict=True)),
        inputs.tokens, inputs.token_mask,
    )  # fmt: skip
    ours = flow.sample_ode(partial(network.velocity, prefix), inputs.noise, STEPS).cpu()
    seconds["ours"] = time.perf_counter() - start
    errors = {}
    for index in SHOWN_STEPS:
        x_t, t, expected = visited[index]
        time_of_all = t.reshape(-1).expand(len(x_t)).float()
        velocity = network.velocity(prefix, x_t.float(), time_of_all)
        errors[f"velocity at t = {float(t.reshape(-1)[0]):.1f}"] = relative(velocity, expected)
    errors[f"chunk of {config.horizon} actions, {STEPS} steps"] = relative(ours, theirs)
    return Found(errors, ours, theirs, seconds)


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def table(found: Mapping[str, Found]) -> str:
    """Markdown: a row for each quantity, a column for each precision."""
    rows = [["relative error, ours against lerobot's", *found], ["---"] * (1 + len(found))]
    rows += [
        [name, *(f"{one.errors[name]:.1e}" for one in found.values())] for name in next(iter(found.values())).errors
    ]
    if {"bfloat16", "float32"} <= set(found):
        exact = found["float32"].theirs
        for name, chunk in (("lerobot's", found["bfloat16"].theirs), ("ours", found["bfloat16"].ours)):
            cells = {"bfloat16": f"{relative(chunk, exact):.1e}", "float32": ""}
            rows.append([f"the chunk in bfloat16 ({name}) against lerobot's in float32", *(cells[p] for p in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    parser.add_argument(
        "--depth", type=int, default=preset("pi05").depth, help="layers of the language model and expert"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = dataclasses.replace(preset("pi05"), depth=options.depth)
    found = {}
    for precision in options.precision:
        found[precision] = one = compare(config, precision, device)
        errors = ", ".join(f"{name} {error:.1e}" for name, error in one.errors.items())
        took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in one.seconds.items())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        # At once: the next precision may not fit.
        line = f"{precision} on {device}: {errors}; {took}; {peak:.1f} GiB of host memory at most so far"
        print(line, file=sys.stderr, flush=True)
        gc.collect()  # the networks hold themselves in cycles
    print(table(found))


if __name__ == "__main__":
    main()
