"""The commands of `checkpoint`: lerobot's layout out, any known layout in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="""Checkpoints for lerobot's PI05Policy, and checkpoints of others in this project's layout.

    real2sim2real checkpoint export --policy my_sft --out for_lerobot

    real2sim2real checkpoint import --from from_lerobot --out my_policy
    """,
)


@app.command("export")
def export_policy(
    policy: Annotated[Path, typer.Option(help="Checkpoint folder (pi0.5) that `sft` or `finetune` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for lerobot's checkpoint (new).")],
) -> None:
    """Write a checkpoint that lerobot's PI05Policy.from_pretrained loads, with its processors.

    real2sim2real checkpoint export --policy my_sft --out for_lerobot
    """
    from gsrl_core.artifacts import full_disk_is_an_error
    from gsrl_core.policy.lerobot_checkpoint import export_checkpoint

    with full_disk_is_an_error(out):
        facts = export_checkpoint(policy, out)
    typer.echo(json.dumps(facts))


@app.command("import")
def import_policy(
    source: Annotated[Path, typer.Option("--from", help="Checkpoint folder of lerobot, openpi or RLinf.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint (new).")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="PaliGemma's SentencePiece file; default: in --from or openpi's cache.")
    ] = None,
    discrete_state: Annotated[
        bool | None, typer.Option(help="Whether the prompt carries the state; default: what --from says.")
    ] = None,
    asset_id: Annotated[str | None, typer.Option(help="Which norm_stats.json, if there are several.")] = None,
) -> None:
    """Bring a checkpoint of lerobot, openpi or RLinf into this project's layout, bit by bit.

    real2sim2real checkpoint import --from from_lerobot --out my_policy

    real2sim2real checkpoint import --from from_openpi --out my_policy --asset-id droid
    """
    from gsrl_core.artifacts import full_disk_is_an_error
    from gsrl_core.policy.lerobot_checkpoint import import_checkpoint

    with full_disk_is_an_error(out):
        facts = import_checkpoint(source, out, tokenizer=tokenizer, discrete_state=discrete_state, asset_id=asset_id)
    typer.echo(json.dumps(facts))
