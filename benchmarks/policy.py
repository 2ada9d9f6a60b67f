"""Speed of the 3.6 B policy with random weights: inference, and PPO's update with kept and recomputed prefixes.

    PYTHONPATH=. python benchmarks/policy.py [--seconds 110] [--skip lerobot update profile] [--batches 64 256]

One 640 x 480 picture and the seed's instruction for each observation, 5 denoising steps, chunks of 5, bfloat16. Times
are medians of wall clock around a call and a synchronisation, from pictures on the device to actions on the device;
``explore`` includes the critic and what the learner keeps, ``ode`` is what a robot or an evaluation runs.
lerobot's PI05 has the same sizes, kinds of weights and number of steps, where it can be imported. Measurements that
time does not allow are left out and named. Without a GPU the tiny model goes through the same steps, which shows that
the script works and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.dist.collective import SingleProcess
from gsrl_core.interfaces import Observation
from gsrl_core.policy import fast
from gsrl_core.policy.agent import Pi05Policy
from gsrl_core.policy.checkpoint import _stored_dtype
from gsrl_core.policy.config import Pi05Config, preset
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.sampler import Sampling
from gsrl_core.policy.storage import GIB
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import FieldStats
from gsrl_core.policy.value import ValueHead
from gsrl_core.rl.ppo import Learner, PpoSettings
from gsrl_core.rl.rollout import Rollout

TOKENIZER = Path(__file__).parents[1] / "gsrl_core" / "bundled" / "pi05_tiny" / "tokenizer.model"
INSTRUCTION = "pick up the cube and put it on the plate"
STEPS, CHUNK = 5, 5
SAMPLES, GLOBAL_BATCH = 10_240, 2048
UNIT = 320
"""Numbers of samples are multiples of this: of 64 observations at once, and of 20 chunks an episode."""
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
START = time.perf_counter()


class Budget:
    """Runs measurements until the time is used up; one that fails is reported and the next one runs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, name: str, needed: float, measurement: Callable[[], object]) -> object:
        """``measurement()`` if ``needed`` seconds are left, else None."""
        spent = time.perf_counter() - START
        if spent + needed > self.seconds:
            say(name, f"left out: takes about {needed:.0f} s, {self.seconds - spent:.0f} s are left")
            return None
        try:
            return measurement()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
            say(name, f"FAILED {type(error).__name__}: {str(error)[:600]} | {where}")
            return None
        finally:
            if CUDA:
                torch.cuda.empty_cache()


def say(name: str, text: str) -> None:
    """One line, at once."""
    print(f"[{time.perf_counter() - START:5.1f} s] {name}: {text}", flush=True)


