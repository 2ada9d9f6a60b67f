"""Does PPO learn? Evaluate a checkpoint on fixed seeds, fine-tune it within a time budget, evaluate the result.

    PYTHONPATH=. python benchmarks/learning.py --scene SCENE --work WORK --out OUT --seconds 500 --set sim.num_envs=64

Everything is the project's own ``evaluate`` and ``finetune``; this file divides the time between them. It needs neither
Prefect, MLflow nor Ray. WORK keeps what a later call with the same arguments goes on from: the first evaluation and
PPO's state. OUT gets learning.json, learning.csv, learning_curve.png, contact_sheet.png and episodes.gif.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gsrl_core.artifacts import write_json
from gsrl_core.config import apply_overrides, load, parse_assignments
from gsrl_core.embodiment import Embodiment, SplatEmbodiment, default_device
from gsrl_core.evaluate import evaluate
from gsrl_core.finetune import finetune
from gsrl_core.folders import BUNDLED, bundled_folder
from gsrl_core.interfaces import NullReporter
from gsrl_core.rl.playback import film, play
from gsrl_core.sections import PipelineConfig

WITHOUT_EXTRAS = {"evaluation.episodes_per_perturbation": 0, "evaluation.videos": 0, "tracking.tensorboard": False}
"""Only the nominal cell counts here; its pictures are made without a video codec, which a bare host lacks."""
SHOWN, COLUMNS = 8, 8
"""Episodes on the contact sheet, and pictures of each."""
MARGIN = 1.3
"""The second evaluation is given this times the first one's seconds."""
SHOWING = 15.0
"""Seconds that the contact sheet and the animation are given."""
EVERY = 2
"""Pictures of an episode that become one of the animation."""


