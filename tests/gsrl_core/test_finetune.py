import json
import sys
from pathlib import Path

import pytest
import torch

from gsrl_core import config as configuration
from gsrl_core.artifacts import write_json
from gsrl_core.dist.workers import start_ray, stop_ray
from gsrl_core.errors import ConfigError, PlacementError, TrainingError
from gsrl_core.finetune import finetune
from gsrl_core.interfaces import NullReporter

RL_TESTS = str(Path(__file__).parent / "rl")
sys.path.insert(0, RL_TESTS)
from toy import ToyEmbodiment  # noqa: E402

OVERRIDES = {
    "sim.num_envs": 16, "sim.max_episode_steps": 8, "policy.action_chunk": 2, "ppo.iterations": 4,
    "ppo.rollout_epochs": 2, "ppo.global_batch": 64, "ppo.micro_batch": 64, "ppo.checkpoint_every": 2,
    "ppo.learning_rate": 3e-3, "ppo.value_learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture
def ray_finds_toy(monkeypatch):
    # One cluster for all runs of a test: starting Ray costs far more than they do.
    monkeypatch.setenv("PYTHONPATH", RL_TESTS)
    assert start_ray()
    yield
    assert not start_ray(), "a run left the cluster that its caller had joined"
    stop_ray()


class Recorder(NullReporter):
    def __init__(self, stop_after=None):
        self.steps, self.values, self.fractions, self.stop_after = [], [], [], stop_after

    def metrics(self, values, step):
        self.steps.append(step)
        self.values.append(dict(values))
        if step == self.stop_after:
            raise KeyboardInterrupt

    def progress(self, fraction, message):
        self.fractions.append(fraction)


def run(folder, reporter=None, embodiment=None, workspace="work", **overrides):
    """Fine-tune the toy; keyword ppo__iterations=2 stands for the key ppo.iterations."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    config = configuration.load("laptop", OVERRIDES | keys)
    inputs = [folder.parent / "start", folder.parent / "scene"]
    out = folder / "out"
    facts = finetune(
        *inputs, out, folder / workspace, config, reporter or NullReporter(), embodiment=embodiment or ToyEmbodiment()
    )
    history = json.loads((out / "training.json").read_text())["history"]
    return facts, history, torch.load(out / "policy.pt")


def timeless(history):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in history]


def test_a_run_leaves_policy_history_curve_and_events(tmp_path):
    reporter = Recorder()
    facts, history, _ = run(tmp_path / "a", reporter, ppo__eval_every=2)
    assert facts["iterations"] == 4 and facts["episodes"] == 4 * 2 * 16
    assert reporter.steps == [1, 2, 3, 4] and reporter.fractions[-1] == 1
    for name in ("actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac",
                 "actor/value_clip_ratio", "rollout/returns_mean", "rollout/advantages_mean", "env/episode_len",
                 "env/success_once", "time/step"):  # fmt: skip
        assert all(name in row for row in history)
    assert ["eval/success_once" in row for row in history] == [False, True, False, True]
    out = tmp_path / "a" / "out"
    assert (out / "learning_curve.png").stat().st_size > 1000
    assert len((out / "training.csv").read_text().splitlines()) == 5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("env/success_once")]
    assert written == pytest.approx([row["env/success_once"] for row in history])


def test_a_killed_run_resumes_to_the_numbers_of_an_uninterrupted_one(tmp_path):
    _, whole, weights = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Recorder(stop_after=3))  # after the checkpoint of iteration 2
    reporter = Recorder()
    _, resumed, resumed_weights = run(tmp_path / "killed", reporter)
    assert reporter.steps == [1, 2, 3, 4]  # what the killed process reported went to another MLflow run
    assert reporter.values == resumed
    assert reporter.fractions == [0.75, 1.0]
    assert timeless(resumed) == timeless(whole)
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_the_levels_of_log_prob_and_entropy_reach_the_policy(tmp_path):
    runs = {}
    for name, levels in {"seed": {}, "action": {"ppo__logprob_level": "action", "ppo__entropy_level": "chunk"}}.items():
        _, history, _ = run(tmp_path / name, ppo__iterations=1, **levels)
        runs[name] = history[0]
    # The toy's chunk has two actions of one entry each.
    assert runs["action"]["actor/entropy"] == pytest.approx(2 * runs["seed"]["actor/entropy"], rel=1e-2)
    assert runs["action"]["actor/pg_clipfrac"] != runs["seed"]["actor/pg_clipfrac"]


def test_more_iterations_continue_a_finished_run(tmp_path):
    run(tmp_path / "a", ppo__iterations=2)
    _, history, _ = run(tmp_path / "a", ppo__iterations=3)
    _, direct, _ = run(tmp_path / "b", ppo__iterations=3)
    assert timeless(history) == timeless(direct)


def test_a_cosine_has_the_length_that_it_was_begun_with_and_resumes_in_its_place(tmp_path):
    schedule = {"ppo__lr_schedule": "cosine", "ppo__warmup_steps": 4}
    _, whole, _ = run(tmp_path / "whole", **schedule)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Recorder(stop_after=3), **schedule)
    _, resumed, _ = run(tmp_path / "killed", **schedule)
    assert timeless(resumed) == timeless(whole)
    assert [row["actor/learning_rate"] for row in whole][2:] == pytest.approx([3e-3 * 0.5, 3e-3 * 0.1464466], rel=1e-5)
    with pytest.raises(TrainingError, match="another checkpoint, scene or settings"):
        run(tmp_path / "killed", ppo__iterations=5, **schedule)


def test_a_workspace_of_other_settings_is_refused_and_a_torn_one_begun_anew(tmp_path, caplog):
    run(tmp_path / "a", ppo__iterations=2)
    with pytest.raises(TrainingError, match="another checkpoint, scene or settings"):
        run(tmp_path / "a", ppo__learning_rate=1e-3)
    with pytest.raises(TrainingError, match="another checkpoint, scene or settings"):
        run(tmp_path / "a", cluster__pipeline_stage_num=2)  # another order of the noise
    with pytest.raises(TrainingError, match="already at iteration 2"):
        run(tmp_path / "a", ppo__iterations=1)
    (tmp_path / "start").mkdir()
    write_json(tmp_path / "start" / "config.json", {})
    with pytest.raises(TrainingError, match="another checkpoint"):
        run(tmp_path / "a")
    (tmp_path / "a" / "work" / "checkpoint.pt").write_bytes(b"half")
    run(tmp_path / "a", ppo__iterations=1)
    assert "checkpoint.pt cannot be read" in caplog.text


def test_training_never_touches_evaluation_seeds(tmp_path):
    with pytest.raises(ConfigError, match="overlap training seeds"):
        run(tmp_path / "a", evaluation__seed=142_000_000)
    with pytest.raises(ConfigError, match="overlap validation seeds"):
        run(tmp_path / "a", evaluation__seed=90_000_000 - 10)


def test_pipeline_stages_train_too_and_local_runs_refuse_several_processes(tmp_path):
    facts, _, _ = run(tmp_path / "a", cluster__pipeline_stage_num=2)
    assert facts["iterations"] == 4
    with pytest.raises(PlacementError, match="'local' is one process"):
        run(tmp_path / "b", cluster__component_placement={"env,rollout,actor": "0:0-1"})


def test_two_ray_actors_make_the_updates_of_one_process_on_the_union(tmp_path, ray_finds_toy):
    ray = {"cluster__runtime": "ray", "ppo__iterations": 2, "ppo__logprob_level": "action"}
    _, two, two_weights = run(tmp_path / "two", cluster__component_placement={"env,rollout,actor": "0:0-1"}, **ray)
    # The same two collectors (same seeds and noise), but one learner elsewhere: episodes and weights travel. One
    # collector dies in the second iteration and must come back with the weights that were learned meanwhile.
    token = tmp_path / "died"
    split = {"env,rollout": "0:0-1", "actor": "0"}
    _, one, one_weights = run(
        tmp_path / "one",
        embodiment=ToyEmbodiment(die_at=10, token=str(token)),
        cluster__component_placement=split,
        **ray,
    )
    assert token.exists()
    for ours, theirs in zip(timeless(two), timeless(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for name, weight in two_weights.items():
        assert torch.allclose(weight, one_weights[name], atol=1e-5)


def test_sharded_learners_beside_collectors_make_the_same_updates_and_resume_whole_ones(tmp_path, ray_finds_toy):
    ray = {"cluster__runtime": "ray", "cluster__component_placement": {"env,rollout,actor": "0:0-1"}}
    _, whole, weights = run(tmp_path / "whole", ppo__iterations=3, **ray)
    # Two iterations with whole weights, the third with sharded ones.
    run(tmp_path / "sharded", ppo__iterations=2, **ray)
    _, resumed, sharded_weights = run(tmp_path / "sharded", ppo__iterations=3, cluster__data_parallel="fsdp2", **ray)
    for ours, theirs in zip(timeless(resumed), timeless(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(weight, sharded_weights[name], atol=1e-5)
    state = torch.load(tmp_path / "sharded" / "work" / "checkpoint.pt", weights_only=False)["state"]
    assert all(type(tensor) is torch.Tensor for group in state["parameters"].values() for tensor in group)
    with pytest.raises(PlacementError, match="among actor processes; one is placed"):
        run(
            tmp_path / "one",
            cluster__runtime="ray",
            cluster__data_parallel="fsdp2",
            cluster__component_placement={"env,rollout": "0:0-1", "actor": "0"},
        )
