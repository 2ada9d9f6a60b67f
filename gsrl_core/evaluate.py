"""Evaluation driver: a sweep of fixed-seed episodes, nominal and perturbed, with intervals, videos and tables."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsrl_core.artifacts import write_bytes, write_json
from gsrl_core.embodiment import Embodiment, SplatEmbodiment, default_device
from gsrl_core.errors import ConfigError, SimulationError
from gsrl_core.interfaces import Policy, Reporter, VecEnv
from gsrl_core.rl.playback import film, play
from gsrl_core.rl.rollout import EpisodeStats, join_stats
from gsrl_core.rl.statistics import (
    bootstrap_over_trials,
    mean_maximum_rank_violation,
    pearson,
    spearman,
    wilson_interval,
)
from gsrl_core.sections import PipelineConfig
from gsrl_core.video import write_video

logger = logging.getLogger(__name__)

NOMINAL = "nominal"


@dataclass(frozen=True)
class Cell:
    """The episodes of one condition, in the order of their seeds."""

    name: str
    """``nominal`` or the perturbation."""
    seeds: tuple[int, ...]
    success: tuple[bool, ...]
    """Strict: on the plate, released, at rest."""
    success_seed: tuple[bool, ...]
    """The seed's looser test."""
    length: tuple[int, ...]
    """Control steps."""
    confidence: float

    @property
    def success_rate(self) -> float:
        """Of strict successes."""
        return sum(self.success) / len(self.success)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval of strict success."""
        return wilson_interval(sum(self.success), len(self.success), self.confidence)

    @property
    def success_seed_interval(self) -> tuple[float, float]:
        """Wilson interval of the looser test."""
        return wilson_interval(sum(self.success_seed), len(self.success_seed), self.confidence)

    @property
    def mean_length(self) -> float:
        """Control steps, all episodes."""
        return sum(self.length) / len(self.length)


@dataclass(frozen=True)
class Agreement:
    """How the simulated rates of several conditions or policies go with real ones."""

    names: tuple[str, ...]
    real: tuple[float, ...]
    sim: tuple[float, ...]
    statistics: dict[str, tuple[float, float, float]]
    """``pearson``, ``spearman``, ``mmrv``: estimate, low, high."""


@dataclass(frozen=True)
class EvalReport:
    """The outcome of a sweep."""

    cells: tuple[Cell, ...]
    """The nominal cell first."""
    agreement: Agreement | None

    @property
    def nominal(self) -> Cell:
        """The undisturbed cell."""
        return self.cells[0]

    def as_json(self) -> dict[str, Any]:
        """Everything, with derived numbers."""
        cells = [
            asdict(cell)
            | {
                "episodes": len(cell.seeds),
                "successes": sum(cell.success),
                "success_rate": cell.success_rate,
                "interval": cell.interval,
                "success_seed_rate": sum(cell.success_seed) / len(cell.seeds),
                "success_seed_interval": cell.success_seed_interval,
                "mean_length": cell.mean_length,
            }
            for cell in self.cells
        ]
        return {"cells": cells, "agreement": asdict(self.agreement) if self.agreement else None}


def evaluate(
    checkpoint: Path,
    scene: Path,
    out: Path,
    config: PipelineConfig,
    reporter: Reporter,
    *,
    real_results: Path | None = None,
    embodiment: Embodiment | None = None,
) -> EvalReport:
    """Measure a policy: the nominal task, then each perturbation, on seeds that are the same for every checkpoint.

    Perturbed cells use the first of the nominal seeds: the same starts. The policy's noise (see
    :func:`gsrl_core.rl.playback.play`) is the same for every checkpoint in the same cell; between cells it differs
    where their batches do. So checkpoints can be compared episode by episode, cells by their rates.

    Args:
        checkpoint: folder of the policy.
        scene: folder of the assembled scene.
        out: gets report.json, table.md and videos/.
        config: sections sim, policy and evaluation.
        reporter: hears the rates of every cell.
        real_results: JSON with real outcomes, see :func:`agreement_with_reality`.
        embodiment: something else than pi0.5 in the splat environment.

    Raises:
        ConfigError: ``real_results`` cannot be used.
        CheckpointError, SceneError.
        SimulationError: the physics crashed in an episode and again in its second attempt.
    """
    real = read_real_results(real_results) if real_results else None
    body = embodiment or SplatEmbodiment(checkpoint, scene, config)
    settings, device = config.evaluation, default_device()
    policy = body.make_policy(device)
    names = (NOMINAL, *settings.perturbations) if settings.episodes_per_perturbation else (NOMINAL,)
    shutil.rmtree(out / "videos", ignore_errors=True)
    (out / "videos").mkdir(parents=True)
    cells = []
    for number, name in enumerate(names):
        episodes = settings.episodes if name == NOMINAL else settings.episodes_per_perturbation
        reporter.progress(number / len(names), f"{name}: {episodes} episodes")
        make_env = partial(body.make_env, device=device, perturbation=None if name == NOMINAL else name)
        cell = _run_cell(name, make_env, policy, episodes, out / "videos", config)
        cells.append(cell)
        reporter.metrics(
            {f"eval/{name}/success": cell.success_rate, f"eval/{name}/success_low": cell.interval[0],
             f"eval/{name}/success_high": cell.interval[1]}, number,
        )  # fmt: skip
    agreement = agreement_with_reality(cells, real, settings.confidence) if real else None
    report = EvalReport(tuple(cells), agreement)
    write_json(out / "report.json", report.as_json() | {"settings": settings.model_dump(mode="json")})
    write_bytes(out / "table.md", table(report).encode())
    reporter.progress(1.0, f"success {report.nominal.success_rate:.2f}")
    return report


def table(report: EvalReport) -> str:
    """The cells as a Markdown table."""
    percent = round(100 * report.nominal.confidence)
    lines = [
        f"| cell | episodes | strict success | {percent} % interval | seed's test | mean length |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for cell in report.cells:
        low, high = cell.interval
        looser = sum(cell.success_seed) / len(cell.seeds)
        lines.append(
            f"| {cell.name} | {len(cell.seeds)} | {cell.success_rate:.1%} | {low:.1%} to {high:.1%} | {looser:.1%} | "
            f"{cell.mean_length:.1f} |"
        )
    if report.agreement:
        count = len(report.agreement.names)
        lines += ["", f"Agreement with the real robot over {count} entries (interval: resampled trials):", ""]
        lines += [
            f"- {name}: {value:.3f} ({low:.3f} to {high:.3f})"
            for name, (value, low, high) in report.agreement.statistics.items()
        ]
    return "\n".join(lines) + "\n"


def read_real_results(path: Path) -> list[dict[str, Any]]:
    """Entries of a file of real outcomes.

    ``[{"name": "nominal", "successes": 14, "trials": 20}, ...]``: a name that is a cell of this report is paired with
    it; any other entry (another policy, say) brings ``sim_successes`` and ``sim_trials`` of its own.

    Raises:
        ConfigError: the file cannot be read or an entry is incomplete or impossible.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"real results {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"real results {path} must be a list of objects with name, successes and trials")
    for number, entry in enumerate(entries):
        prefixes = [""] + (["sim_"] if isinstance(entry, dict) and "sim_trials" in entry else [])
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ConfigError(f"real results {path}: entry {number} has no name")
        for prefix in prefixes:
            k, n = entry.get(f"{prefix}successes"), entry.get(f"{prefix}trials")
            if not (isinstance(k, int) and isinstance(n, int) and n > 0 and 0 <= k <= n):
                raise ConfigError(
                    f"real results {path}: entry {entry['name']!r} needs whole numbers 0 <= {prefix}successes <= "
                    f"{prefix}trials, given {k} and {n}"
                )
    return entries


