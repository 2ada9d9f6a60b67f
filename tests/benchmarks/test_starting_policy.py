"""The search for a starting policy trains on until success is in the range, and says when it is not."""

import sys
from pathlib import Path

import pytest

from gsrl_core import config as configuration
from gsrl_core.errors import TrainingError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import starting_policy
from starting_policy import Search


class Rounds:
    """Stands for SFT and its evaluation: the n-th checkpoint succeeds at the n-th rate."""

    def __init__(self, *rates):
        self.rates, self.inits = list(rates), []

    def train(self, init, folder, number):
        self.inits.append(init.name if init else None)
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(number))

    def success(self, folder):
        return self.rates[int((folder / "weights").read_text())]


def test_rounds_go_on_from_each_other_until_the_range(tmp_path):
    rounds = Rounds(0.1, 0.3, 0.4, 0.9)
    tried = starting_policy.search(rounds.train, rounds.success, tmp_path, Search(0.35, 0.5, 9))
    assert rounds.inits == [None, "round-0", "round-1"]
    assert [entry["success"] for entry in tried] == [0.1, 0.3, 0.4]
    assert (tmp_path / "policy" / "weights").read_text() == "2"
    assert "| round-2 | 40.0% |" in starting_policy.table(tried)


@pytest.mark.parametrize("rates", [(0.1, 0.6), (0.1, 0.2, 0.3)])
def test_a_jump_over_the_range_and_too_few_rounds_are_errors(tmp_path, rates):
    rounds = Rounds(*rates, 0.4)
    with pytest.raises(TrainingError, match=f"no checkpoint between 35% and 50%.*round-{len(rates) - 1}"):
        starting_policy.search(rounds.train, rounds.success, tmp_path, Search(0.35, 0.5, len(rates)))
    assert not (tmp_path / "policy").exists()


def test_later_rounds_are_shorter_and_draw_anew():
    config = configuration.load("laptop", {"sft.steps": 900, "sft.warmup_steps": 50, "sft.seed": 3})
    first, third = (starting_policy.round_settings(config, number, 200).sft for number in (0, 2))
    assert (first.steps, first.warmup_steps, first.seed) == (900, 50, 3)
    assert (third.steps, third.warmup_steps, third.seed) == (200, 20, 5)
