"""Checkpoints that lerobot's own classes write and read, cut to size."""

import dataclasses
import json
import shutil
from functools import partial

import pytest
import torch
from lerobot_examples import CONFIG, randomise, small_lerobot
from policy_examples import SMALL, TOKENIZER, make_folder
from safetensors.torch import load_file, save_file

from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import Observation
from gsrl_core.policy import flow
from gsrl_core.policy.checkpoint import load_network, load_policy, read_config, read_norm_stats, write_checkpoint
from gsrl_core.policy.config import PRESETS
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED
from gsrl_core.policy.lerobot_checkpoint import export_checkpoint, import_checkpoint
from gsrl_core.policy.tokenizer import PromptTokenizer

pytest.importorskip("lerobot.policies.pi05.modeling_pi05")
SETTINGS = {"denoise_steps": 3, "action_chunk": 5}
SIZES = dataclasses.replace(CONFIG, max_token_len=64)


@pytest.fixture(scope="module")
def lerobot():
    """The modeling module, while both sides take the sizes of pi0.5 to be the tests'."""
    with small_lerobot() as modeling, pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "pi05", SIZES)
        yield modeling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("ours") / "ours", SIZES)


@pytest.fixture(scope="module")
def exported(lerobot, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("theirs") / "theirs"
    return out, export_checkpoint(folder, out)


class HubTokenizer:
    """Calls like the hub's; the test's vocabulary."""

    def __call__(self, texts, max_length, **_):
        pieces = PromptTokenizer(TOKENIZER, max_length, discrete_state=False)._pieces
        ids, mask = torch.zeros(2, len(texts), max_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            found = [pieces.bos_id(), *pieces.encode(text)]
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return {"input_ids": ids, "attention_mask": mask}


def make_observation():
    generator = torch.Generator().manual_seed(3)
    rgb = torch.randint(256, (2, 56, 56, 3), generator=generator, dtype=torch.uint8)
    return Observation({"camera": rgb}, torch.rand(2, 9, generator=generator) * 2 - 1, ("pick up the cube",) * 2)


def lerobots_actions(policy, folder, noise):
    """Of the pipelines in ``folder`` around ``policy``, on ``make_observation()``."""
    from lerobot.policies.factory import make_pre_post_processors

    overrides = {"tokenizer_processor": {"tokenizer": HubTokenizer()}}
    before, after = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=overrides)
    seen = make_observation()
    batch = {
        "observation.images.base_0_rgb": seen.rgb["camera"].permute(0, 3, 1, 2).float() / 255,
        "observation.state": seen.state,
        "task": list(seen.instruction),
    }
    return after(policy.predict_action_chunk(before(batch), noise=noise, num_steps=SETTINGS["denoise_steps"]))


def our_actions(folder):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, SIZES.horizon, SIZES.action_dim, generator=torch.Generator().manual_seed(0))
    return load_policy(folder, **SETTINGS).act(make_observation(), generator, explore=False).actions, noise


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def test_lerobot_loads_what_is_exported_and_acts_the_same(lerobot, folder, exported, capsys):
    out, facts = exported
    policy = lerobot.PI05Policy.from_pretrained(out)
    # It goes on with random weights if a key is wrong, and says so.
    assert "All keys loaded successfully!" in capsys.readouterr().out
    actions, noise = our_actions(folder)
    assert error(actions, lerobots_actions(policy, out, noise)) < 1e-4
    assert facts == {"tensors": len(policy.state_dict()), "dtype": "float32", "filled_with_zeros": [f"model.{UNUSED}"]}
    assert not policy.state_dict()[f"model.{UNUSED}"].any()
    assert f"model.{UNUSED}" in (out / "README.md").read_text()


def test_the_way_back_changes_no_bit(lerobot, folder, exported, tmp_path):
    assert torch.equal(our_actions(exported[0])[0], our_actions(folder)[0])
    facts = import_checkpoint(exported[0], tmp_path / "back")
    assert facts == {"tensors": facts["tensors"], "horizon": 5, "discrete_state": True, "normalization": "quantile"}
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert set(second) - set(first) == {UNUSED}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_norm_stats(folder)[1].q99.tolist() == read_norm_stats(tmp_path / "back")[1].q99.tolist()
    assert torch.equal(our_actions(tmp_path / "back")[0], our_actions(folder)[0])


def test_what_the_prompt_and_the_norms_are_is_exported(lerobot, tmp_path):
    sizes = dataclasses.replace(SIZES, discrete_state=False, normalization="mean_std")
    ours = make_folder(tmp_path / "ours", sizes)
    save_file({"value_head.mlp.0.bias": torch.ones(3)}, ours / "heads.safetensors")
    export_checkpoint(ours, tmp_path / "theirs")
    assert read_config(tmp_path / "theirs") == sizes
    policy = lerobot.PI05Policy.from_pretrained(tmp_path / "theirs")
    (ours / "heads.safetensors").unlink()
    actions, noise = our_actions(ours)
    assert error(actions, lerobots_actions(policy, tmp_path / "theirs", noise)) < 1e-4
    assert set(load_file(tmp_path / "theirs" / "heads.safetensors")) == {"value_head.mlp.0.bias"}