def agreement_with_reality(cells: Sequence[Cell], real: Sequence[dict[str, Any]], confidence: float) -> Agreement:
    """Pearson, Spearman and MMRV between simulated and real success rates, with bootstrap intervals.

    Raises:
        ConfigError: fewer than three entries, or an entry without a simulated counterpart.
    """
    own = {cell.name: (sum(cell.success), len(cell.seeds)) for cell in cells}
    if len(real) < 3:
        raise ConfigError(f"{len(real)} real results given; a correlation needs at least 3 entries")
    sim = []
    for entry in real:
        if "sim_trials" in entry:
            sim.append((entry["sim_successes"], entry["sim_trials"]))
        elif entry["name"] in own:
            sim.append(own[entry["name"]])
        else:
            raise ConfigError(
                f"real result {entry['name']!r} is no cell of this report ({', '.join(own)}) and has no sim_successes "
                "and sim_trials"
            )
    real_counts = tuple(zip(*[(entry["successes"], entry["trials"]) for entry in real], strict=True))
    sim_counts = tuple(zip(*sim, strict=True))
    r, s = (np.divide(*counts) for counts in (real_counts, sim_counts))
    statistics = {}
    for name, function in (("pearson", pearson), ("spearman", spearman), ("mmrv", mean_maximum_rank_violation)):
        interval = bootstrap_over_trials(function, real_counts, sim_counts, confidence=confidence)
        statistics[name] = (function(r, s), *interval)
    return Agreement(tuple(entry["name"] for entry in real), tuple(r.tolist()), tuple(s.tolist()), statistics)