def seconds(call: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median time of a call."""
    times = []
    for _ in range(warm_up + repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def wait() -> None:
    """Until the device has nothing left to do."""
    if CUDA:
        torch.cuda.synchronize()


def peak_gib(reset: bool = False) -> float:
    """Largest device memory in use since the last reset."""
    if not CUDA:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def random_policy(fast: bool = CUDA) -> Pi05Policy:
    """The seed's recipe at full size: horizon 5, no state in the prompt, frozen part bfloat16, masters float32."""
    sizes = preset("pi05" if CUDA else "pi05_tiny")
    config: Pi05Config = dataclasses.replace(sizes, horizon=CHUNK, discrete_state=False, max_token_len=200)
    dtype = torch.bfloat16 if CUDA else torch.float32
    with DEVICE:
        network = Pi05(config, dtype)
        value_head = ValueHead(config.width, config.value_hidden)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(0.0, fan_in**-0.5)
            parameter.data = parameter.data.to(_stored_dtype(name, dtype))
    stats = (FieldStats(torch.zeros(n), torch.ones(n), -torch.ones(n), torch.ones(n)) for n in (9, 7))
    tokenizer = PromptTokenizer(TOKENIZER, config.max_token_len, config.discrete_state)
    return Pi05Policy(network.eval(), value_head, None, tokenizer, *stats, Sampling(STEPS, CHUNK), fast=fast)


def observation(batch: int) -> Observation:
    """Noise pictures on the device."""
    rgb = torch.randint(256, (batch, 480, 640, 3), dtype=torch.uint8, device=DEVICE)
    return Observation({"camera": rgb}, torch.zeros(batch, 9), (INSTRUCTION,) * batch)


def generator() -> torch.Generator:
    """The noise's."""
    return torch.Generator(DEVICE).manual_seed(0)


def ceilings() -> None:
    """What the device can do."""
    size = 8192 if CUDA else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    took = seconds(lambda: a @ b, 10, 3)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    say("device", f"{name}, torch {torch.__version__}, bf16 matmul {2 * size**3 / took / 1e12:.0f} TFLOP/s")


def throughput(policy: Pi05Policy, batch: int) -> dict[str, float]:
    """Chunks per second of both ways of sampling."""
    seen, rates = observation(batch), {}
    for name, explore in (("ode", False), ("explore", True)):
        peak_gib(reset=True)
        call = partial(policy.act, seen, explore=explore)
        took = seconds(lambda call=call: call(generator=generator()), 10 if batch < 128 else 4)
        rates[name] = batch / took
        say(f"batch {batch} {name}", f"{1000 * took:.1f} ms, {rates[name]:.0f} chunks/s, peak {peak_gib():.1f} GiB")
    return rates


def latency(policy: Pi05Policy) -> None:
    """Of one observation, as a robot asks."""
    seen = observation(1)
    times = []
    policy.act(seen, generator(), explore=False)
    for _ in range(30):
        wait()
        start = time.perf_counter()
        policy.act(seen, generator(), explore=False).actions.cpu()
        times.append(time.perf_counter() - start)
    times.sort()
    say("batch 1 ode", f"median {1000 * times[15]:.2f} ms, worst of 30 {1000 * times[-1]:.2f} ms, actions on the host")


def parts(policy: Pi05Policy, batch: int) -> None:
    """Where inference spends its time."""
    prompt, sampler = policy.prompt(observation(batch)), policy._sampler
    network = sampler.fast or sampler.network
    x = torch.randn(batch, CHUNK, policy.network.config.action_dim, device=DEVICE)
    with torch.no_grad():
        prefix = network.run_prefix(prompt, features=False)

        def denoise() -> None:
            step = network.denoiser(prefix)
            for i in range(STEPS):
                step(x, torch.full((batch,), 1 - i / STEPS, device=DEVICE))

        split = {
            "prompt": lambda: policy.prompt(observation(batch)),
            "vision": lambda: network._embed_image(prompt.images[0]),
            "vision and prefix": lambda: network.run_prefix(prompt, features=False),
            "denoising": denoise,
        }
        took = {name: f"{1000 * seconds(call, 5):.1f}" for name, call in split.items()}
    say(f"batch {batch} parts", f"ms: {took}; {prompt.valid.shape[1]} prefix tokens")


def agreement(policy: Pi05Policy) -> None:
    """Of the fast twin with the network as it is written, in bfloat16."""
    seen, sampler = observation(16), policy._sampler
    twin = sampler.fast
    quick = policy.act(seen, generator(), explore=True)
    with torch.no_grad():
        again = policy.evaluate(quick.chain).log_prob
    sampler.fast, graphs, sampler._graphs = None, sampler._graphs, None
    plain = policy.act(seen, generator(), explore=True)
    took = seconds(lambda: policy.act(seen, generator(), explore=False), 2, 0)
    sampler.fast, sampler._graphs = twin, graphs
    relative = (quick.actions - plain.actions).norm() / plain.actions.norm()
    off = (again - quick.log_prob).abs()
    say(
        "fast against plain",
        f"chunk {relative:.2e} relative; log-probability (a sum over {CHUNK * 7} entries) when evaluated again off by "
        f"mean {off.mean():.3f}, max {off.max():.3f}; plain takes {1000 * took:.0f} ms at 16",
    )


def without_initialisers(*packages: str) -> None:
    """Let modules of these be imported without the packages' own imports, which ask for data set libraries."""
    root = importlib.util.find_spec(packages[0].partition(".")[0]).submodule_search_locations[0]
    for package in packages:
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(Path(root, *package.split(".")[1:]))]


def lerobot(batch: int, tokens: int) -> dict[str, float]:
    """Its PI05 as its processor feeds it (text padded to 200), and with the text cut as ours is."""
    without_initialisers("lerobot.policies", "lerobot.policies.pi05", "lerobot.policies.rtc")
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    config = PI05Config(chunk_size=CHUNK, n_action_steps=CHUNK, dtype="bfloat16", num_inference_steps=STEPS)
    with DEVICE:
        model = PI05Pytorch(config).eval()
    model.to(DEVICE)
    image = torch.rand(batch, 3, 224, 224, device=DEVICE) * 2 - 1
    rates = {}
    for name, length in (("padded to 200", 200), ("cut", tokens)):
        ids = torch.randint(1000, (batch, length), device=DEVICE)
        text = torch.arange(length, device=DEVICE).expand(batch, -1) < tokens
        masks = [torch.ones(batch, dtype=torch.bool, device=DEVICE)]

        @torch.no_grad()
        def sample(ids: Tensor = ids, text: Tensor = text, masks: list[Tensor] = masks) -> Tensor:
            return model.sample_actions([image], masks, ids, text, num_steps=STEPS)

        took = seconds(sample, 2)
        rates[name] = batch / took
        say(f"lerobot PI05 batch {batch}, text {name}", f"{1000 * took:.1f} ms, {rates[name]:.0f} chunks/s")
    return rates


def rollout_of(policy: Pi05Policy, samples: int) -> Rollout:
    """One batch's chain over and over, each time in memory of its own."""
    batch = 64
    sample = policy.act(observation(batch), generator(), explore=True)
    copies = samples // batch
    chain = tuple({name: t.clone() for name, t in sample.chain.items()} for _ in range(copies))
    length, width = 20, samples // 20
    flags = torch.zeros(length, width, dtype=torch.bool)
    old = sample.log_prob.cpu().repeat(copies).view(length, width)
    reward = torch.rand(length, width, generator=torch.Generator().manual_seed(0))
    value = sample.value.cpu().repeat(copies).view(length, width)
    return Rollout(old, value, value, reward, flags, flags, ~flags, chain, torch.arange(samples))


