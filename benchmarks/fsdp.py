"""Memory and time of the learner's update with whole (ddp) and with sharded (fsdp2) weights, one process on each GPU.

    PYTHONPATH=. python benchmarks/fsdp.py [--processes 2] [--samples 512] [--micro-batch 64]

The 3.6 B policy with random weights on made-up chains, bfloat16; lines are JSON, from the first process. Memory is what
torch has allocated, without the chains. The gradients' norm must be the same for both. Without a GPU the tiny model
goes through the same steps over Gloo, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
from policy import CUDA, DEVICE, peak_gib, random_policy, wait
from torch import multiprocessing

from gsrl_core.dist.collective import ProcessGroup, free_address
from gsrl_core.dist.weights import WeightPublisher
from gsrl_core.policy.agent import Pi05Policy
from gsrl_core.policy.storage import GIB
from gsrl_core.rl.ppo import Learner, PpoSettings
from gsrl_core.rl.rollout import Rollout
from gsrl_core.sharding import whole

STEPS_AN_UPDATE = 2
TOKENS = 272
"""Of a prefix: one picture and a short prompt."""


def rollout_of(policy: Pi05Policy, samples: int, micro_batch: int) -> Rollout:
    """Random transitions; their log-probabilities and values are the policy's own."""
    config = policy.network.config
    keys = (samples, config.depth, config.kv_heads, TOKENS, config.head_dim)
    x = torch.randn(samples, config.horizon, config.action_dim, device=DEVICE)
    chain = {
        "prefix_keys": torch.randn(keys, device=DEVICE, dtype=policy.network.compute_dtype),
        "prefix_values": torch.randn(keys, device=DEVICE, dtype=policy.network.compute_dtype),
        "prefix_valid": torch.ones(samples, TOKENS, dtype=torch.bool),
        "pooled": torch.randn(samples, config.width, device=DEVICE),
        "x_k": x,
        "x_next": x + 0.1 * torch.randn_like(x),
        "step": torch.randint(policy.sampling.denoise_steps, (samples,), device=DEVICE),
    }
    with torch.no_grad():
        passes = [
            policy.evaluate({name: tensor[first : first + micro_batch] for name, tensor in chain.items()})
            for first in range(0, samples, micro_batch)
        ]
    old, value = (torch.cat([getattr(p, name) for p in passes]).cpu()[None] for name in ("log_prob", "value"))
    flags = torch.zeros(1, samples, dtype=torch.bool)
    return Rollout(old, value, value, torch.rand(1, samples), flags, flags, ~flags, (chain,), torch.arange(samples))


def measure(kind: str, group: ProcessGroup, samples: int, micro_batch: int) -> None:
    """One update to warm up, and one that is timed."""
    torch.manual_seed(0)
    policy = random_policy(fast=False)
    torch.manual_seed(1 + group.rank)
    rollout = rollout_of(policy, samples, micro_batch)
    chains = sum(tensor.nbytes for tensor in rollout.chain[0].values()) / GIB if CUDA else 0.0
    if kind == "fsdp2":
        policy.shard(group.mesh(DEVICE.type))
    held = allocated_gib() - chains
    settings = PpoSettings(
        iterations=10, warmup_steps=0, lr_schedule="constant",
        update_epochs=1, global_batch=samples * group.world_size // STEPS_AN_UPDATE, micro_batch=micro_batch,
        learning_rate=1e-9, value_learning_rate=1e-9, weight_decay=0.0, max_grad_norm=1.0, gamma=0.99, gae_lambda=0.95,
        clip_low=0.2, clip_high=0.2, dual_clip=None, value_clip=0.2, huber_delta=10.0, value_coef=1.0, entropy_coef=0.0,
        kl_coef=0.0, target_kl=None, critic_warmup_iterations=0, normalize_advantages=True, recompute_log_prob="off",
        seed=0,
    )  # fmt: skip
    learner = Learner(policy, settings, group)
    learner.update(rollout)
    wait()
    peak_gib(reset=True)
    start = time.perf_counter()
    metrics = learner.update(rollout)
    wait()
    seconds = time.perf_counter() - start
    peak, between = peak_gib() - chains, allocated_gib() - chains
    start = time.perf_counter()
    weights = policy.state_dict_trainable()
    if group.rank == 0:
        WeightPublisher().changes(weights)
    else:
        for tensor in weights.values():
            whole(tensor)
    result = {
        "kind": kind, "processes": group.world_size, "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "trained": sum(tensor.numel() for tensor in weights.values()), "samples_a_process": samples,
        "micro_batch": micro_batch, "weights_gib": held, "with_optimizer_gib": between, "peak_gib": peak,
        "seconds_an_optimizer_step": seconds / metrics["actor/optimizer_steps"],
        "seconds_to_publish_weights": time.perf_counter() - start, "grad_norm": metrics["actor/grad_norm"],
    }  # fmt: skip
    if group.rank == 0:
        print(json.dumps(result), flush=True)


def allocated_gib() -> float:
    """Device memory in use."""
    return torch.cuda.memory_allocated() / GIB if CUDA else 0.0


def process(rank: int, world_size: int, address: str, samples: int, micro_batch: int) -> None:
    """One of the learners."""
    if CUDA:
        torch.cuda.set_device(rank)
    group = ProcessGroup(rank, world_size, address, nccl=CUDA)
    for kind in ("ddp", "fsdp2"):
        measure(kind, group, samples, micro_batch)
        if CUDA:
            torch.cuda.empty_cache()
    group.close()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=512 if CUDA else 8, help="of each process")
    parser.add_argument("--micro-batch", type=int, default=64 if CUDA else 4)
    arguments = parser.parse_args()
    # NVLink's multicast is not available in every container.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    options = (arguments.processes, free_address(), arguments.samples, arguments.micro_batch)
    multiprocessing.spawn(process, options, nprocs=arguments.processes)


if __name__ == "__main__":
    main()
