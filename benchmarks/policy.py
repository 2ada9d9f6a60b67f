"""Speed of the 3.6 B policy with random weights: inference, and PPO's update with kept and recomputed prefixes.

    PYTHONPATH=. python benchmarks/policy.py [--seconds 230] [--skip lerobot update profile] [--batches 64 256]

One 640 x 480 picture and the seed's instruction for each observation, 5 denoising steps, chunks of 5, bfloat16. Times
are medians of wall clock around a call and a synchronisation, from pictures on the device to actions on the device;
``explore`` includes the critic and what the learner keeps, ``ode`` is what a robot or an evaluation runs.
lerobot's PI05 has the same sizes, kinds of weights and number of steps, where it can be imported.

Every result is a line of JSON; a table of what was asked and measured comes last. Measurements that time does not allow
are left out and named. Without a GPU small models go through the same steps, which shows that the script works and
nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest import mock

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
from gsrl_core.policy.storage import GIB, update_bytes
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import FieldStats
from gsrl_core.policy.value import ValueHead
from gsrl_core.rl.ppo import _SUMS, Learner, PpoSettings, _Batch
from gsrl_core.rl.rollout import Rollout

TOKENIZER = Path(__file__).parents[1] / "gsrl_core" / "bundled" / "pi05_tiny" / "tokenizer.model"
INSTRUCTION = "pick up the cube and put it on the plate"
STEPS, CHUNK = 5, 5
CUDA = torch.cuda.is_available()
SAMPLES, EPOCHS, GLOBAL_BATCH, MICRO_BATCH = (10_240, 4, 2048, 512) if CUDA else (640, 4, 128, 64)
"""The recipe's iteration on a GPU."""
LEARNING_RATE, VALUE_LEARNING_RATE = 5e-6, 1e-4
UNIT = 320
"""Numbers of samples are multiples of this: of 64 observations at once, and of 20 chunks an episode."""
DEVICE = torch.device("cuda" if CUDA else "cpu")
START = time.perf_counter()


class Budget:
    """Runs measurements until the time is used up; one that fails is reported and the next one runs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, name: str, needed: float, measurement: Callable[[], object]) -> object:
        """``measurement()`` if ``needed`` seconds are left (on a GPU), else None."""
        left = self.seconds - (time.perf_counter() - START)
        if CUDA and needed > left:
            say(name, left_out=f"takes about {needed:.0f} s, {left:.0f} s are left")
            return None
        try:
            return measurement()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
            say(name, failed=f"{type(error).__name__}: {str(error)[:600]} | {where}")
            return None
        finally:
            gc.collect()  # models hold themselves in cycles
            if CUDA:
                torch.cuda.empty_cache()


class Table:
    """What was asked and what was measured, for the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, what: str, asked: str, measured: str) -> None:
        """One row."""
        self.rows.append((what, asked, measured))

    def show(self) -> None:
        """Print all rows."""
        rows = [("what", "asked", "measured"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), flush=True)


TABLE = Table()


def say(name: str, **found: object) -> None:
    """One line of JSON, at once."""
    record = {"at_s": round(time.perf_counter() - START, 1), "what": name} | found
    print(json.dumps(record, default=str), flush=True)


def digits(value: float) -> float:
    """Five significant ones."""
    return float(f"{value:.5g}")


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
    """Until the current stream has nothing left to do.

    (To wait for the whole device would break the capture of a graph in another thread.)
    """
    if CUDA:
        torch.cuda.current_stream().synchronize()


def peak_gib(reset: bool = False) -> float:
    """Largest device memory in use since the last reset."""
    if not CUDA:
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def random_policy(limits: Tensor | None = None, fast: bool = CUDA) -> Pi05Policy:
    """The seed's recipe at full size: horizon 5, no state in the prompt, frozen part bfloat16, masters float32.

    Args:
        limits: float32 [7], the actions that network outputs of 1 stand for; all 1 by default.
        fast: sample with compiled kernels and CUDA graphs.
    """
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
    spreads = torch.ones(9), torch.ones(7) if limits is None else limits
    stats = (FieldStats(torch.zeros_like(spread), spread, -spread, spread) for spread in spreads)
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
    say("device", card=name, torch=torch.__version__, bf16_matmul_tflops=digits(2 * size**3 / took / 1e12))


