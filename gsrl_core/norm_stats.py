"""Normalisation statistics of a data set, as openpi's norm_stats.json."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.artifacts import write_json
from gsrl_core.errors import TrainingError
from gsrl_core.lerobot_data import LeRobotFolder, is_lerobot
from gsrl_core.policy.demonstrations import load_demonstrations
from gsrl_core.policy.transforms import FieldStats, norm_stats_to_json


def write_norm_stats(data: Path, out: Path) -> dict[str, FieldStats]:
    """Compute the statistics that ``sft`` computes when it starts from random weights, and write them to ``out``.

    Args:
        data: folder of demonstrations, or of a LeRobot v3 dataset (no picture is read).
        out: the JSON file, as a checkpoint holds it in assets/<id>/norm_stats.json.

    Returns:
        Statistics of ``state`` (float32 [S] each) and ``actions`` (float32 [A] each) over all frames.

    Raises:
        TrainingError: no data in ``data``, or broken data, or ``out`` is a folder.
    """
    if out.is_dir():
        raise TrainingError(f"{out} is a folder; name the file to write, for example {out / 'norm_stats.json'}")
    state, actions = map(FieldStats.of, _vectors(data))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, norm_stats_to_json(state, actions))
    return {"state": state, "actions": actions}


def _vectors(data: Path) -> tuple[Tensor, Tensor]:
    if is_lerobot(data):
        state, action = LeRobotFolder.open(data, None).vectors()
        return torch.from_numpy(state), torch.from_numpy(action)
    demonstrations = load_demonstrations(data)
    return demonstrations.state, demonstrations.action
