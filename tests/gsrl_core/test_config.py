"""Presets expand, overrides are checked against the whole, and every refusal names what is legal."""

import pytest
import yaml

from gsrl_core import config
from gsrl_core.errors import ConfigError
from gsrl_core.sections import PipelineConfig


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_preset_is_valid_and_only_full_has_no_base(preset):
    assert isinstance(config.load(preset), PipelineConfig)
    differences = yaml.safe_load((config.config_dir() / f"{preset.replace('-', '_')}.yaml").read_text())
    assert ("base" in differences) == (preset != "full")


def test_full_is_the_seeds_recipe():
    full = config.load("full")
    decisions = full.sim.max_episode_steps // full.policy.action_chunk
    assert full.sim.num_envs * full.ppo.rollout_epochs * decisions == 10_240
    assert (full.sim.sim_hz, full.sim.control_hz, full.policy.noise_level) == (500, 10, 0.5)


def test_the_entropy_has_a_weight_where_the_noise_is_learned():
    changed = config.load("laptop", {"ppo.entropy_coef": 0.005, "policy.noise_method": "flow_noise"})
    assert changed.ppo.entropy_coef == 0.005


def test_override_replaces_one_value_only():
    changed = config.load("laptop", {"ppo.learning_rate": 1e-6})
    assert changed.ppo.learning_rate == 1e-6
    assert changed.model_copy(update={"ppo": config.load("laptop").ppo}) == config.load("laptop")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"ppo.learnin_rate": 1e-5}, "did you mean ppo.learning_rate"),
        ({"ppo": {}}, "unknown key 'ppo'"),
        ({"nothing.here": 1}, "unknown key 'nothing.here'"),
        ({"ppo.learning_rate.x": 1}, "unknown key"),
        ({"ppo.learning_rate": -1}, "ppo.learning_rate: Input should be greater than 0 (given: -1)"),
        ({"ppo.iterations": "many"}, "ppo.iterations"),
        ({"ppo.micro_batch": 100}, "must be a multiple of ppo.micro_batch"),
        ({"policy.action_chunk": 7}, "must be a multiple of policy.action_chunk"),
        ({"sim.sim_hz": 501}, "must be a multiple of control_hz"),
        ({"assets.capture": ""}, "assets.capture: String should have at least 1 character"),
        ({"assets.gsenv": ""}, "assets.gsenv: String should have at least 1 character"),
        ({"policy.checkpoint": ""}, "policy.checkpoint: String should have at least 1 character"),
        ({"policy.noise_std_range": [0.0, 0.1]}, "must be two numbers with 0 < low <= high"),
        ({"policy.noise_std_range": [0.2, 0.1]}, "must be two numbers with 0 < low <= high"),
        ({"policy.noise_std_range": [0.1, float("inf")]}, "must be two numbers with 0 < low <= high"),
        ({"policy.sha256": "abc"}, "policy.sha256: String should match pattern"),
        ({"sim.realism.exposure_rang": [1, 2]}, "did you mean sim.realism.exposure_range"),
        ({"sim.realism.exposure_range": [1.5, 0.5]}, "exposure_range (1.5, 0.5) must be two numbers"),
        ({"sim.realism.gamma_range": [0, 1]}, "0.1 <= low"),
        ({"sim.control_mode": "nonsense"}, "sim.control_mode: Input should be 'pd_ee_target_delta_pose'"),
        ({"sim.cameras": []}, "sim.cameras"),
        ({"sim.cameras": [{"name": "a"}, {"name": "a"}]}, "every name only once"),
        ({"sim.instruction": ""}, "sim.instruction: String should have at least 1 character"),
        ({"evaluation.perturbations": ["pose", "pose"]}, "every one only once"),
        ({"ppo.entropy_coef": 0.01, "policy.noise_method": "flow_sde"}, "nothing with policy.noise_method flow_sde"),
        ({"ppo.logprob_level": "tokens"}, "ppo.logprob_level: Input should be 'chunk', 'action' or 'token'"),
        ({"cluster.data_parallel": "fsdp2"}, "set cluster.runtime to ray"),
        ({"cluster.pipeline_stage_num": 7}, "must be a multiple of cluster.pipeline_stage_num"),
    ],
)
def test_bad_override_is_refused_with_the_reason(overrides, said):
    with pytest.raises(ConfigError) as refusal:
        config.load("laptop", overrides)
    assert said in str(refusal.value)


def test_a_broken_relation_is_one_short_line_that_names_key_and_values():
    with pytest.raises(ConfigError) as refusal:
        config.load("laptop", {"sim.sim_hz": 101})
    assert str(refusal.value) == "the overrides: sim: sim_hz (101) must be a multiple of control_hz (10)"


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean laptop"):
        config.load("laptob")


def test_assignments_are_yaml_and_checked_as_what_their_key_is():
    texts = [
        "ppo.learning_rate=1e-5",
        "fit.steps=2e4",
        "ppo.target_kl=null",
        "assets.capture=./photos",
        "assets.revision='1234567'",
    ]
    loaded = config.load("laptop", config.parse_assignments(texts))
    assert (loaded.ppo.learning_rate, loaded.fit.steps, loaded.ppo.target_kl) == (1e-5, 20_000, None)
    assert (loaded.assets.capture, loaded.assets.revision) == ("./photos", "1234567")


@pytest.mark.parametrize("text", ["ppo.learning_rate", "=3", "ppo.seed=[1"])
def test_malformed_assignment_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        config.parse_assignments([text])


def test_deployment_parameters_are_plain_json_and_round_trip():
    parameters = config.as_parameters("one-gpu")
    assert PipelineConfig.model_validate(parameters["config"]) == config.load("one-gpu")


def test_sections_are_frozen_and_closed():
    with pytest.raises(Exception, match="frozen"):
        config.load("laptop").ppo.seed = 3  # type: ignore[misc]
    with pytest.raises(ConfigError, match="camera"):
        config.load("laptop", {"sim.cameras": [{"name": "a", "camera": 1}]})


@pytest.mark.parametrize("section", ["fit", "demos", "sft", "ppo", "evaluation"])
def test_seeds_are_those_that_every_library_takes(section):
    for good in (0, 2**31 - 1):
        assert getattr(config.load("laptop", {f"{section}.seed": good}), section).seed == good
    for bad in (-1, 2**31):
        with pytest.raises(ConfigError, match=rf"{section}\.seed: Input should be"):
            config.load("laptop", {f"{section}.seed": bad})