def update(policy: Pi05Policy, where: str, samples: int, micro_batch: int) -> float:
    """Seconds of one epoch over ``samples``."""
    policy.keep_prefixes(where, samples, micro_batch)
    rollout = rollout_of(policy, samples)
    settings = PpoSettings(
        update_epochs=1, global_batch=min(GLOBAL_BATCH, samples), micro_batch=micro_batch, learning_rate=5e-6,
        value_learning_rate=1e-4, weight_decay=0.01, max_grad_norm=1.0, gamma=0.99, gae_lambda=0.95, clip_low=0.2,
        clip_high=0.2, dual_clip=None, value_clip=0.2, huber_delta=10.0, value_coef=1.0, entropy_coef=0.0, kl_coef=0.0,
        target_kl=None, critic_warmup_iterations=0, normalize_advantages=True, seed=0,
    )  # fmt: skip
    learner = Learner(policy, settings, SingleProcess())
    peak_gib(reset=True)
    wait()
    start = time.perf_counter()
    metrics = learner.update(rollout)
    wait()
    took = time.perf_counter() - start
    steps = metrics["actor/optimizer_steps"]
    say(
        f"update, prefixes {where}, micro-batch {micro_batch}",
        f"{samples} samples, {steps:.0f} optimizer steps: {took:.2f} s; {SAMPLES} x 4 epochs take "
        f"{took * 4 * SAMPLES / samples:.1f} s at that rate; peak {peak_gib():.1f} GiB, "
        f"approximate KL {metrics['actor/approx_kl']:.4f}",
    )
    return took / samples


def profile(policy: Pi05Policy, batch: int) -> None:
    """The kernels that an inference spends its time in."""
    seen = observation(batch)
    policy.act(seen, generator(), explore=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        policy.act(seen, generator(), explore=True)
        wait()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
    for row in rows:
        say("kernel", f"{row.self_device_time_total / 1000:7.2f} ms {row.count:5d} x {row.key[:100]}")


def fitting(policy: Pi05Policy) -> int:
    """Samples whose prefixes, with the update, fit on the device: the recipe's, or a part of them."""
    if not CUDA:
        return UNIT
    config = policy.network.config
    row = 4 * config.depth * config.head_dim * (config.image_tokens + 16)
    free = torch.cuda.mem_get_info()[0] - 14 * GIB
    return min(SAMPLES, max(1, int(free / row) // UNIT) * UNIT)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=110.0)
    parser.add_argument("--skip", nargs="*", default=[], choices=["lerobot", "update", "profile"])
    parser.add_argument("--batches", nargs="*", type=int, default=[64, 256] if CUDA else [4])
    arguments = parser.parse_args()
    budget = Budget(arguments.seconds)
    budget.run("device", 1, ceilings)
    policy = budget.run("weights", 10, random_policy)
    if not isinstance(policy, Pi05Policy):
        return
    tokens = policy.prompt(observation(1)).tokens.shape[1]
    size = sum(parameter.numel() for parameter in policy.network.parameters()) / 1e9
    say(
        "weights",
        f"{size:.2f} B, {tokens} text tokens, compiled: {CUDA and fast.has_compiler()}, {peak_gib():.1f} GiB",
    )
    first = arguments.batches[0]
    budget.run("compilation", 30, lambda: policy.act(observation(first), generator(), explore=True))
    say("compilation", "first inference done")
    rates = [
        budget.run(f"batch {batch}", 5, lambda batch=batch: throughput(policy, batch)) for batch in arguments.batches
    ]
    budget.run("batch 1", 5, lambda: latency(policy))
    budget.run("agreement", 4, lambda: agreement(policy))
    if "update" not in arguments.skip:
        updates(budget, policy)
    if "lerobot" not in arguments.skip:
        theirs = budget.run("lerobot", 15, lambda: lerobot(first, tokens))
        if isinstance(theirs, dict) and isinstance(rates[0], dict):
            say(
                "against lerobot", ", ".join(f"{rates[0]['ode'] / rate:.2f}x ({name})" for name, rate in theirs.items())
            )
    budget.run("parts", 3, lambda: parts(policy, first))
    if "profile" not in arguments.skip and CUDA:
        budget.run("profile", 5, lambda: profile(policy, first))


def updates(budget: Budget, policy: Pi05Policy) -> None:
    """Kept against recomputed prefixes."""
    samples = fitting(policy)
    kept = [
        budget.run("update", 8, lambda micro=micro: update(policy, "device", samples, micro)) for micro in (128, 512)
    ]
    again = budget.run("update", 9, lambda: update(policy, "recompute", min(samples, 6 * UNIT), 128))
    kept = [rate for rate in kept if isinstance(rate, float)]
    if kept and isinstance(again, float):
        say("update", f"recomputing takes {again / min(kept):.1f} times as long as keeping")


if __name__ == "__main__":
    main()
