import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gsrl_core import config as configuration
from gsrl_core import evaluate as evaluation
from gsrl_core.errors import ConfigError, SimulationError
from gsrl_core.evaluate import evaluate, wilson_interval
from gsrl_core.interfaces import NullReporter
from gsrl_core.rl.playback import film, play

sys.path.insert(0, str(Path(__file__).parent / "rl"))
from toy import GaussianPolicy, ReachEnv, ToyEmbodiment

OVERRIDES = {
    "sim.num_envs": 8, "evaluation.episodes": 20, "evaluation.episodes_per_perturbation": 6,
    "evaluation.perturbations": ["pose", "friction"], "evaluation.videos": 2,
}  # fmt: skip


def sweep(folder, *, real=None, embodiment=None, **overrides):
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    config = configuration.load("laptop", OVERRIDES | keys)
    return evaluate(
        folder / "policy", folder / "scene", folder / "out", config, NullReporter(),
        real_results=real, embodiment=embodiment or ToyEmbodiment(),
    )  # fmt: skip


def test_the_sweep_counts_the_right_episodes_and_writes_them_down(tmp_path):
    report = sweep(tmp_path)
    assert [cell.name for cell in report.cells] == ["nominal", "pose", "friction"]
    assert [len(cell.seeds) for cell in report.cells] == [20, 6, 6]
    assert report.nominal.seeds == tuple(range(9_000_000, 9_000_020))
    assert report.cells[1].seeds == report.nominal.seeds[:6]  # the same starts
    # Counted another way: the untrained mean policy, one episode at a time.
    policy = GaussianPolicy()
    for seed, success, length in zip(report.nominal.seeds, report.nominal.success, report.nominal.length, strict=True):
        stats, _ = play(ReachEnv(1), policy, [seed], torch.Generator())
        assert (stats.success.item(), stats.length.item()) == (success, length)
    written = json.loads((tmp_path / "out" / "report.json").read_text())["cells"][0]
    assert written["successes"] == sum(report.nominal.success)
    assert written["interval"] == pytest.approx(wilson_interval(written["successes"], 20, 0.95))
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| nominal | 20 | {report.nominal.success_rate:.1%} |" in table


@dataclass(frozen=True)
class CrashingEmbodiment(ToyEmbodiment):
    """In each cell the simulation crashes in these (call, environment)."""

    crashes: tuple = ()

    def make_env(self, num_envs, device, perturbation=None):
        return ReachEnv(num_envs, self.episode_steps, crashes=self.crashes if num_envs == 8 else ())


def test_lost_episodes_are_played_again_with_the_same_outcome_or_the_sweep_fails(tmp_path, caplog):
    undisturbed = sweep(tmp_path / "a", evaluation__videos=0)
    running = [length > 2 for length in undisturbed.nominal.length[:8]].index(True)
    embodiment = CrashingEmbodiment(crashes=((2, running),))
    report = sweep(tmp_path / "b", evaluation__videos=0, embodiment=embodiment)
    assert report.as_json() == undisturbed.as_json()
    assert f"crashed in the episodes of seeds [{9_000_000 + running}]" in caplog.text
    always = CrashingEmbodiment(crashes=tuple((call, running) for call in range(1, 20)))
    with pytest.raises(SimulationError, match=rf"crashed twice .* \[{9_000_000 + running}\]"):
        sweep(tmp_path / "c", evaluation__videos=0, embodiment=always)


def test_videos_show_the_first_episodes_with_their_outcome(tmp_path):
    import imageio.v3 as iio

    report = sweep(tmp_path)
    videos = sorted((tmp_path / "out" / "videos").glob("*.mp4"))
    assert len(videos) == 6
    for seed, success, length in list(
        zip(report.nominal.seeds, report.nominal.success, report.nominal.length, strict=True)
    )[:2]:
        path = tmp_path / "out" / "videos" / f"nominal_{seed}_{'success' if success else 'failure'}.mp4"
        frames = iio.imread(path, plugin="pyav")
        assert frames.shape == (length + 1, 380, 480, 3)  # 16 x 12 enlarged 30 times, and the caption's 20 rows
        assert iio.immeta(path, plugin="pyav")["fps"] == 10
        # The picture's grey level is the distance to the goal.
        start = ReachEnv(1)
        expected = start.reset([seed]).rgb["camera"][0, 0, 0, 0].item()
        assert abs(float(frames[0, 100:300].mean()) - expected) < 6


def test_a_film_is_the_episode_that_was_measured():
    policy = GaussianPolicy()
    stats, actions = play(ReachEnv(8), policy, range(8), torch.Generator().manual_seed(1))
    films, success = film(ReachEnv(3), range(3), actions[:3])
    assert torch.equal(success, stats.success[:3])
    assert [len(pictures) for pictures in films] == [int(length) + 1 for length in stats.length[:3]]


def test_videos_cost_no_picture_where_episodes_are_measured_and_change_no_result(tmp_path, monkeypatch):
    calls = []
    step = ReachEnv.step_chunk

    def counting(self, actions):
        calls.append((self.num_envs, actions.shape[1]))
        return step(self, actions)

    monkeypatch.setattr(ReachEnv, "step_chunk", counting)
    plain = sweep(tmp_path / "plain", evaluation__videos=0).as_json()
    measured, calls[:] = calls.copy(), []
    assert sweep(tmp_path / "filmed").as_json() == plain
    wide = [call for call in calls if call[0] != 2]
    assert wide == measured
    assert {horizon for _, horizon in wide} == {2}
    assert {call for call in calls if call[0] == 2} == {(2, 1)}


def test_a_replay_that_ends_otherwise_is_said(tmp_path, monkeypatch, caplog):
    replay = evaluation.film
    monkeypatch.setattr(evaluation, "film", lambda *given: (lambda films, success: (films, ~success))(*replay(*given)))
    sweep(tmp_path)
    assert "nominal: of the filmed episodes [9000000, 9000001] some ended otherwise" in caplog.text


def test_agreement_with_real_results(tmp_path):
    real = tmp_path / "real.json"
    entries = [
        {"name": "nominal", "successes": 9, "trials": 20},
        {"name": "other policy", "successes": 18, "trials": 20, "sim_successes": 95, "sim_trials": 100},
        {"name": "worst policy", "successes": 1, "trials": 20, "sim_successes": 0, "sim_trials": 100},
    ]
    real.write_text(json.dumps(entries))
    report = sweep(tmp_path, real=real, evaluation__episodes_per_perturbation=0)
    assert [cell.name for cell in report.cells] == ["nominal"]
    agreement = report.agreement
    assert agreement.sim == pytest.approx((report.nominal.success_rate, 0.95, 0.0))
    value, low, high = agreement.statistics["pearson"]
    assert low <= value <= high and value > 0.9
    assert "- mmrv: 0.000" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "must be a list"),
        ('[{"successes": 1, "trials": 2}]', "entry 0 has no name"),
        ('[{"name": "nominal", "successes": 3, "trials": 2}]', "given 3 and 2"),
        ('[{"name": "nominal", "successes": 1, "trials": 2}]', "at least 3 entries"),
        ('[{"name": "a", "successes": 1, "trials": 2}, {"name": "b", "successes": 1, "trials": 2}, '
         '{"name": "c", "successes": 1, "trials": 2}]', r"'a' is no cell of this report \(nominal\)"),
    ],
)  # fmt: skip
def test_unusable_real_results_are_refused_with_the_reason(tmp_path, content, message):
    real = tmp_path / "real.json"
    real.write_text(content)
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, real=real, evaluation__episodes_per_perturbation=0, evaluation__videos=0)