def throughput(policy: Pi05Policy, batch: int) -> dict[str, float]:
    """Chunks per second of both ways of sampling."""
    seen, rates = observation(batch), {}
    for name, explore in (("ode", False), ("explore", True)):
        peak_gib(reset=True)
        call = partial(policy.act, seen, explore=explore)
        took = seconds(lambda call=call: call(generator=generator()), 10 if batch < 128 else 4)
        rates[name] = batch / took
        rate, peak = digits(rates[name]), digits(peak_gib())
        say(f"batch {batch} {name}", ms=digits(1000 * took), chunks_per_s=rate, peak_gib=peak)
        asked = {64: "380 on an H200", 256: "420 on an H200"}.get(batch, "") if name == "ode" else ""
        TABLE.add(f"batch {batch} {name}, chunks/s", asked, f"{rate:.0f}")
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
    median, worst = digits(1000 * times[15]), digits(1000 * times[-1])
    say("batch 1 ode", median_ms=median, worst_of_30_ms=worst, where="actions on the host")
    TABLE.add("batch 1, median ms", "20", f"{median:.1f}")


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
        took = {name: digits(1000 * seconds(call, 5)) for name, call in split.items()}
    say(f"batch {batch} parts", ms=took, prefix_tokens=prompt.valid.shape[1])


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
        "fast against plain", chunk_relative=digits(relative), log_prob_off_mean=digits(off.mean()),
        log_prob_off_max=digits(off.max()), entries_of_log_prob=CHUNK * 7, plain_ms_at_16=digits(1000 * took),
    )  # fmt: skip
    TABLE.add("sampled and evaluated log-probability, mean / max off", "", f"{off.mean():.3f} / {off.max():.3f}")


def without_initialisers(*packages: str) -> None:
    """Let modules of these be imported without the packages' own imports, which ask for data set libraries."""
    root = importlib.util.find_spec(packages[0].partition(".")[0]).submodule_search_locations[0]
    for package in packages:
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(Path(root, *package.split(".")[1:]))]


def lerobot_model() -> torch.nn.Module:
    """Its PI05 with random weights; without a GPU narrower and of two layers."""
    without_initialisers("lerobot.policies", "lerobot.policies.pi05", "lerobot.policies.rtc")
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    dtype = "bfloat16" if CUDA else "float32"
    config = PI05Config(chunk_size=CHUNK, n_action_steps=CHUNK, dtype=dtype, num_inference_steps=STEPS)
    if CUDA:
        with DEVICE:
            return modeling_pi05.PI05Pytorch(config).eval().to(DEVICE)

    def sizes(variant: str) -> object:
        width, mlp = (2048, 256) if variant == "gemma_2b" else (128, 256)
        return modeling_pi05.GemmaConfig(width, 2, mlp, 8, 1, 32)

    with mock.patch.object(modeling_pi05, "get_gemma_config", sizes):
        return modeling_pi05.PI05Pytorch(config).eval()


def lerobot(batch: int, tokens: int) -> dict[str, float]:
    """Its PI05 as its processor feeds it (text padded to 200), and with the text cut as ours is."""
    model = lerobot_model()
    image = torch.rand(batch, 3, 224, 224, device=DEVICE) * 2 - 1
    rates = {}
    for name, length in (("padded to 200", 200), ("cut", tokens)):
        ids = torch.randint(1000, (batch, length), device=DEVICE)
        text = torch.arange(length, device=DEVICE).expand(batch, -1) < tokens
        masks = [torch.ones(batch, dtype=torch.bool, device=DEVICE)]

        @torch.no_grad()
        def sample(ids: Tensor = ids, text: Tensor = text, masks: list[Tensor] = masks) -> Tensor:
            return model.sample_actions([image], masks, ids, text, num_steps=STEPS)

        took = seconds(sample, 2, 1) if CUDA else seconds(sample, 1, 0)
        rates[name] = batch / took
        say(f"lerobot PI05 batch {batch}, text {name}", ms=digits(1000 * took), chunks_per_s=digits(rates[name]))
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