class Printer(NullReporter):
    """One line an iteration."""

    _SHOWN = ("env/success_once", "eval/success_once", "env/episode_len", "actor/kl_k3", "actor/pg_clipfrac",
              "critic/explained_variance", "time/generate_rollouts", "time/actor_training", "time/step")  # fmt: skip

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Print those that tell how it goes."""
        shown = [f"{name.split('/')[1]} {values[name]:.3g}" for name in self._SHOWN if name in values]
        if shown:
            print(f"[{step}] " + "  ".join(shown), flush=True)


@dataclass(frozen=True)
class Inputs:
    """What is measured, and where it goes."""

    checkpoint: Path
    scene: Path
    work: Path
    out: Path
    config: PipelineConfig
    embodiment: Embodiment | None = None
    """Something else than pi0.5 in the splat environment (tests)."""


def learn(inputs: Inputs, seconds: float) -> dict[str, Any]:
    """Evaluate, train and evaluate again in about ``seconds``; returns and writes the record.

    Raises:
        TrainingError: the work folder belongs to another checkpoint, scene or settings.
    """
    start = time.monotonic()
    for folder in (inputs.out, inputs.work):
        folder.mkdir(parents=True, exist_ok=True)
    before = _before(inputs)
    tuned = inputs.work / "tuned"
    shutil.rmtree(tuned, ignore_errors=True)  # of the call before; the state it was made from is beside it
    reserve = MARGIN * before["seconds"] + SHOWING
    facts = finetune(
        inputs.checkpoint, inputs.scene, tuned, inputs.work / "state", inputs.config, Printer(),
        embodiment=inputs.embodiment, deadline=start + seconds - reserve,
    )  # fmt: skip
    after = _measured(inputs, tuned)
    _show_episodes(inputs, tuned)
    record = {"before": before, "after": after, "training": facts, "seconds": round(time.monotonic() - start, 1)}
    record["config"] = inputs.config.model_dump(mode="json")
    write_json(inputs.out / "learning.json", record)
    shutil.copyfile(tuned / "training.csv", inputs.out / "learning.csv")
    shutil.copyfile(tuned / "learning_curve.png", inputs.out / "learning_curve.png")
    return record


def table(record: Mapping[str, Any]) -> str:
    """The two evaluations and what lies between them as a Markdown table."""
    facts = record["training"]
    lines = [
        "| policy | episodes | strict success | interval | seed's test | mean length |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name in ("before", "after"):
        cell = record[name]["cell"]
        low, high = cell["interval"]
        lines.append(
            f"| {name} PPO | {cell['episodes']} | {cell['success_rate']:.1%} | {low:.1%} to {high:.1%} | "
            f"{cell['success_seed_rate']:.1%} | {cell['mean_length']:.1f} |"
        )
    lines.append(
        f"\n{facts['iterations']} iterations, {facts['episodes']} episodes, {facts['seconds']} s of training in all "
        f"calls; under exploration {facts['success_once_first']:.1%} -> {facts['success_once_last']:.1%}. "
        f"This call: {record['seconds']} s."
    )
    return "\n".join(lines)


def _before(inputs: Inputs) -> dict[str, Any]:
    """The first evaluation, or that of an earlier call on the same seeds."""
    path = inputs.work / "before.json"
    settings = inputs.config.evaluation.model_dump(mode="json")
    if path.exists():
        known = json.loads(path.read_text())
        if known["settings"] == settings:
            return known
    measured = _measured(inputs, inputs.checkpoint)
    write_json(path, measured)
    return measured


def _measured(inputs: Inputs, checkpoint: Path) -> dict[str, Any]:
    """The nominal cell (see :class:`gsrl_core.evaluate.EvalReport`) on the fixed seeds, and seconds with loading."""
    start = time.monotonic()
    report = evaluate(
        checkpoint, inputs.scene, inputs.work / "evaluation", inputs.config, Printer(),
        embodiment=_embodiment(inputs, checkpoint),
    )  # fmt: skip
    cell = report.as_json()["cells"][0]
    took = round(time.monotonic() - start, 1)
    print(f"evaluated {checkpoint}: {cell['success_rate']:.1%} of {cell['episodes']} in {took} s", flush=True)
    settings = inputs.config.evaluation.model_dump(mode="json")
    return {"cell": cell, "settings": settings, "seconds": took}


def _embodiment(inputs: Inputs, checkpoint: Path) -> Embodiment:
    return inputs.embodiment or SplatEmbodiment(checkpoint, inputs.scene, inputs.config)


def _show_episodes(inputs: Inputs, checkpoint: Path) -> None:
    """Contact sheet and animation of the first evaluation seeds, with noise of their own small batch."""
    body, device = _embodiment(inputs, checkpoint), default_device()
    seeds = range(inputs.config.evaluation.seed, inputs.config.evaluation.seed + SHOWN)
    with closing(body.make_env(SHOWN, device)) as env:
        _, actions = play(env, body.make_policy(device), seeds, torch.Generator().manual_seed(seeds.start))
        films, success = film(env, seeds, actions)
        rate = env.control_hz
    outcomes = [
        f"{seed} {'success' if good else 'failure'}" for seed, good in zip(seeds, success.tolist(), strict=True)
    ]
    contact_sheet(films, outcomes).save(inputs.out / "contact_sheet.png")
    frames = animation(films)
    frames[0].save(
        inputs.out / "episodes.gif",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 * EVERY / rate),
        loop=0,
    )


def contact_sheet(films: list[Tensor], captions: list[str]) -> Image.Image:
    """A row for each film uint8 [T, h, w, 3]: pictures at even intervals, the first and the last included."""
    height, width = films[0].shape[1:3]
    sheet = Image.new("RGB", (COLUMNS * width, len(films) * (height + 14)))
    draw = ImageDraw.Draw(sheet)
    for row, (frames, caption) in enumerate(zip(films, captions, strict=True)):
        top = row * (height + 14)
        draw.text((4, top + 1), caption, fill="white")
        for column, index in enumerate(torch.linspace(0, len(frames) - 1, COLUMNS).round().int().tolist()):
            sheet.paste(Image.fromarray(frames[index].numpy()), (column * width, top + 14))
    return sheet


def animation(films: list[Tensor]) -> list[Image.Image]:
    """All films beside each other, four in a row, every second picture; one that is over keeps its last."""
    height, width = films[0].shape[1:3]
    pages = []
    for time_step in range(0, max(map(len, films)) + EVERY - 1, EVERY):
        page = Image.new("RGB", (4 * width, -(-len(films) // 4) * height))
        for place, frames in enumerate(films):
            picture = frames[min(time_step, len(frames) - 1)].numpy()
            page.paste(Image.fromarray(picture), (place % 4 * width, place // 4 * height))
        pages.append(page.quantize(128))
    return pages


def main(arguments: list[str] | None = None) -> None:
    """Parse, learn, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="bundled:pi05_tiny", help="folder, or bundled:NAME")
    parser.add_argument("--scene", type=Path, required=True, help="assembled scene folder")
    parser.add_argument("--work", type=Path, required=True, help="state that a later call goes on from")
    parser.add_argument("--out", type=Path, required=True, help="records and pictures")
    parser.add_argument("--seconds", type=float, required=True, help="budget of this call, evaluations included")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    options = parser.parse_args(arguments)
    config = apply_overrides(load(options.preset, parse_assignments(options.set)), WITHOUT_EXTRAS)
    reference = options.checkpoint
    checkpoint = bundled_folder(reference) if reference.startswith(BUNDLED) else Path(reference)
    record = learn(Inputs(checkpoint, options.scene, options.work, options.out, config), options.seconds)
    print(table(record))


if __name__ == "__main__":
    main()
