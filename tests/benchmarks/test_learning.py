"""The learning benchmark improves the toy policy, in one call or in several, and shows what it measured."""

import csv
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from gsrl_core import config as configuration
from gsrl_core.errors import TrainingError

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gsrl_core" / "rl")]
import learning  # noqa: E402
from toy import GaussianPolicy, ToyEmbodiment  # noqa: E402

OVERRIDES = {
    "sim.num_envs": 16, "sim.max_episode_steps": 8, "policy.action_chunk": 2, "ppo.iterations": 30,
    "ppo.rollout_epochs": 4, "ppo.global_batch": 64, "ppo.micro_batch": 64, "ppo.learning_rate": 3e-3,
    "ppo.value_learning_rate": 1e-2, "evaluation.episodes": 64,
}  # fmt: skip


class LoadableToy(ToyEmbodiment):
    """The toy, whose tuned policy is loaded where there is one."""

    def __init__(self, work):
        super().__init__()
        object.__setattr__(self, "saved", work / "tuned" / "policy.pt")

    def make_policy(self, device):
        policy = GaussianPolicy(std=0.5).to(device)
        if self.saved.exists():
            policy.load_state_dict(torch.load(self.saved))
        return policy


@pytest.fixture
def learn(tmp_path):
    def call(seconds=math.inf, **overrides):
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        config = configuration.load("laptop", OVERRIDES | learning.WITHOUT_EXTRAS | keys)
        work = tmp_path / "work"
        inputs = learning.Inputs(
            tmp_path / "start", tmp_path / "scene", work, tmp_path / "out", config, LoadableToy(work)
        )
        return learning.learn(inputs, seconds)

    return call


def test_the_toy_learns_and_the_record_tells(learn, tmp_path):
    record = learn()
    before, after = record["before"]["cell"], record["after"]["cell"]
    assert before["seeds"] == after["seeds"] == tuple(range(9_000_000, 9_000_064))
    assert after["interval"][0] > before["interval"][1]  # a gain that chance does not explain
    assert json.loads((tmp_path / "out" / "learning.json").read_text())["after"]["cell"]["seeds"] == [*after["seeds"]]
    rows = list(csv.DictReader((tmp_path / "out" / "learning.csv").open()))
    assert len(rows) == record["training"]["iterations"] == 30
    text = learning.table(record)
    assert f"| before PPO | 64 | {before['success_rate']:.1%} |" in text
    assert f"| after PPO | 64 | {after['success_rate']:.1%} |" in text
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.size == (learning.COLUMNS * 16, learning.SHOWN * (12 + 14))
    assert Image.open(tmp_path / "out" / "episodes.gif").n_frames > 1


def test_a_budget_ends_training_and_the_next_call_goes_on(learn, tmp_path):
    first = learn(seconds=0)
    assert first["training"]["iterations"] == 1
    second = learn(ppo__iterations=3)
    assert second["training"]["iterations"] == 3
    assert second["before"] == json.loads(json.dumps(first["before"]))  # measured once
    rows = list(csv.DictReader((tmp_path / "out" / "learning.csv").open()))
    assert rows[0]["env/success_once"] == str(first["training"]["success_once_first"])


def test_other_evaluation_seeds_are_measured_again(learn):
    first = learn(ppo__iterations=1)
    second = learn(ppo__iterations=1, evaluation__episodes=32)
    assert (first["before"]["cell"]["episodes"], second["before"]["cell"]["episodes"]) == (64, 32)


def test_another_learning_rate_does_not_continue_a_run(learn):
    learn(ppo__iterations=1)
    with pytest.raises(TrainingError, match="another checkpoint, scene or settings"):
        learn(ppo__iterations=2, ppo__learning_rate=1e-4)


def test_training_ends_before_the_deadline(learn, monkeypatch):
    monkeypatch.setattr(learning, "SHOWING", 2.0)
    learn(ppo__iterations=1)  # what is loaded once is loaded
    start = time.monotonic()
    record = learn(seconds=8, ppo__iterations=100_000, ppo__checkpoint_every=50)
    assert 1 < record["training"]["iterations"] < 100_000
    assert time.monotonic() - start < 8