class WatchedLearner(Learner):
    """Keeps the approximate KL (k1) that each optimizer step starts from."""

    def __init__(self, policy: Pi05Policy, settings: PpoSettings) -> None:
        super().__init__(policy, settings, SingleProcess())
        self.kl: list[float] = []

    def _accumulate_gradients(
        self, rollout: Rollout, batch: _Batch, mine: Tensor, minibatch_size: int, warming_up: bool
    ) -> Tensor:
        sums = super()._accumulate_gradients(rollout, batch, mine, minibatch_size, warming_up)
        self.kl.append(float(f"{float(sums[_SUMS.index('approx_kl')]) / minibatch_size:.3g}"))
        return sums


@dataclasses.dataclass(frozen=True)
class Update:
    """One measurement of an update; the micro-batch is always the same, so that places can be compared."""

    place: str
    """Where prefixes are kept: ``device`` or ``recompute``."""
    samples: int
    epochs: int = EPOCHS
    global_batch: int = GLOBAL_BATCH
    learning_rate: float = LEARNING_RATE
    recompute_log_prob: str = "on"

    def settings(self) -> PpoSettings:
        """The seed's recipe with these sizes; a learning rate of 0 is the critic's as well."""
        return PpoSettings(
            iterations=10, warmup_steps=0, lr_schedule="constant",
            update_epochs=self.epochs, global_batch=min(self.global_batch, self.samples), micro_batch=MICRO_BATCH,
            learning_rate=self.learning_rate, value_learning_rate=VALUE_LEARNING_RATE if self.learning_rate else 0.0,
            weight_decay=0.01, max_grad_norm=1.0, gamma=0.99, gae_lambda=0.95, clip_low=0.2, clip_high=0.2,
            dual_clip=None, value_clip=0.2, huber_delta=10.0, value_coef=1.0, entropy_coef=0.0, kl_coef=0.0,
            target_kl=None, critic_warmup_iterations=0, normalize_advantages=True,
            recompute_log_prob=self.recompute_log_prob, seed=0,
        )  # fmt: skip


def update(policy: Pi05Policy, name: str, run: Update, start: Mapping[str, Tensor]) -> float:
    """Seconds of the update from the weights ``start`` (on the host), which are put back before it."""
    policy.load_state_dict_trainable(start)
    policy.keep_prefixes(run.place, run.samples, MICRO_BATCH)
    peak_gib(reset=True)
    held = torch.cuda.memory_allocated() / GIB if CUDA else 0.0
    rollout = rollout_of(policy, run.samples)
    learner = WatchedLearner(policy, run.settings())
    row = sum(tensor[:1].nbytes for key, tensor in rollout.chain[0].items() if key in ("prefix_keys", "prefix_values"))
    trained = sum(parameter.numel() for group in learner.groups.values() for parameter in group)
    estimate = held + (row * run.samples + update_bytes(trained, MICRO_BATCH, row)) / GIB
    wait()
    begin = time.perf_counter()
    metrics = learner.update(rollout)
    wait()
    took = time.perf_counter() - begin
    peak = peak_gib()
    say(
        f"update, {name}", prefixes=run.place, samples=run.samples, epochs=run.epochs, micro_batch=MICRO_BATCH,
        recompute_log_prob=run.recompute_log_prob, optimizer_steps=int(metrics["actor/optimizer_steps"]),
        seconds=digits(took), peak_gib=digits(peak), estimated_gib=digits(estimate), kl_by_step=learner.kl,
        mismatch_mean=digits(metrics["rollout/log_prob_mismatch_mean"]),
        mismatch_max=digits(metrics["rollout/log_prob_mismatch_max"]),
    )  # fmt: skip
    if run.place == "device" and run.learning_rate and run.epochs == EPOCHS:
        TABLE.add(f"update, {name}, peak GiB / estimated", "within", f"{peak:.1f} / {estimate:.1f}")
    return took


