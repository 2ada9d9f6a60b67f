"""Make the pi05_tiny checkpoint that ships with the project: scripted demonstrations -> flow-matching SFT -> folder.

    python scripts/make_tiny_checkpoint.py --scene SCENE

SCENE is an assembled scene folder. Demonstrations and training state go to --work and are reused, so an interrupted
run continues. Settings are those of the laptop preset (sections demos, sft and sim); change them with --set.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.config import load, parse_assignments
from gsrl_core.demos import collect_demos
from gsrl_core.sft import train_sft

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
    parser.add_argument("--scene", type=Path, required=True, help="assembled scene folder")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="checkpoint folder (default: the bundled one)")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/pi05_tiny"), help="demonstrations and training state"
    )
    parser.add_argument("--preset", default="laptop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration value")
    options = parser.parse_args()
    config = load(options.preset, parse_assignments(options.set))
    reporter = ConsoleReporter()
    demos = options.work / "demos"
    collected = collect_demos(options.scene, demos, config, reporter)
    print(collected)
    trained = train_sft(
        demos,
        options.out,
        None,
        "pi05_tiny",
        config.sft,
        device="cuda" if torch.cuda.is_available() else "cpu",
        reporter=reporter,
        workspace=options.work / "sft",
        command=shlex.join(["python", "scripts/make_tiny_checkpoint.py", *_portable(sys.argv[1:])]),
    )
    print(trained)


def _portable(arguments: list[str]) -> list[str]:
    """The arguments without folders of this machine."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]


if __name__ == "__main__":
    main()
