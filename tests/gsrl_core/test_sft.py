import dataclasses
import math

import numpy as np
import pytest
import torch

import gsrl_core.sft as sft_module
from gsrl_core.errors import CheckpointError, TrainingError
from gsrl_core.interfaces import NullReporter, Observation
from gsrl_core.policy import config as sizes
from gsrl_core.policy.checkpoint import load_policy, read_norm_stats
from gsrl_core.policy.demonstrations import Episode, write_shard
from gsrl_core.sections import SftConfig
from gsrl_core.sft import learning_rate, train_sft

TINY = sizes.Pi05Config(
    image_size=16, patch_size=8, vision_width=16, vision_depth=1, vision_heads=2, vision_mlp=16,
    width=16, depth=1, mlp=16, heads=2, kv_heads=1, head_dim=8, expert_width=32, expert_mlp=32,
    vocab_size=512, action_dim=8, horizon=2, max_token_len=48, value_hidden=(8,), noise_hidden=(8,),
)  # fmt: skip
SETTINGS = {"batch_size": 16, "warmup_steps": 5, "checkpoint_every": 4, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setattr(sizes, "PRESETS", {**sizes.PRESETS, "pi05_tiny": TINY})


@pytest.fixture
def demos(tmp_path):
    """The action is +-0.05 on x: plus where the picture is white, minus where it is black."""
    rng = np.random.default_rng(0)
    episodes = []
    for seed in range(24):
        bright = seed % 2
        rgb = np.full((6, 12, 16, 3), 255 * bright, np.uint8)
        action = rng.normal(0, 0.001, (6, 7)).astype(np.float32)
        action[:, 0] = 0.05 if bright else -0.05
        episodes.append(Episode(seed, "pick up the cube", {"camera": rgb}, rng.normal(size=(6, 9)), action))
    write_shard(tmp_path / "demos", 0, episodes)
    return tmp_path / "demos"


class Recorder(NullReporter):
    def __init__(self):
        self.values = {}

    def metrics(self, values, step):
        self.values[step] = self.values.get(step, {}) | dict(values)


def run(demos, out, steps, reporter=None, init=None, **changes):
    config = SftConfig(steps=steps, **(SETTINGS | changes))
    return train_sft(demos, out, init, "pi05_tiny", config, device="cpu", reporter=reporter or NullReporter())


def weights(folder):
    return load_policy(folder, denoise_steps=2, action_chunk=2).network.state_dict()


def test_learns_to_act_on_what_it_sees(demos, tmp_path):
    recorder = Recorder()
    facts = run(demos, tmp_path / "out", 400, recorder, ema_decay=0.9)
    first, last = recorder.values[100]["sft/loss"], recorder.values[400]["sft/loss"]
    assert last < 0.7 * first
    assert facts["held_out_loss"] == pytest.approx(last, abs=0.3)
    policy = load_policy(tmp_path / "out", denoise_steps=10, action_chunk=2)
    rgb = torch.zeros(20, 12, 16, 3, dtype=torch.uint8)
    rgb[10:] = 255
    observation = Observation({"camera": rgb}, torch.zeros(20, 9), ("pick up the cube",) * 20)
    x = policy.act(observation, torch.Generator().manual_seed(0), explore=False).actions[:, :, 0]
    assert x[:10].mean() < -0.03
    assert x[10:].mean() > 0.03


def test_resumed_run_is_bit_identical(demos, tmp_path, monkeypatch):
    run(demos, tmp_path / "whole", 11)
    original = sft_module._Trainer._train_step

    def dying(self):
        if self.step == 9:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(sft_module._Trainer, "_train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tmp_path / "parts", 11)
    assert not (tmp_path / "parts").exists()
    steps = []

    def counting(self):
        steps.append(self.step)
        return original(self)

    monkeypatch.setattr(sft_module._Trainer, "_train_step", counting)
    run(demos, tmp_path / "parts", 11)
    assert steps == [8, 9, 10]
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts.work").exists()


@pytest.fixture
def half_done(demos, tmp_path, monkeypatch):
    """A run killed after its last step, whose state is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(sft_module, "write_checkpoint", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(demos, tmp_path / "out", 4)
    return tmp_path / "out"


def test_workspace_of_other_settings_is_refused(demos, half_done):
    with pytest.raises(TrainingError, match=r"other settings or inputs \(config\)"):
        run(demos, half_done, 8)


def test_workspace_of_another_start_is_refused(demos, half_done, tmp_path):
    run(demos, tmp_path / "start", 1)
    with pytest.raises(TrainingError, match=r"other settings or inputs \(init\)"):
        run(demos, half_done, 4, init=tmp_path / "start")


def test_workspace_of_other_demonstrations_is_refused_although_they_are_as_many(demos, half_done):
    path = demos / "shard-0000000000" / "action.npy"
    np.save(path, -np.load(path))
    with pytest.raises(TrainingError, match=r"other settings or inputs \(demos\)"):
        run(demos, half_done, 4)


@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_a_torn_state_starts_anew_and_says_so(demos, half_done, tmp_path, caplog, content):
    run(demos, tmp_path / "whole", 4)
    state = half_done.with_name("out.work") / "state.pt"
    state.write_bytes(state.read_bytes()[:5000] if content is None else content)
    run(demos, half_done, 4)
    assert "starts anew" in caplog.text
    whole, again = weights(tmp_path / "whole"), weights(half_done)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_too_few_episodes_hold_none_out_and_claim_nothing(demos, tmp_path):
    shard = demos / "shard-0000000000"
    for name in ("seed", "state", "action", "rgb.camera"):
        np.save(shard / f"{name}.npy", np.load(shard / f"{name}.npy")[: 19 * 6])
    recorder = Recorder()
    facts = run(demos, tmp_path / "out", 2, recorder)
    assert (facts["episodes"], facts["held_out_loss"]) == (19, None)
    assert not any("sft/held_out_loss" in values for values in recorder.values.values())
    assert "too few episodes to hold any out" in (tmp_path / "out" / "README.md").read_text()


def test_seed_decides(demos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(demos, tmp_path / name, 3, seed=seed)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["action_in_proj.weight"], c["action_in_proj.weight"])


def test_average_differs_from_the_last_weights(demos, tmp_path):
    run(demos, tmp_path / "averaged", 20, ema_decay=0.99)
    run(demos, tmp_path / "last", 20, ema_decay=0.0)
    averaged, last = weights(tmp_path / "averaged"), weights(tmp_path / "last")
    assert not torch.equal(averaged["action_out_proj.weight"], last["action_out_proj.weight"])


def test_augmentation_and_precision_act(demos, tmp_path):
    run(demos, tmp_path / "plain", 3, image_augmentation=False)
    run(demos, tmp_path / "augmented", 3)
    run(demos, tmp_path / "rounded", 3, image_augmentation=False, precision="bfloat16")
    plain, augmented, rounded = (weights(tmp_path / name) for name in ("plain", "augmented", "rounded"))
    name = "action_out_proj.weight"
    assert not torch.equal(plain[name], augmented[name])
    assert not torch.equal(plain[name], rounded[name])


def test_further_training_keeps_statistics_and_continues(demos, tmp_path):
    recorder = Recorder()
    run(demos, tmp_path / "first", 200, recorder, ema_decay=0.9)
    again = Recorder()
    run(demos, tmp_path / "second", 100, again, init=tmp_path / "first", ema_decay=0.9, warmup_steps=0)
    assert again.values[100]["sft/loss"] < recorder.values[100]["sft/loss"]
    first, second = read_norm_stats(tmp_path / "first"), read_norm_stats(tmp_path / "second")
    assert all(torch.equal(a.q99, b.q99) for a, b in zip(first, second, strict=True))


def test_learning_rate_schedule():
    config = SftConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(110, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    short = SftConfig(steps=20, decay_steps=110, warmup_steps=10, learning_rate=1.0)
    assert [learning_rate(step, short) for step in (15, 60, 200)] == [
        *(learning_rate(s, config) for s in (15, 60)),
        0.1,
    ]


def test_model_card_tells_command_and_settings(demos, tmp_path):
    config = SftConfig(steps=2, **SETTINGS)
    train_sft(
        demos, tmp_path / "out", None, "pi05_tiny", config, device="cpu", reporter=NullReporter(), command="make it"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "    make it\n" in card
    assert "24 scripted demonstrations (144 frames" in card
    assert "- learning_rate: 0.003" in card


def test_large_model_needs_a_checkpoint(demos, tmp_path):
    config = SftConfig(steps=2)
    with pytest.raises(CheckpointError, match="give a checkpoint to start from"):
        train_sft(demos, tmp_path / "out", None, "pi05", config, device="cpu", reporter=NullReporter())
    with pytest.raises(CheckpointError, match="unknown model 'pi06'; allowed: pi05, pi05_tiny, pi05_small"):
        train_sft(demos, tmp_path / "out", None, "pi06", config, device="cpu", reporter=NullReporter())


def test_diverged_training_stops(demos, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_module._Trainer, "_train_step", lambda self: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="loss is not finite at step 2"):
        run(demos, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_small_starts_from_random_weights_with_the_tiny_tokenizer(demos, tmp_path, monkeypatch):
    sized = dataclasses.replace(TINY, width=24)
    monkeypatch.setattr(sizes, "PRESETS", {**sizes.PRESETS, "pi05_small": sized})
    config = SftConfig(steps=1, **SETTINGS)
    train_sft(demos, tmp_path / "out", None, "pi05_small", config, device="cpu", reporter=NullReporter())
    policy = load_policy(tmp_path / "out", denoise_steps=2, action_chunk=2)
    assert policy.network.config == sized
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sft_module.TINY_TOKENIZER.read_bytes()


def test_training_step_leaves_nothing_on_the_host(demos, tmp_path):
    # The meta device refuses to mix with host tensors, as CUDA does.
    config = SftConfig(steps=2, **SETTINGS)
    demonstrations = sft_module.load_demonstrations(demos)
    parts = sft_module._start(None, "pi05_tiny", config, demonstrations, "cpu")
    normalizers = sft_module.Normalizer(parts.state_stats), sft_module.Normalizer(parts.action_stats)
    frames = sft_module.FrameSet.build(demonstrations, TINY, parts.tokenizer, normalizers, "cpu")
    images = {slot: image.to("meta") for slot, image in frames.images.items()}
    frames = dataclasses.replace(frames, images=images)
    split = sft_module.split_rows(demonstrations)
    trainer = sft_module._Trainer(
        parts.network.to("meta"), frames, split, config, tmp_path / "work", NullReporter(), {}
    )
    assert trainer._train_step().device.type == "meta"
