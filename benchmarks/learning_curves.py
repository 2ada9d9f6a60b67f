"""Several runs of ``learning.py`` in one picture, and as runs of MLflow that its page compares.

    PYTHONPATH=. python benchmarks/learning_curves.py "seed 42=OUT42" "seed 43=OUT43" --plot curves.png [--track]

OUT... are the folders that ``learning.py --out`` wrote. A curve is strict success under exploration in training; the
points at its ends are the evaluations on fixed seeds, with their intervals. --track writes each run's settings, the
metrics of every iteration and both evaluations to MLflow ($MLFLOW_TRACKING_URI, else the file that ``real2sim2real up``
shows); ``learning.py`` itself leaves files only, since a GPU host need not have MLflow.
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gsrl_core.artifacts import digest_file
from gsrl_core.errors import ConfigError
from gsrl_core.sections import PipelineConfig

SECTIONS = ("sim", "policy", "ppo", "cluster", "evaluation")
"""Of the configuration, recorded as parameters."""


@dataclass(frozen=True)
class Run:
    """What ``learning.py`` wrote."""

    name: str
    folder: Path
    record: dict[str, Any]
    history: list[dict[str, float]]
    """The metrics of each iteration."""


def read_run(argument: str) -> Run:
    """``NAME=FOLDER`` or ``FOLDER`` -> its files. Raises ConfigError when they are not there."""
    name, found, place = argument.rpartition("=")
    folder = Path(place)
    try:
        record = json.loads((folder / "learning.json").read_text())
        with (folder / "learning.csv").open() as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} does not hold what learning.py writes ({error})") from error
    return Run(name if found else folder.name, folder, record, rows)


def plot(runs: list[Run], path: Path) -> None:
    """Strict success over episodes of training, and approximate KL below."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    success, divergence = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for index, run in enumerate(runs):
        color = f"C{index}"
        episodes = _episodes(run)
        success.plot(
            episodes, [row["env/success_once"] for row in run.history], marker=".", color=color, label=run.name
        )
        # What an iteration collected was played by the weights before its update.
        for cell, at in ((run.record["before"]["cell"], 0), (run.record["after"]["cell"], episodes[-1])):
            rate, (low, high) = cell["success_rate"], cell["interval"]
            success.errorbar([at], [rate], [[rate - low], [high - rate]], fmt="D", color=color, capsize=4)
        divergence.plot(episodes, [row["actor/approx_kl"] for row in run.history], marker=".", color=color)
    success.set_ylabel("strict success\n(diamonds: fixed seeds, noise off)")
    divergence.set_ylabel("approximate KL of the update")
    divergence.set_xlabel("episodes of training")
    success.set_ylim(0, 1)
    success.legend()
    for axis in (success, divergence):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def track(run: Run) -> str:
    """Write a run to MLflow; returns its id. Raises ConfigError when the store cannot be used."""
    from tasks import tracking

    config = PipelineConfig.model_validate(run.record["config"])
    sections = {name: getattr(config, name) for name in SECTIONS}
    digest = digest_file(run.folder / "learning.csv")
    parent = tracking.begin_pipeline(config, run.name, "none: benchmarks/learning.py")
    try:
        with tracking.stage_run(parent, f"finetune {run.name}", sections, digest, {}) as stage:
            for row in run.history:
                step = int(row["iteration"])
                stage.metrics({name: value for name, value in row.items() if name != "iteration"}, step)
            stage.files(run.folder, ("learning_curve.png", "contact_sheet.png"))
        rates = {f"success_{when}": run.record[when]["cell"]["success_rate"] for when in ("before", "after")}
        tracking.summarise(parent, rates, {})
    except BaseException as failure:
        tracking.end_pipeline(parent, failure)
        raise
    tracking.end_pipeline(parent)
    return parent


def table(runs: list[Run]) -> str:
    """A Markdown row for each run."""
    rows = ["| run | before | after | iterations | episodes | seconds |", "|---|---|---|---:|---:|---:|"]
    for run in runs:
        cells = [run.record[when]["cell"] for when in ("before", "after")]
        rates = [f"{cell['success_rate']:.1%} [{cell['interval'][0]:.1%}, {cell['interval'][1]:.1%}]" for cell in cells]
        facts = run.record["training"]
        counts = f"{facts['iterations']} | {facts['episodes']} | {facts['seconds']:.0f}"
        rows.append(f"| {run.name} | {' | '.join(rates)} | {counts} |")
    return "\n".join(rows)


def _episodes(run: Run) -> list[float]:
    total, at = 0.0, []
    for row in run.history:
        total += row["env/num_trajectories"]
        at.append(total)
    return at


def main(arguments: list[str] | None = None) -> None:
    """Parse, draw, track, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file")
    parser.add_argument("--track", action="store_true", help="write the runs to MLflow too")
    options = parser.parse_args(arguments)
    runs = [read_run(argument) for argument in options.runs]
    plot(runs, options.plot)
    if options.track:
        for run in runs:
            print(f"MLflow run {track(run)}: {run.name}")
    print(table(runs))


if __name__ == "__main__":
    main()
