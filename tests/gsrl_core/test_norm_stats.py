import json

import numpy as np
import pytest

from gsrl_core.errors import TrainingError
from gsrl_core.interfaces import NullReporter
from gsrl_core.lerobot_data import export_lerobot
from gsrl_core.norm_stats import write_norm_stats
from gsrl_core.policy.demonstrations import Episode, write_shard
from gsrl_core.policy.transforms import norm_stats_from_json


def test_statistics_of_demonstrations_and_of_the_same_as_a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(60, 9)), rng.uniform(-0.1, 0.1, (60, 7))
    rgb = {"camera": np.zeros((60, 4, 4, 3), np.uint8)}
    write_shard(tmp_path / "demos", 0, [Episode(0, "go", rgb, state, action)])
    (tmp_path / "demos" / "demos.json").write_text('{"control_hz": 10}')
    write_norm_stats(tmp_path / "demos", tmp_path / "assets" / "norm_stats.json")
    content = json.loads((tmp_path / "assets" / "norm_stats.json").read_text())
    for values, stats in zip((state, action), norm_stats_from_json(content, "it"), strict=True):
        np.testing.assert_allclose(stats.mean, values.mean(axis=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(stats.std, values.std(axis=0), rtol=1e-5)
        np.testing.assert_allclose((stats.q01, stats.q99), np.quantile(values, (0.01, 0.99), axis=0), rtol=1e-5)
    export_lerobot(tmp_path / "demos", tmp_path / "dataset", NullReporter())
    write_norm_stats(tmp_path / "dataset", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content


def test_nothing_to_compute_from_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="no demonstrations"):
        write_norm_stats(tmp_path, tmp_path / "norm_stats.json")


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(TrainingError, match=r"is a folder; name the file to write, for example .*/norm_stats\.json"):
        write_norm_stats(tmp_path, tmp_path)
