import json

import numpy as np
import pytest
import torch

from gsrl_core.config import load
from gsrl_core.demos import collect_demos, play, record_demos
from gsrl_core.errors import ConfigError, SimulationError, TrainingError
from gsrl_core.interfaces import NullReporter, Observation, Step
from gsrl_core.policy.demonstrations import load_demonstrations


class LineEnv:
    """Drive x to zero by the first action entry; odd seeds cannot succeed. The picture shows the step count."""

    action_dim, control_hz, max_episode_steps = 7, 10.0, 12

    def __init__(self, num_envs, crashes=0):
        self.num_envs = num_envs
        self.crashes = crashes
        """In so many batches the first environment's simulation crashes in the third step."""
        self.executed = []

    def reset(self, seeds):
        self.seeds, self.count = torch.tensor(list(seeds)), 0
        self.x = 0.1 + 0.01 * (self.seeds % 7).float()
        self.done = torch.zeros(self.num_envs, dtype=torch.bool)
        self.lost = self.done.clone()
        return self._observe()

    def privileged(self):
        return {"x": self.x.clone()}

    def step_chunk(self, actions):
        self.executed.append(actions.clone())
        self.x = torch.where(self.done, self.x, self.x + actions[:, 0, 0])
        self.count += 1
        success = (self.x.abs() < 0.02) & (self.seeds % 2 == 0)
        self.done |= success
        truncated = torch.full_like(success, self.count == self.max_episode_steps) & ~self.done
        zero = torch.zeros(self.num_envs)
        if self.count == 3 and self.crashes:
            self.crashes -= 1
            self.lost[0] = True
        truncated |= self.lost
        done = self.done.clone()
        return Step(self._observe(), zero, done, truncated, done, done, zero.long(), self.lost.clone())

    def render_video_frame(self):
        return self._observe().rgb["camera"]

    def close(self):
        pass

    def _observe(self):
        rgb = torch.full((self.num_envs, 4, 6, 3), self.count, dtype=torch.uint8)
        state = torch.cat([self.x[:, None], torch.zeros(self.num_envs, 8)], dim=1)
        return Observation({"camera": rgb}, state, ("go to zero",) * self.num_envs)


def expert(state):
    action = torch.zeros(len(state["x"]), 7)
    action[:, 0] = (-state["x"]).clamp(-0.02, 0.02)
    action[:, 6] = 1.0
    return action


def config(**overrides):
    return load("laptop", {"demos.episodes": 6, "demos.seed": 10, "sim.num_envs": 4} | overrides)


def test_clean_actions_are_recorded_and_disturbed_ones_executed():
    env = LineEnv(2)
    (episode,) = play(env, expert, [10, 11], action_noise=0.005)
    assert episode.seed == 10
    assert episode.instruction == "go to zero"
    for state, action in zip(episode.state, episode.action, strict=True):
        np.testing.assert_allclose(action[0], np.clip(-state[0], -0.02, 0.02), atol=1e-7)
    executed = torch.stack(env.executed)[: len(episode.action), 0, 0].numpy()
    difference = executed - episode.action
    assert np.abs(difference[:, :3]).max() > 1e-3
    assert not difference[:, 3:].any()
    # Row i is the picture from which action i was chosen.
    assert [int(frame[0, 0, 0]) for frame in episode.rgb["camera"]] == list(range(len(episode.action)))


def test_recording_stops_when_the_episode_ends():
    short, long = play(LineEnv(2), expert, [14, 20], action_noise=0.0)  # x = 0.10 and 0.16
    assert len(short.action) == 5
    assert len(long.action) == 8


def test_disturbance_depends_on_the_seed_alone():
    (alone,) = play(LineEnv(1), expert, [12], action_noise=0.004)
    among = [e for e in play(LineEnv(3), expert, [10, 12, 14], action_noise=0.004) if e.seed == 12]
    np.testing.assert_array_equal(alone.state, among[0].state)


def test_a_batch_in_which_the_physics_crashed_is_played_again():
    alone = play(LineEnv(2), expert, [10, 12], action_noise=0.004)
    again = play(LineEnv(2, crashes=1), expert, [10, 12], action_noise=0.004)
    assert [episode.seed for episode in again] == [10, 12]
    np.testing.assert_array_equal(again[0].state, alone[0].state)
    with pytest.raises(SimulationError, match=r"seeds \[10\], again"):
        play(LineEnv(2, crashes=2), expert, [10, 12], action_noise=0.004)


def test_facts_count_attempts_and_successes(tmp_path):
    facts = record_demos(LineEnv(4), expert, tmp_path, config(), NullReporter())
    # Seeds 10..15, of which the even ones succeed; the second batch reaches beyond the range and is cut.
    assert (facts["attempts"], facts["successes"]) == (6, 3)
    assert facts["success_rate"] == pytest.approx(0.5)
    recorded = load_demonstrations(tmp_path)
    assert sorted(set(recorded.seed.tolist())) == [10, 12, 14]
    assert facts["frames"] == len(recorded)
    assert json.loads((tmp_path / "demos.json").read_text()) == facts


def test_interrupted_collection_continues(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    record_demos(LineEnv(4), expert, whole, config(), NullReporter())

    class Dying(LineEnv):
        def reset(self, seeds):
            if seeds[0] > 10:
                raise KeyboardInterrupt
            return super().reset(seeds)

    with pytest.raises(KeyboardInterrupt):
        record_demos(Dying(4), expert, parts, config(), NullReporter())
    assert not (parts / "demos.json").exists()
    resumed = LineEnv(4)
    record_demos(resumed, expert, parts, config(), NullReporter())
    assert resumed.seeds.tolist() == [14, 15, 16, 17]
    assert torch.equal(load_demonstrations(whole).action, load_demonstrations(parts).action)


def test_other_settings_do_not_mix(tmp_path):
    record_demos(LineEnv(4), expert, tmp_path, config(), NullReporter())
    with pytest.raises(TrainingError, match="other settings"):
        record_demos(LineEnv(4), expert, tmp_path, config(**{"demos.action_noise": 0.02}), NullReporter())


def test_another_scene_does_not_mix(tmp_path):
    record_demos(LineEnv(4), expert, tmp_path, config(), NullReporter(), scene="one")
    record_demos(LineEnv(4), expert, tmp_path, config(), NullReporter(), scene="one")
    with pytest.raises(TrainingError, match="another scene"):
        record_demos(LineEnv(4), expert, tmp_path, config(), NullReporter(), scene="two")


def test_no_success_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="no episode"):
        record_demos(LineEnv(4), lambda state: torch.zeros(4, 7), tmp_path, config(), NullReporter())


def test_control_modes_that_the_expert_does_not_speak_are_refused_before_anything_else(tmp_path):
    other = config(**{"sim.control_mode": "pd_joint_pos"})
    with pytest.raises(ConfigError, match="'pd_joint_pos'; the scripted expert speaks pd_ee_target_delta_pose only"):
        collect_demos(tmp_path / "no scene", tmp_path / "out", other, NullReporter())
