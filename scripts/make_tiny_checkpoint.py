"""Make the pi05_tiny checkpoint that ships with the project: scripted demonstrations -> flow-matching SFT -> folder.

--model pi05_small makes the 30 M parameter model in the same way.

    python scripts/make_tiny_checkpoint.py --plain-table --out outputs/plain
    python scripts/make_tiny_checkpoint.py --scene SCENE --init outputs/plain --share 0.23

SCENE is an assembled scene folder; --plain-table makes a bare brown one, so that the policy meets the photographed
bench only in the second step. --share keeps that fraction of the way from --init to the fine-tuned weights (weight
interpolation, Wortsman et al. 2022): the shipped checkpoint must leave PPO something to do.

Demonstrations and training state go to --work and are reused, so an interrupted run continues. Settings are those of
the laptop preset (sections demos, sft and sim); change them with --set.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gsrl_core.assemble import assemble_scene
from gsrl_core.config import load, parse_assignments
from gsrl_core.demos import collect_demos
from gsrl_core.sft import train_sft
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.ply import write_ply

BUNDLED = Path(__file__).parent.parent / "gsrl_core" / "bundled" / "pi05_tiny"


class ConsoleReporter:
    """Prints metrics as they come, and progress at most every ten seconds."""

    def __init__(self) -> None:
        self._printed = 0.0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """One line."""
        print(f"[{step}] " + "  ".join(f"{name} {value:.5g}" for name, value in values.items()), flush=True)

    def image(self, name: str, rgb: Tensor, step: int) -> None:
        """Pictures have no place on a console."""

    def progress(self, fraction: float, message: str) -> None:
        """One line, seldom."""
        if time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            print(f"{fraction:6.1%}  {message}", flush=True)


def main() -> None:
    """Parse, collect, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--scene", type=Path, help="assembled scene folder")
    where.add_argument("--plain-table", action="store_true", help="a bare brown table instead of a scene")
    parser.add_argument("--init", type=Path, help="checkpoint to start from; without it from random weights")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the way from --init, 0 to 1")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="checkpoint folder (default: the bundled one)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/pi05_tiny"), help="demonstrations and training state"
    )
    parser.add_argument("--model", choices=("pi05_tiny", "pi05_small"), default="pi05_tiny", help="without --init")
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    options = parser.parse_args()
    config = load(options.preset, parse_assignments(options.set))
    reporter = ConsoleReporter()
    demos = options.work / "demos"
    scene = plain_table(options.work / "plain_table") if options.plain_table else options.scene
    collected = collect_demos(scene, demos, config, reporter)
    print(collected)
    trained = train_sft(
        demos,
        options.out,
        options.init,
        options.model,
        config.sft,
        device="cuda" if torch.cuda.is_available() else "cpu",
        reporter=reporter,
        workspace=options.work / "sft",
        command=shlex.join(["python", "scripts/make_tiny_checkpoint.py", *_portable(sys.argv[1:])]),
        discrete_state=config.policy.discrete_state,
        asset_id=config.policy.asset_id,
    )
    print(trained)
    if options.init and options.share < 1:
        interpolate(options.init, options.out, options.share)


def plain_table(folder: Path) -> Path:
    """A scene folder with robot, cube and plate on a speckled brown plane. Returns ``folder``."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.meshgrid(torch.linspace(-0.3, 1.2, 150), torch.linspace(-0.7, 0.7, 140), indexing="ij")
    means = torch.stack([*grid, torch.zeros_like(grid[0])], dim=-1).reshape(-1, 3)
    count = len(means)
    colors = torch.tensor([0.7, 0.55, 0.35]) + 0.08 * torch.randn(count, 1, generator=generator)
    table = Gaussians(
        means=means,
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
        log_scales=torch.tensor([0.008, 0.008, 0.001]).log().repeat(count, 1),
        logit_opacities=torch.full((count,), 4.0),
        harmonics=colors_to_harmonics(colors),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_ply(folder / "table.ply", table)
    assemble_scene(folder / "table.ply", folder)
    return folder


def interpolate(start: Path, end: Path, share: float) -> None:
    """Replace the weights in ``end`` by ``start + share (end - start)``."""
    first, last = (load_file(folder / "model.safetensors") for folder in (start, end))
    save_file({name: first[name].lerp(last[name], share) for name in first}, end / "model.safetensors")


def _portable(arguments: list[str]) -> list[str]:
    """The arguments without folders of this machine."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]


if __name__ == "__main__":
    main()