def _run_cell(
    name: str, make_env: Callable[[int], VecEnv], policy: Policy, episodes: int, videos: Path, config: PipelineConfig
) -> Cell:
    settings, width = config.evaluation, min(config.sim.num_envs, episodes)
    parts: list[EpisodeStats] = []
    actions: list[Tensor] = []
    with closing(make_env(width)) as env:
        for batch in range(-(-episodes // width)):
            # The last batch is filled up with further seeds, whose episodes are not counted.
            first = settings.seed + batch * width
            noise = np.random.SeedSequence([settings.seed, batch]).generate_state(1, np.uint64)[0]
            stats, executed = _play_whole(env, policy, range(first, first + width), int(noise >> 1))
            parts.append(stats)
            actions.append(executed)
    if settings.videos:
        _film(name, make_env, parts[0], actions[0][: settings.videos], videos)
    stats = join_stats(parts)
    return Cell(
        name=name,
        seeds=stats.seeds[:episodes],
        success=tuple(stats.success[:episodes].tolist()),
        success_seed=tuple(stats.success_seed[:episodes].tolist()),
        length=tuple(stats.length[:episodes].tolist()),
        confidence=settings.confidence,
    )


def _play_whole(env: VecEnv, policy: Policy, seeds: range, noise: int) -> tuple[EpisodeStats, Tensor]:
    """As :func:`play`, with a second attempt where the physics crashed; a lost episode is no failure of the policy.

    The whole batch is played again with the same noise: that of an episode depends on its place among the others.

    Raises:
        SimulationError: it crashed again.
    """
    for _ in range(2):
        stats, actions = play(env, policy, seeds, torch.Generator().manual_seed(noise))
        if not stats.lost.any():
            return stats, actions
        lost = [seed for seed, gone in zip(seeds, stats.lost.tolist(), strict=True) if gone]
        logger.warning("the physics crashed in the episodes of seeds %s", lost)
    raise SimulationError(
        f"the physics crashed twice while seeds {seeds.start}-{seeds.stop - 1} were played, the second time in {lost}; "
        "the log has the workers' last words"
    )


def _film(name: str, make_env: Callable[[int], VecEnv], stats: EpisodeStats, actions: Tensor, folder: Path) -> None:
    """Videos of the first episodes of a batch, whose ``actions`` [b, T, A] are executed again."""
    seeds, measured = stats.seeds[: len(actions)], stats.success[: len(actions)]
    with closing(make_env(len(actions))) as env:
        films, success = film(env, seeds, actions)
        if not torch.equal(success, measured):
            logger.warning(
                "%s: of the filmed episodes %s some ended otherwise than when measured; this physics is not repeatable "
                "over batch sizes", name, list(seeds),
            )  # fmt: skip
        for pictures, seed, succeeded in zip(films, seeds, success.tolist(), strict=True):
            outcome = "success" if succeeded else "failure"
            label = f"{name}  seed {seed}  {outcome}"
            write_video(folder / f"{name}_{seed}_{outcome}.mp4", pictures, env.control_hz, label=label)