def profile(policy: Pi05Policy, batch: int) -> None:
    """The kernels that an inference spends its time in."""
    seen = observation(batch)
    policy.act(seen, generator(), explore=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        policy.act(seen, generator(), explore=True)
        wait()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_device_time_total)[:14]
    for row in rows:
        say("kernel", ms=digits(row.self_device_time_total / 1000), count=row.count, name=row.key[:100])


def fitting(policy: Pi05Policy) -> int:
    """Samples whose prefixes, with the update, fit on the device: the recipe's, or a part of them."""
    if not CUDA:
        return SAMPLES
    config = policy.network.config
    row = 4 * config.depth * config.head_dim * (config.image_tokens + 16)
    free = torch.cuda.mem_get_info()[0] - 14 * GIB
    return min(SAMPLES, max(1, int(free / row) // UNIT) * UNIT)


def updates(budget: Budget, policy: Pi05Policy) -> None:
    """Kept against recomputed prefixes at the same micro-batch, after a first update of each that is not counted."""
    start = {name: tensor.cpu().clone() for name, tensor in policy.state_dict_trainable().items()}
    samples, few = fitting(policy), UNIT * (6 if CUDA else 1)
    still = {"epochs": 1, "global_batch": MICRO_BATCH, "learning_rate": 0.0, "recompute_log_prob": "off"}
    plan = (
        ("kept, first", 20, Update("device", few, 1)),
        ("recomputed, first", 14, Update("recompute", UNIT * 2, 1)),
        ("kept, weights held", 4, Update("device", few, **still)),
        ("recomputed, weights held", 12, Update("recompute", few, **still)),
        ("kept", 16, Update("device", samples)),
        ("recomputed", 40, Update("recompute", few)),
        ("kept, old log-probabilities of the rollout", 14, Update("device", samples, recompute_log_prob="off")),
    )
    took = {}
    for name, needed, run in plan:
        found = budget.run(f"update, {name}", needed, lambda name=name, run=run: update(policy, name, run, start))
        if isinstance(found, float):
            took[name] = found
    policy.load_state_dict_trainable(start)
    if "kept" in took:
        asked = "12 s on an H200" if samples == SAMPLES and CUDA else ""
        TABLE.add(f"update, {samples} samples x {EPOCHS} epochs, kept, s", asked, f"{took['kept']:.2f}")
    if "kept" in took and "recomputed" in took:
        ratio = took["recomputed"] / few / (took["kept"] / samples)
        say("update, recomputed / kept, per sample", ratio=digits(ratio))
        TABLE.add("update, recomputed / kept, per sample", "8", f"{ratio:.1f}")
    if (plain := took.get("kept, old log-probabilities of the rollout")) and "kept" in took:
        TABLE.add("update, kept, without recompute_log_prob, s", "", f"{plain:.2f}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=230.0)
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
    compiled = CUDA and fast.has_compiler()
    say("weights", billions=digits(size), text_tokens=tokens, compiled=compiled, peak_gib=digits(peak_gib()))
    first = arguments.batches[0]
    budget.run("compilation", 30, lambda: policy.act(observation(first), generator(), explore=True))
    say("compilation", done=True)
    rates = [
        budget.run(f"batch {batch}", 5, lambda batch=batch: throughput(policy, batch)) for batch in arguments.batches
    ]
    budget.run("batch 1", 5, lambda: latency(policy))
    budget.run("agreement", 4, lambda: agreement(policy))
    budget.run("parts", 3, lambda: parts(policy, first))
    if "lerobot" not in arguments.skip:
        theirs = budget.run("lerobot", 20, lambda: lerobot(first, tokens))
        for name, rate in (theirs if isinstance(theirs, dict) and isinstance(rates[0], dict) else {}).items():
            TABLE.add(f"batch {first} ode / lerobot's, text {name}", "3", f"{rates[0]['ode'] / rate:.2f}")
    if "profile" not in arguments.skip and CUDA:
        budget.run("profile", 5, lambda: profile(policy, first))
    if "update" not in arguments.skip:
        updates(budget, policy)
    TABLE.show()


if __name__ == "__main__":
    main()
