"""What lies beside the weights of a checkpoint, by the habits of openpi, RLinf and lerobot: how inputs are prepared."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.config import Pi05Config
from gsrl_core.policy.files import load_tensors
from gsrl_core.policy.transforms import NEEDED, STATISTICS, FieldStats, norm_stats_from_json

LEROBOT_FIELDS = {"state": "observation.state", "actions": "action"}
"""Our names of the fields, and lerobot's features."""
LEROBOT_STATE_STEP = "pi05_prepare_state_tokenizer_processor_step"
"""Registered name of the step of lerobot's pipeline that writes the state into the prompt."""


def read_statistics(folder: Path, config: Pi05Config, asset_id: str | None = None) -> tuple[FieldStats, FieldStats]:
    """State and action statistics of ``folder``.

    Args:
        folder: with norm_stats.json in assets/<id>/, <id>/ or beside the weights, or lerobot's
            policy_preprocessor*.safetensors.
        config: its normalisation decides which statistics must be there, its width where padding is cut off.
        asset_id: which norm_stats.json if there are several; no other is taken then.

    Raises:
        CheckpointError: none, several, broken, or a statistic is missing that the normalisation computes with.
    """
    needed = NEEDED[config.normalization]
    found = _norm_stats_file(folder, asset_id)
    if found is not None:
        return norm_stats_from_json(read_json(found), str(found), needed, config.action_dim)
    for path in sorted(folder.glob("policy_preprocessor*.safetensors")):
        tensors = load_tensors(path)
        fields = {
            ours: {key: tensors[f"{theirs}.{key}"].tolist() for key in STATISTICS if f"{theirs}.{key}" in tensors}
            for ours, theirs in LEROBOT_FIELDS.items()
        }
        if any(fields.values()):
            return norm_stats_from_json(fields, str(path), needed, config.action_dim)
    raise CheckpointError(
        f"{folder} has no norm_stats.json (looked in it, in assets/<id>/ and in <id>/) and no policy_preprocessor*."
        "safetensors of lerobot's with statistics; copy it from the training run: with other statistics the policy "
        "would command wrong motions"
    )


def statistics_id(folder: Path, asset_id: str | None = None) -> str | None:
    """Which ``assets/<id>`` (or ``<id>``) of ``folder`` :func:`read_statistics` takes; None if what it takes has no id.

    Raises:
        CheckpointError: as there.
    """
    found = _norm_stats_file(folder, asset_id)
    return (_asset_id(found, folder) or None) if found else None


def require_asset_id(asset_id: str) -> str:
    """``asset_id`` if it names a folder, or nested ones, below assets/. Raises CheckpointError."""
    path = PurePosixPath(asset_id)
    if path.is_absolute() or ".." in path.parts or not path.parts or path.as_posix() != asset_id:
        raise CheckpointError(
            f"policy.asset_id is {asset_id!r}; it names a folder below assets/, as 'droid' or 'someone/droid'"
        )
    return asset_id


def lerobot_prompts_state(folder: Path) -> bool:
    """Whether lerobot's policy_preprocessor.json puts the state into the prompt, as its pi05 does by itself.

    Raises:
        CheckpointError: the file is broken.
    """
    path = folder / "policy_preprocessor.json"
    content = read_json(path)
    if content is None:
        return True
    try:
        return LEROBOT_STATE_STEP in {step.get("registry_name") for step in content["steps"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a pipeline of lerobot's ({error!r}); fetch it again") from error


def read_json(path: Path) -> Any:
    """Parsed JSON, or None without a file. Raises CheckpointError if it is not JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error


def _norm_stats_file(folder: Path, asset_id: str | None) -> Path | None:
    found = {_asset_id(path, folder): path for path in sorted(folder.rglob("norm_stats.json"))}
    listed = ", ".join(name or "beside the weights" for name in found)
    if asset_id is not None:
        if asset_id not in found:
            raise CheckpointError(
                f"policy.asset_id is {asset_id!r}, but {folder} has statistics of: {listed or 'nothing'}"
            )
        return found[asset_id]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several norm_stats.json ({listed}); choose this robot's with policy.asset_id"
        )
    return next(iter(found.values()), None)


def _asset_id(path: Path, folder: Path) -> str:
    """``droid`` of assets/droid/norm_stats.json; empty for one beside the weights."""
    name = path.parent.relative_to(folder).as_posix().removeprefix("assets/")
    return "" if name == "." else name
