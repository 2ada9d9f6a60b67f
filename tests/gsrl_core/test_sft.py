import dataclasses
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gsrl_core.sft as sft_module
from gsrl_core.errors import CheckpointError, TrainingError
from gsrl_core.interfaces import NullReporter, Observation
from gsrl_core.policy import config as sizes
from gsrl_core.policy import sft_trainer
from gsrl_core.policy.checkpoint import load_policy, read_norm_stats, write_checkpoint
from gsrl_core.policy.demonstrations import Episode, write_shard
from gsrl_core.policy.matching import Batch
from gsrl_core.policy.pi05 import Pi05, initialise
from gsrl_core.policy.sft_trainer import SftTrainer
from gsrl_core.policy.transforms import FieldStats
from gsrl_core.sections import SftConfig
from gsrl_core.sft import train_sft
from gsrl_core.states import load_state

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
    original = SftTrainer._train_step

    def dying(self):
        if self.step == 9:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(SftTrainer, "_train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tmp_path / "parts", 11)
    assert not (tmp_path / "parts").exists()
    steps = []

    def counting(self):
        steps.append(self.step)
        return original(self)

    monkeypatch.setattr(SftTrainer, "_train_step", counting)
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
    with pytest.raises(TrainingError, match=r"other settings or inputs \(config.steps\)"):
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


@pytest.fixture
def nan_in_step_5(monkeypatch):
    """The noise of the fifth step holds a NaN, whenever that step is run while ``on``."""
    cause = SimpleNamespace(on=True)
    original = Batch.draw

    def draw(frames, index, generator, *, augmented):
        batch = original(frames, index, generator, augmented=augmented)
        if cause.on and generator.initial_seed() == 4:
            batch.noise[0, 0, 0] = math.nan
        return batch

    monkeypatch.setattr(Batch, "draw", draw)
    return cause


@pytest.mark.parametrize("checkpoint_every", [2, 3])
@pytest.mark.usefixtures("nan_in_step_5")
def test_not_finite_numbers_stop_with_step_and_tensors_and_leave_a_good_state(demos, tmp_path, checkpoint_every):
    with pytest.raises(TrainingError) as caught:
        run(demos, tmp_path / "out", 12, checkpoint_every=checkpoint_every)
    last_good = {2: 4, 3: 3}[checkpoint_every]
    message = str(caught.value)
    assert message.startswith("not finite in step 5: the loss; the gradients ")
    assert "action_in_proj.weight" in message or "more" in message
    assert f"the state of step {last_good} is kept in {tmp_path / 'out.work'}" in message
    assert not (tmp_path / "out").exists()
    state = load_state(tmp_path / "out.work" / "state.pt", ())
    assert state["step"] == last_good
    tensors = [*state["weights"].values(), *state["average"].values()]
    tensors += [tensor for own in state["optimizer"]["state"].values() for tensor in own.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_a_good_state_resumes_after_the_cause_is_gone(demos, tmp_path, nan_in_step_5):
    with pytest.raises(TrainingError, match="in step 5"):
        run(demos, tmp_path / "out", 8)
    nan_in_step_5.on = False
    run(demos, tmp_path / "out", 8)
    run(demos, tmp_path / "whole", 8)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("nan_in_step_5")
def test_weights_stay_as_they_were_from_the_failed_step_on(demos, tmp_path):
    trainer = make_trainer(demos, tmp_path, steps=9)
    for trainer.step in range(4):
        trainer._train_step()
    before = {name: tensor.clone() for name, tensor in trainer.trained.items()}
    for trainer.step in range(4, 8):
        trainer._train_step()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.trained.items())


def test_a_state_that_is_not_finite_is_never_written(demos, tmp_path):
    trainer = make_trainer(demos, tmp_path, steps=9)
    trainer._train_step()
    trainer._save()
    trainer.step = 1
    trainer.trained["action_out_proj.bias"].data[0] = math.inf
    with pytest.raises(
        TrainingError, match=r"not finite after step 1: weights action_out_proj.bias; the state of step 0"
    ):
        trainer._save()
    state = load_state(trainer._state_path, ())
    assert state["step"] == 0
    assert state["weights"]["action_out_proj.bias"].isfinite().all()


def make_trainer(demos, folder, init=None, device="cpu", **changes):
    config = SftConfig(**({"steps": 2} | SETTINGS | changes))
    demonstrations = sft_module.load_demonstrations(demos)
    parts = sft_module._start(init, "pi05_tiny", config, demonstrations, device)
    frames = sft_module._frames(parts, config, demonstrations, torch.device(device))
    split = sft_module.split_rows(demonstrations)
    return SftTrainer(parts.network, frames, split, config, folder / "work", NullReporter(), {})


def test_micro_batches_give_the_gradients_of_the_batch(demos, tmp_path):
    found = []
    for micro_batch in (None, 4):
        trainer = make_trainer(demos, tmp_path, micro_batch=micro_batch)
        sizes_seen = []
        hook = trainer.network.action_in_proj.register_forward_pre_hook(
            lambda _, inputs, seen=sizes_seen: seen.append(len(inputs[0]))
        )
        loss = trainer._accumulate(3)
        hook.remove()
        found.append((loss, {name: p.grad for name, p in trainer.trained.items() if p.grad is not None}, sizes_seen))
    (whole_loss, whole, one), (parts_loss, parts, four) = found
    assert (one, four) == ([16], [4] * 4)
    torch.testing.assert_close(parts_loss, whole_loss)
    torch.testing.assert_close(parts, whole)
    with pytest.raises(ValueError, match=r"batch_size \(16\) must be a multiple of micro_batch \(5\)"):
        SftConfig(batch_size=16, micro_batch=5)


@pytest.fixture
def base(demos, tmp_path):
    run(demos, tmp_path / "base", 2)
    return tmp_path / "base"


def test_the_expert_alone(demos, base, tmp_path):
    trainer = make_trainer(demos, tmp_path, base, trainable="expert", precision="bfloat16")
    trainer._train_step()
    frozen = {n: p for n, p in trainer.network.named_parameters() if ".paligemma." in n}
    assert set(trainer.average) == set(trainer.trained) == set(trainer.network.trainable_in_ppo())
    assert frozen.keys().isdisjoint(trainer.trained)
    assert all(p.grad is None for p in frozen.values())
    assert len(trainer.optimizer.state) <= len(trainer.trained)
    assert torch.bfloat16 in {p.dtype for p in frozen.values()}
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    run(demos, tmp_path / "out", 3, init=base, trainable="expert")
    before, after = weights(base), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(".paligemma." in name for name in changed)


def test_the_expert_alone_needs_a_start(demos, tmp_path):
    with pytest.raises(CheckpointError, match=r"sft\.trainable is expert.*give a checkpoint to start from"):
        run(demos, tmp_path / "out", 1, trainable="expert")


def test_expert_training_resumes_bit_identically(demos, base, tmp_path, monkeypatch):
    changes = {"init": base, "trainable": "expert", "precision": "bfloat16", "decay_steps": 40}
    run(demos, tmp_path / "whole", 5, **changes)
    run(demos, tmp_path / "parts", 2, **changes)
    run(demos, tmp_path / "parts", 5, **changes)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_with_a_fixed_schedule_can_be_prolonged_to_the_same_curve(demos, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_trainer, "LOG_EVERY", 4)
    whole, parts = Recorder(), Recorder()
    changes = {"decay_steps": 40, "ema_decay": 0.9}
    run(demos, tmp_path / "whole", 20, whole, **changes)
    run(demos, tmp_path / "parts", 10, parts, **changes)
    assert list(parts.values) == [4, 8, 10]
    run(demos, tmp_path / "parts", 20, parts, checkpoint_every=7, gradient_checkpointing=True, **changes)
    assert list(whole.values) == [4, 8, 12, 16, 20]
    for step, values in whole.values.items():
        assert parts.values[step]["sft/loss"] == values["sft/loss"]
        assert parts.values[step]["sft/learning_rate"] == values["sft/learning_rate"]
    assert parts.values[20]["sft/held_out_loss"] == whole.values[20]["sft/held_out_loss"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(TrainingError, match=r"the state of step 20, and sft\.steps is 10"):
        run(demos, tmp_path / "parts", 10, **changes)


def narrower(demos):
    """The same demonstrations by a robot of 8 states and 8 actions."""
    shard = demos / "shard-0000000000"
    state, action = np.load(shard / "state.npy"), np.load(shard / "action.npy")
    np.save(shard / "state.npy", state[:, :8])
    np.save(shard / "action.npy", np.concatenate([action, action[:, :1]], axis=1))


def test_demonstrations_of_another_robot(demos, base, tmp_path):
    narrower(demos)
    with pytest.raises(CheckpointError, match=r"are of 9/7 values .* have 8/8; set sft\.stats to demos"):
        run(demos, tmp_path / "out", 1, init=base)
    run(demos, tmp_path / "out", 1, init=base, stats="demos")
    state, action = read_norm_stats(tmp_path / "out")
    recorded = sft_module.load_demonstrations(demos)
    torch.testing.assert_close(state.q99, FieldStats.of(recorded.state).q99)
    torch.testing.assert_close(action.mean, FieldStats.of(recorded.action).mean)


def train(demos, out, init, **choices):
    config = SftConfig(steps=1, **SETTINGS)
    return train_sft(demos, out, init, "pi05_tiny", config, device="cpu", reporter=NullReporter(), **choices)


def test_a_start_with_several_statistics_and_another_prompt(demos, base, tmp_path):
    assets, choices = base / "assets", {"discrete_state": False, "asset_id": "someone/droid"}
    shutil.copytree(assets / "fr3", assets / "someone" / "droid")
    path = assets / "someone" / "droid" / "norm_stats.json"
    path.write_text(path.read_text().replace('"mean"', '"q01_of_fr3"').replace('"q99"', '"mean"'))
    path.write_text(path.read_text().replace('"q01_of_fr3"', '"q99"'))
    with pytest.raises(CheckpointError, match=r"several norm_stats\.json .*policy\.asset_id"):
        train(demos, tmp_path / "out", base)
    with pytest.raises(CheckpointError, match=r"asset_id is 'libero', but .* has statistics of: fr3, someone/droid"):
        train(demos, tmp_path / "out", base, asset_id="libero")
    train(demos, tmp_path / "out", base, **choices)
    policy = load_policy(tmp_path / "out", denoise_steps=2, action_chunk=2, **choices)
    assert policy.network.config == load_policy(tmp_path / "out", denoise_steps=2, action_chunk=2).network.config
    assert not policy.tokenizer.discrete_state
    read = read_norm_stats(base, asset_id="someone/droid")
    assert all(torch.equal(a.q99, b.q99) for a, b in zip(read_norm_stats(tmp_path / "out"), read, strict=True))


@pytest.mark.parametrize("stats", ["init", "demos"])
def test_a_checkpoint_is_written_for_the_settings_that_made_it(demos, base, tmp_path, stats):
    choices = {"discrete_state": False, "asset_id": "droid"}
    (base / "assets" / "fr3").rename(base / "assets" / "droid")
    config = SftConfig(steps=1, stats=stats, **SETTINGS)
    for init in (base, None):
        train_sft(demos, tmp_path / "out", init, "pi05_tiny", config, device="cpu", reporter=NullReporter(), **choices)
        policy = load_policy(tmp_path / "out", denoise_steps=2, action_chunk=2, asset_id="droid")
        assert not policy.tokenizer.discrete_state
    with pytest.raises(CheckpointError, match="names a folder below assets/"):
        train(demos, tmp_path / "out", None, asset_id="../droid")


@pytest.mark.parametrize("choice", [{"discrete_state": False}, {"asset_id": "droid"}])
def test_workspace_of_another_reading_of_the_start_is_refused(demos, half_done, choice):
    config = SftConfig(steps=4, **SETTINGS)
    with pytest.raises(TrainingError, match=rf"other settings or inputs \(({next(iter(choice))}|frames)\)"):
        train_sft(demos, half_done, None, "pi05_tiny", config, device="cpu", reporter=NullReporter(), **choice)


def test_pi0_learns_with_its_token_of_the_state(demos, tmp_path, monkeypatch):
    sized = dataclasses.replace(TINY, family="pi0", discrete_state=False, normalization="mean_std", action_dim=9)
    network = Pi05(sized)
    initialise(network, 0)
    recorded = sft_module.load_demonstrations(demos)
    stats = FieldStats.of(recorded.state), FieldStats.of(recorded.action)
    write_checkpoint(
        tmp_path / "pi0", network=network, tokenizer=sft_module.TINY_TOKENIZER, state_stats=stats[0],
        action_stats=stats[1], heads={}, carried={}, card="",
    )  # fmt: skip
    recorder = Recorder()
    monkeypatch.setattr(sft_trainer, "LOG_EVERY", 20)
    run(demos, tmp_path / "out", 80, recorder, init=tmp_path / "pi0")
    assert recorder.values[80]["sft/loss"] < 0.85 * recorder.values[20]["sft/loss"]
    before, after = weights(tmp_path / "pi0"), weights(tmp_path / "out")
    assert not torch.equal(before["state_proj.weight"], after["state_proj.weight"])
    assert "# pi0 for" in (tmp_path / "out" / "README.md").read_text()


def test_memory_is_told(demos, tmp_path, caplog):
    caplog.set_level("INFO")
    run(demos, tmp_path / "out", 1)
    assert "memory beside activations [GiB]: weights " in caplog.text
    assert "pictures: cpu" in caplog.text


def test_small_starts_from_random_weights_with_the_tiny_tokenizer(demos, tmp_path, monkeypatch):
    sized = dataclasses.replace(TINY, width=24)
    monkeypatch.setattr(sizes, "PRESETS", {**sizes.PRESETS, "pi05_small": sized})
    config = SftConfig(steps=1, **SETTINGS)
    train_sft(demos, tmp_path / "out", None, "pi05_small", config, device="cpu", reporter=NullReporter())
    policy = load_policy(tmp_path / "out", denoise_steps=2, action_chunk=2)
    assert policy.network.config == sized
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sft_module.TINY_TOKENIZER.read_bytes()


def test_training_step_leaves_nothing_on_the_host(demos, tmp_path, monkeypatch):
    # The meta device refuses to mix with host tensors, as CUDA does; it has no fused optimizer.
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr))
    config = SftConfig(steps=2, **SETTINGS)
    demonstrations = sft_module.load_demonstrations(demos)
    parts = sft_module._start(None, "pi05_tiny", config, demonstrations, "cpu")
    frames = sft_module._frames(parts, config, demonstrations, torch.device("cpu"))
    images = {slot: image.to("meta") for slot, image in frames.images.items()}
    frames = dataclasses.replace(frames, images=images, device=torch.device("meta"))
    split = sft_module.split_rows(demonstrations)
    trainer = SftTrainer(parts.network.to("meta"), frames, split, config, tmp_path / "work", NullReporter(), {})
    assert trainer._train_step().device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("images_on", ["cuda", "cpu"])
def test_the_host_does_not_wait_for_a_training_step(demos, tmp_path, images_on):
    trainer = make_trainer(demos, tmp_path, device="cuda", micro_batch=8, precision="bfloat16")
    images = {slot: image.to(images_on) for slot, image in trainer.frames.images.items()}
    trainer.frames = dataclasses.replace(trainer.frames, images=images)
    # The first step makes what later ones keep.
    trainer._train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._failure.step() == 0
