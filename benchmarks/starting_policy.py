"""A policy that is good enough for PPO and not better: demonstrations, SFT, and SFT again until success is in a range.

    PYTHONPATH=. python benchmarks/starting_policy.py --scene SCENE --work WORK --out OUT --model pi05_small

Rounds of ``sft`` go on from each other until strict success of ``evaluation.episodes`` seeds reaches --low; one that
ends above --high is an error (make rounds shorter). The policy is OUT/policy; what was measured on the way is
OUT/starting_policy.json. The seeds are not those that ``learning.py`` judges by.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsrl_core.artifacts import write_json
from gsrl_core.config import apply_overrides, load, parse_assignments
from gsrl_core.demos import collect_demos
from gsrl_core.embodiment import default_device
from gsrl_core.errors import TrainingError
from gsrl_core.evaluate import evaluate
from gsrl_core.interfaces import NullReporter
from gsrl_core.sections import PipelineConfig
from gsrl_core.sft import train_sft

SEEDS_APART = 100_000
"""The seeds of the search begin this far behind those of the sweep."""
WITHOUT_EXTRAS = {"evaluation.episodes_per_perturbation": 0, "evaluation.videos": 0}


@dataclass(frozen=True)
class Search:
    """What is looked for."""

    low: float
    high: float
    """Strict success, 0 to 1."""
    rounds: int
    """At most so many."""


def search(
    train: Callable[[Path | None, Path, int], Any],
    success: Callable[[Path], float],
    out: Path,
    wanted: Search,
) -> list[dict[str, Any]]:
    """Train in rounds until a checkpoint's success is in the range; it is copied to ``out / "policy"``.

    Args:
        train: ``(init, folder, round)`` makes a checkpoint.
        success: strict success of a checkpoint.
        out: folder of all checkpoints.
        wanted: the range.

    Returns:
        One record for each checkpoint that was measured.

    Raises:
        TrainingError: the range was not met.
    """
    tried: list[dict[str, Any]] = []
    before: Path | None = None
    for number in range(wanted.rounds):
        folder = out / f"round-{number}"
        train(before, folder, number)
        rate = success(folder)
        tried.append({"checkpoint": folder.name, "success": rate})
        print(tried[-1], flush=True)
        if wanted.low <= rate <= wanted.high:
            shutil.copytree(folder, out / "policy")
            return tried
        if rate > wanted.high:
            break
        before = folder
    raise TrainingError(f"no checkpoint between {wanted.low:.0%} and {wanted.high:.0%}: {tried}")


def main(arguments: list[str] | None = None) -> None:
    """Parse, collect, search, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", type=Path, required=True, help="assembled scene folder")
    parser.add_argument("--work", type=Path, required=True, help="demonstrations, reused by a later call")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and records; empty")
    parser.add_argument("--model", default="pi05_small")
    parser.add_argument("--low", type=float, default=0.35, help="least strict success")
    parser.add_argument("--high", type=float, default=0.50, help="most strict success")
    parser.add_argument("--round-steps", type=int, default=500, help="SFT steps of the rounds after the first")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--preset", default="one-gpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")  # rounds of other settings must not be taken for these
    config = apply_overrides(load(options.preset, parse_assignments(options.set)), WITHOUT_EXTRAS)
    start, demos = time.monotonic(), options.work / "demos"
    collected = collect_demos(options.scene, demos, config, NullReporter())
    print(f"{time.monotonic() - start:.0f} s: {collected}", flush=True)

    def train(init: Path | None, folder: Path, number: int) -> None:
        facts = train_sft(
            demos, folder, init, options.model, round_settings(config, number, options.round_steps).sft,
            device=default_device(), reporter=NullReporter(),
            discrete_state=config.policy.discrete_state, asset_id=config.policy.asset_id,
        )  # fmt: skip
        print(f"{time.monotonic() - start:.0f} s: round {number}: {facts}", flush=True)

    settings = apply_overrides(config, {"evaluation.seed": config.evaluation.seed + SEEDS_APART})

    def success(folder: Path) -> float:
        report = evaluate(folder, options.scene, options.work / "evaluation", settings, NullReporter())
        print(f"{time.monotonic() - start:.0f} s: evaluated", flush=True)
        return report.nominal.success_rate

    tried = search(train, success, options.out, Search(options.low, options.high, options.rounds))
    seconds = round(time.monotonic() - start, 1)
    record = {"demos": collected, "tried": tried, "seconds": seconds, "config": config.model_dump(mode="json")}
    write_json(options.out / "starting_policy.json", record)
    print(table(tried))


def round_settings(config: PipelineConfig, number: int, steps: int) -> PipelineConfig:
    """The first round is the configured one; later ones are ``steps`` long, with random numbers of their own."""
    if number == 0:
        return config
    seed = config.sft.seed + number
    return apply_overrides(config, {"sft.steps": steps, "sft.warmup_steps": min(20, steps), "sft.seed": seed})


def table(tried: list[dict[str, Any]]) -> str:
    """What was measured as a Markdown table."""
    rows = [f"| {entry['checkpoint']} | {entry['success']:.1%} |" for entry in tried]
    return "\n".join(["| checkpoint | strict success |", "|---|---:|", *rows])


if __name__ == "__main__":
    main()