def test_bfloat16_stays_bfloat16(lerobot, folder, tmp_path):
    ours = make_folder(tmp_path / "ours", SIZES)
    tensors = load_file(ours / "model.safetensors")
    wide = ("vision_tower", "multi_modal", "layernorm", "model.norm", "language_model.norm", "action_", "time_")
    save_file(
        {n: t if any(w in n for w in wide) else t.bfloat16() for n, t in tensors.items()}, ours / "model.safetensors"
    )
    assert export_checkpoint(ours, tmp_path / "theirs")["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    policy = lerobot.PI05Policy.from_pretrained(tmp_path / "theirs")
    assert [
        n for n, t in policy.state_dict().items() if t.dtype != stored[n].dtype or not torch.equal(t, stored[n])
    ] == []


def test_a_policy_of_lerobots_loads_before_and_after_training(lerobot, tmp_path):
    """Its lm_head is not its embedding, from the start: two random tensors."""
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    settings = PI05Config(chunk_size=5, n_action_steps=5, image_resolution=(56, 56), device="cpu")
    policy = lerobot.PI05Policy(settings)
    randomise(policy)
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(2, 3, 56, 56, generator=generator) * 2 - 1]
    masks = [torch.ones(2, dtype=torch.bool)]
    ids, token_mask = torch.randint(257152, (2, 8), generator=generator), torch.ones(2, 8, dtype=torch.bool)
    noise = torch.randn(2, 5, 32, generator=generator)

    def train():
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.1)
        policy.model.forward(images, masks, ids, token_mask, -noise, noise, torch.rand(2)).mean().backward()
        optimizer.step()

    for steps in range(2):
        if steps:
            train()
        source, out = tmp_path / f"theirs{steps}", tmp_path / f"ours{steps}"
        policy.save_pretrained(source)
        network, heads, carried = load_network(source, read_config(source), "float32", "cpu")
        prefix = network.embed_prefix({"base_0_rgb": images[0]}, {"base_0_rgb": masks[0]}, ids, token_mask)
        with torch.no_grad():
            actual = flow.sample_ode(partial(network.velocity, prefix), noise, 3)
            expected = policy.eval().model.sample_actions(images, masks, ids, token_mask, noise=noise, num_steps=3)
        assert error(actual, expected) < 1e-4
        stats = read_norm_stats(make_folder(tmp_path / f"stats{steps}", SMALL))
        write_checkpoint(
            out, network=network, tokenizer=TOKENIZER, state_stats=stats[0], action_stats=stats[1], heads=heads,
            carried=carried, card="",
        )  # fmt: skip
        stored = load_file(out / "model.safetensors")
        assert {TIED_EMBEDDING, EMBEDDING, UNUSED} <= set(stored)
        own = policy.model.state_dict()
        assert [name for name in own | stored if not torch.equal(own[name], stored[name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "pi0"}, "is a pi0 checkpoint; only pi05"),
        ({"vocab_size": 512}, r"full size, the only one that lerobot builds, .*: vocab_size 512 instead of 257152$"),
        (
            {"depth": 1, "mlp": 32},
            r"the only one that lerobot builds, .*: depth 1 instead of 2, mlp 32 instead of \d+$",
        ),
        ({"depth": 1, "mlp": 32, "expert_mlp": 32, "vision_mlp": 32}, "expert_mlp 32 instead of [0-9]+ and 1 more$"),
    ],
)
def test_what_lerobot_cannot_build_is_refused_before_weights_are_read(lerobot, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("gsrl_core.policy.lerobot_checkpoint.load_weights", None)
    ours = make_folder(tmp_path / "ours", dataclasses.replace(SIZES, **change))
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(ours, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_nothing_is_overwritten(folder, tmp_path):
    for write in (export_checkpoint, import_checkpoint):
        with pytest.raises(CheckpointError, match="exists; a checkpoint is written to a new folder"):
            write(folder, tmp_path)


def test_a_tokenizer_can_be_given(folder, tmp_path):
    bare = make_folder(tmp_path / "bare", SMALL)
    (bare / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        import_checkpoint(bare, tmp_path / "out")
    import_checkpoint(bare, tmp_path / "out", tokenizer=TOKENIZER, discrete_state=False)
    assert not read_config(tmp_path / "out").discrete_state
    assert load_policy(tmp_path / "out", denoise_steps=1, action_chunk=1)


def test_statistics_keep_their_id(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "two")
    (found,) = (tmp_path / "two" / "assets").iterdir()
    found.rename(found.with_name("droid"))
    shutil.copytree(found.with_name("droid"), found.with_name("trossen"))
    import_checkpoint(tmp_path / "two", tmp_path / "out", asset_id="droid")
    assert [place.name for place in (tmp_path / "out" / "assets").iterdir()] == ["droid"]


def test_a_broken_pipeline_is_named(exported, tmp_path):
    (tmp_path / "config.json").write_text((exported[0] / "config.json").read_text())
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": [1]}))
    with pytest.raises(CheckpointError, match="is not a pipeline of lerobot's"):
        read_config(tmp_path)
