"""The commands of `dataset`: LeRobot out and in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="""Demonstrations as LeRobot v3 datasets, and LeRobot v3 datasets as demonstrations.

    real2sim2real dataset export --demos my_demos --out my_dataset

    real2sim2real dataset import --from my_dataset --out my_demos
    """,
)


@app.command("export")
def export_dataset(
    demos: Annotated[Path, typer.Option(help="Folder that `demos` or `dataset import` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the dataset (new).")],
) -> None:
    """Write demonstrations as a LeRobot v3 dataset, with PNG pictures.

    Features: observation.image (and observation.image.CAMERA for further ones), observation.state, actions, task.

      real2sim2real dataset export --demos my_demos --out my_dataset
    """
    from flows.console import ConsoleReporter, progress_shown

    with progress_shown():
        from gsrl_core.artifacts import full_disk_is_an_error
        from gsrl_core.lerobot_data import export_lerobot

        with full_disk_is_an_error(out):
            episodes = export_lerobot(demos, out, ConsoleReporter("dataset"))
    typer.echo(f"{out}: {episodes} episodes")


@app.command("import")
def import_dataset(
    source: Annotated[Path, typer.Option("--from", help="Folder of a LeRobot v3 dataset; pictures or videos.")],
    out: Annotated[Path, typer.Option(help="Folder for the demonstrations.")],
    camera: Annotated[
        list[str] | None,
        typer.Option(help="Camera for the base picture; again: left wrist, right wrist. Default: all, by name."),
    ] = None,
) -> None:
    """Turn a LeRobot v3 dataset into demonstrations for `sft`; an interrupted call goes on.

    Actions must be the hand's motion in a control step (3 m, 3 rad) and the
    gripper's command (-1 closed, 1 open), as `demos` records them. The state may
    have any width; the environment here gives 7 joints (rad) and 2 fingers (m).

      real2sim2real dataset import --from my_dataset --out my_demos

      real2sim2real dataset import --from my_dataset --out my_demos --camera top --camera wrist
    """
    from flows.console import ConsoleReporter, progress_shown

    with progress_shown():
        from gsrl_core.artifacts import full_disk_is_an_error
        from gsrl_core.lerobot_data import import_lerobot

        with full_disk_is_an_error(out):
            facts = import_lerobot(source, out, ConsoleReporter("dataset"), cameras=camera or ())
    typer.echo(json.dumps(facts))
