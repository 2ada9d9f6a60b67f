"""Curves are drawn from what the learning benchmark wrote, and reach MLflow as it measured them."""

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from gsrl_core import config as configuration
from gsrl_core.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import learning_curves

HISTORY = [
    {"iteration": 1, "env/success_once": 0.25, "env/num_trajectories": 4, "actor/approx_kl": 0.0},
    {"iteration": 2, "env/success_once": 0.75, "env/num_trajectories": 3, "actor/approx_kl": 0.01},
]


@pytest.fixture
def folder(tmp_path):
    cells = {
        "before": {"cell": {"success_rate": 0.4, "interval": [0.3, 0.5]}},
        "after": {"cell": {"success_rate": 0.9, "interval": [0.8, 0.95]}},
    }
    facts = {"iterations": 2, "episodes": 7, "seconds": 12.3}
    config = configuration.load("laptop", {"ppo.gamma": 0.98}).model_dump(mode="json")
    out = tmp_path / "out"
    out.mkdir()
    (out / "learning.json").write_text(json.dumps(cells | {"training": facts, "config": config}))
    with (out / "learning.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HISTORY[0])
        writer.writeheader()
        writer.writerows(HISTORY)
    Image.new("RGB", (4, 4)).save(out / "learning_curve.png")
    return out


def test_the_table_the_picture_and_mlflow_tell_the_same(folder, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("GSRL_HOME", str(tmp_path))
    learning_curves.main([f"seed 1={folder}", "--plot", str(tmp_path / "curves.png"), "--track"])
    assert "| seed 1 | 40.0% [30.0%, 50.0%] | 90.0% [80.0%, 95.0%] | 2 | 7 | 12 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "curves.png").size == (900, 700)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("real2sim2real")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["seed 1"].data.metrics == {"success_before": 0.4, "success_after": 0.9}
    child = runs["finetune seed 1"]
    assert child.data.params["ppo.gamma"] == "0.98"
    curve = client.get_metric_history(child.info.run_id, "env/success_once")
    assert [(point.step, point.value) for point in curve] == [(1, 0.25), (2, 0.75)]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["learning_curve.png"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing does not hold what learning\.py writes"):
        learning_curves.read_run(str(tmp_path / "nothing"))
