"""The starting checkpoint: what is wrong with it is said before anything expensive begins."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from prefect.states import State
from safetensors.torch import load_file, save_file

from gsrl_core.config import load
from gsrl_core.errors import CheckpointError
from gsrl_core.folders import bundled_folder
from tasks import policy


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundled_folder("bundled:pi05_tiny"), tmp_path / "mine")


def fetch(folder, parent, **overrides):
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return policy.fetch_checkpoint.fn(load("laptop", {"policy.checkpoint": str(folder)} | keys), parent)


def test_weights_that_do_not_fit_their_config_are_refused_at_once(tracking, home, folder):
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["depth"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit the architecture\. \d+ missing") as refusal:
        fetch(folder, tracking[1])
    assert str(refusal.value).startswith(f"{folder / 'model.safetensors'} does not fit")
    assert not (home / "objects").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "assets/fr3/norm_stats.json", "config.json"])
def test_a_broken_file_is_named_where_the_user_has_it(tracking, home, folder, name):
    (folder / name).write_text("broken")
    with pytest.raises(CheckpointError) as refusal:
        fetch(folder, tracking[1])
    assert str(folder / name) in str(refusal.value)
    assert str(home) not in str(refusal.value)


def test_a_checkpoint_from_the_store_is_checked_again_for_another_chunk(tracking, folder):
    fetch(folder, tracking[1])
    assert isinstance(fetch(folder, tracking[1]), State)  # cached
    with pytest.raises(CheckpointError, match="allowed: 1 to 5"):
        fetch(folder, tracking[1], policy__action_chunk=10)


def test_of_several_robots_statistics_one_is_chosen(tracking, folder):
    (folder / "assets" / "fr3").rename(folder / "assets" / "droid")
    shutil.copytree(folder / "assets" / "droid", folder / "assets" / "libero")
    with pytest.raises(CheckpointError, match=r"\(droid, libero\); choose this robot's with policy\.asset_id"):
        fetch(folder, tracking[1])
    fetch(folder, tracking[1], policy__asset_id="droid")


def test_a_noise_head_of_another_range_is_refused_at_once_also_from_the_store(tracking, folder):
    weights = load_file(folder / "model.safetensors")
    bounds = {f"noise_head.logvar_{end}": torch.tensor(2 * math.log(std)) for end, std in (("min", 0.1), ("max", 0.2))}
    save_file(weights | bounds, folder / "model.safetensors")
    fetch(folder, tracking[1], policy__noise_method="flow_noise", policy__noise_std_range=[0.1, 0.2])
    with pytest.raises(CheckpointError, match=r"0\.1 to 0\.2; set policy\.noise_std_range"):
        fetch(folder, tracking[1], policy__noise_method="flow_noise")
