import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from policy_examples import SMALL, make_folder, make_observation
from safetensors.torch import load_file, save_file

from gsrl_core.artifacts import digest_folder
from gsrl_core.errors import CheckpointError
from gsrl_core.package import _copy_checkpoint
from gsrl_core.policy.checkpoint import (
    check_checkpoint,
    load_policy,
    read_config,
    read_norm_stats,
    save_checkpoint,
)
from gsrl_core.policy.config import config_from_json, config_to_json, preset
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED, canonical

LEROBOT = {"type": "pi05", "chunk_size": 50, "max_action_dim": 32, "tokenizer_max_length": 200}
SETTINGS = {"denoise_steps": 2, "action_chunk": 2}


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def outputs(folder, **changes):
    policy = load_policy(folder, **(SETTINGS | changes))
    sample = policy.act(make_observation(2), torch.Generator().manual_seed(0), explore=True)
    return sample.actions, sample.value


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_folder_layout(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "README.md",
        "assets/fr3/norm_stats.json",
    }
    stored = load_file(folder / "model.safetensors")
    assert TIED_EMBEDDING in stored
    assert EMBEDDING not in stored


@pytest.mark.parametrize("noise_method", ["flow_sde", "flow_noise"])
def test_save_and_load_round_trip_with_heads(folder, tmp_path, noise_method):
    policy = load_policy(folder, **SETTINGS, noise_method=noise_method)
    with torch.no_grad():
        for group in policy.trainable_parameters().values():
            for parameter in group:
                parameter.add_(0.01)
    save_checkpoint(tmp_path / "saved", policy, card="# Card\n")
    again = load_policy(tmp_path / "saved", **SETTINGS, noise_method=noise_method)
    first, second = policy.state_dict_trainable(), again.state_dict_trainable()
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "saved" / "README.md").read_text() == "# Card\n"


def test_fresh_heads_are_always_the_same_and_leave_the_random_state_alone(folder):
    torch.manual_seed(5)
    first = load_policy(folder, **SETTINGS).state_dict_trainable()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    second = load_policy(folder, **SETTINGS).state_dict_trainable()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: name.replace("time_mlp_", "action_time_mlp_"),
        lambda name: (
            name.replace(".paligemma.model.language_model.", ".paligemma.language_model.model.")
            .replace(".paligemma.model.vision_tower.", ".paligemma.vision_tower.")
            .replace(".paligemma.model.multi_modal_projector.", ".paligemma.multi_modal_projector.")
        ),
        lambda name: EMBEDDING if name == TIED_EMBEDDING else name,
        lambda name: TIED_EMBEDDING.replace("lm_head", "language_model.lm_head") if name == TIED_EMBEDDING else name,
    ],
    ids=["lerobot", "action_time_mlp", "older", "embed_tokens", "older lm_head"],
)
def test_other_spellings_load(folder, copy, rename):
    rewrite(copy, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert same(outputs(folder), outputs(copy))


def test_names_are_fixed_points():
    network_names = [TIED_EMBEDDING, "time_mlp_in.weight", "value_head.mlp.0.weight", UNUSED]
    assert [canonical(canonical(name)) for name in network_names] == [canonical(name) for name in network_names]


@pytest.mark.parametrize(
    "place", ["full_weights.pt", "model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt"]
)
def test_what_rlinf_leaves_behind_loads(folder, copy, place):
    tensors = load_file(copy / "model.safetensors")
    # A state dictionary holds tied tensors under both names.
    tensors[EMBEDDING] = tensors[TIED_EMBEDDING]
    (copy / "model.safetensors").unlink()
    (copy / place).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, copy / place)
    assert same(outputs(folder), outputs(copy))
    check(copy)
    torch.save({"model": tensors}, copy / place)
    with pytest.raises(CheckpointError, match="does not hold tensors by name"):
        load_policy(copy, **SETTINGS)
    (copy / place).write_bytes(b"PK nonsense")
    for read in (lambda: load_policy(copy, **SETTINGS), lambda: check(copy)):
        with pytest.raises(CheckpointError, match="not a readable state dictionary"):
            read()


def test_code_in_a_pickle_is_not_run(copy, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (copy / "model.safetensors").unlink()
    torch.save({"time_mlp_in.weight": Attack()}, copy / "full_weights.pt")
    with pytest.raises(CheckpointError, match="not a readable state dictionary"):
        load_policy(copy, **SETTINGS)
    assert not (tmp_path / "ran").exists()


def test_an_lm_head_that_differs_from_the_embedding_is_carried_through(folder, copy, tmp_path):
    """lerobot does not tie the two, and trains the embedding only."""
    rewrite(
        copy,
        lambda tensors: tensors | {EMBEDDING: tensors[TIED_EMBEDDING], TIED_EMBEDDING: tensors[TIED_EMBEDDING] + 1},
    )
    assert same(outputs(folder), outputs(copy))
    check(copy)
    save_checkpoint(tmp_path / "saved", load_policy(copy, **SETTINGS))
    before, after = load_file(copy / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after | before)
    assert same(outputs(folder), outputs(tmp_path / "saved"))


def test_two_spellings_of_different_tensors(copy):
    rewrite(copy, lambda tensors: tensors | {"action_time_mlp_in.bias": tensors["time_mlp_in.bias"] + 1})
    with pytest.raises(CheckpointError, match="stored twice, under two spellings"):
        load_policy(copy, **SETTINGS)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_written_back_is_bit_by_bit_what_was_read(copy, tmp_path, precision):
    narrow = ("q_proj", "mlp.", "lm_head", "dense", "fc1")
    rewrite(copy, lambda ts: {n: t.bfloat16() if any(part in n for part in narrow) else t for n, t in ts.items()})
    before = {n: t for n, t in load_file(copy / "model.safetensors").items()}
    policy = load_policy(copy, **SETTINGS, precision=precision)
    save_checkpoint(tmp_path / "saved", policy)
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    # A step that bfloat16 cannot hold is not lost.
    with torch.no_grad():
        policy.network.expert.layers[0].self_attn.q_proj.weight.mul_(1 + 1e-4)
    save_checkpoint(tmp_path / "saved", policy)
    name = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight"
    assert load_file(tmp_path / "saved" / "model.safetensors")[name].dtype == torch.float32


def spoil_in_place(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


def test_what_was_rounded_outlives_its_file_but_not_a_change_of_it(copy, tmp_path):
    """The frozen part is computed in bfloat16, so its float32 originals are not in the policy."""
    source = copy / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(source).items()}
    policy = load_policy(copy, **SETTINGS, precision="bfloat16")
    with torch.no_grad():
        policy.network.action_in_proj.weight.mul_(1 + 1e-4)
        policy.network.paligemma.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    changed = {
        "action_in_proj.weight",
        "paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.up_proj.weight",
    }

    def check_saved():
        save_checkpoint(tmp_path / "saved", policy)
        after = load_file(tmp_path / "saved" / "model.safetensors")
        assert {name for name in before if not torch.equal(after[name], before[name])} == changed

    check_saved()
    save_file(before, tmp_path / "other")
    (tmp_path / "other").replace(source)
    check_saved()
    source.unlink()
    check_saved()
    save_file(before, source)
    policy = load_policy(copy, **SETTINGS, precision="bfloat16")
    spoil_in_place(source)
    with pytest.raises(CheckpointError, match="was written to while a policy"):
        save_checkpoint(tmp_path / "saved", policy)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == before.keys()


def test_a_rewrite_in_place_of_what_was_read_changes_no_weight_and_is_told(copy, tmp_path):
    rewrite(copy, lambda tensors: tensors | {UNUSED: torch.ones(3, 2)})
    save_checkpoint(copy, load_policy(copy, **SETTINGS))
    for name in ("model.safetensors", "heads.safetensors"):
        source, content = copy / name, (copy / name).read_bytes()
        policy = load_policy(copy, **SETTINGS)
        weights = policy.network.state_dict() | policy.value_head.state_dict()
        before = {name: tensor.clone() for name, tensor in weights.items()}
        with source.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            file.write(bytes(len(content) - start))
        assert all(torch.equal(weights[name], before[name]) for name in before)
        with pytest.raises(CheckpointError, match=rf"{name} was written to while a policy"):
            save_checkpoint(tmp_path / "saved", policy)
        assert not (tmp_path / "saved").exists()
        source.write_bytes(content)


def test_a_file_that_takes_the_place_of_a_source_is_no_change_of_it(copy, tmp_path):
    """File systems give the inode of a deleted file to the next one."""
    policy = load_policy(copy, **SETTINGS)
    source = copy / "model.safetensors"
    source.unlink()
    source.write_bytes(b"something else")
    for _ in range(3):
        save_checkpoint(copy, policy)


def test_unused_head_is_carried_through(copy, tmp_path):
    unused = torch.arange(6.0).reshape(3, 2)
    rewrite(copy, lambda tensors: tensors | {UNUSED: unused})
    save_checkpoint(tmp_path / "saved", load_policy(copy, **SETTINGS))
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")[UNUSED], unused)


def test_missing_unexpected_and_misshapen_are_all_named(copy):
    def spoil(tensors):
        tensors = dict(tensors)
        del tensors["time_mlp_out.bias"]
        tensors["state_proj.weight"] = torch.zeros(2)
        tensors["action_in_proj.weight"] = torch.zeros(3, 4)
        return tensors

    rewrite(copy, spoil)
    with pytest.raises(CheckpointError) as caught:
        load_policy(copy, **SETTINGS)
    message = str(caught.value)
    assert "1 missing: time_mlp_out.bias" in message
    assert "1 unexpected: state_proj.weight" in message
    assert "1 misshapen: action_in_proj.weight (3, 4) instead of (16, 32)" in message


def test_truncated_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_policy(copy, **SETTINGS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "no weights at"),
        ("tokenizer.model", "no tokenizer at"),
        ("assets/fr3/norm_stats.json", "has no norm_stats.json"),
    ],
)
def test_missing_files(copy, name, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_policy(copy, **SETTINGS)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_policy(tmp_path / "nowhere", **SETTINGS)


@pytest.mark.parametrize("name", ["config.json", "assets/fr3/norm_stats.json"])
def test_broken_json(copy, name):
    (copy / name).write_text('{"a": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_policy(copy, **SETTINGS)


def test_wrong_tokenizer(copy):
    content = bytearray((copy / "tokenizer.model").read_bytes())
    # Another legal model: one letter of one piece differs.
    content[content.index(b"cube")] = ord("t")
    (copy / "tokenizer.model").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is not the tokenizer of this checkpoint"):
        load_policy(copy, **SETTINGS)


@pytest.mark.parametrize("place", ["norm_stats.json", "RLinf/GSEnv-PutCubeOnPlate-v0/norm_stats.json"])
def test_norm_stats_places(folder, copy, place):
    source = copy / "assets" / "fr3" / "norm_stats.json"
    (copy / place).parent.mkdir(parents=True, exist_ok=True)
    source.rename(copy / place)
    assert same(outputs(folder), outputs(copy))


def test_of_two_norm_stats_one_is_chosen(folder, copy):
    shutil.copytree(copy / "assets" / "fr3", copy / "assets" / "droid")
    rewrite_json(copy / "assets" / "droid" / "norm_stats.json", lambda v: v["norm_stats"]["actions"]["q99"].reverse())
    with pytest.raises(CheckpointError, match=r"several norm_stats\.json \(droid, fr3\); choose"):
        read_norm_stats(copy)
    assert same(outputs(folder), outputs(copy, asset_id="fr3"))
    assert not same(outputs(folder), outputs(copy, asset_id="droid"))
    check(copy, asset_id="fr3")
    with pytest.raises(CheckpointError, match=r"policy\.asset_id is 'franka', but .* has statistics of: droid, fr3"):
        check(copy, asset_id="franka")


@pytest.mark.parametrize("asset_id", ["droid", "someone/droid"])
def test_the_settings_that_a_checkpoint_was_loaded_with_load_what_is_saved_from_it(copy, tmp_path, asset_id):
    shutil.copytree(copy / "assets" / "fr3", copy / "assets" / asset_id)
    stats = copy / "assets" / asset_id / "norm_stats.json"
    rewrite_json(stats, lambda v: v["norm_stats"]["actions"]["q99"].reverse())
    save_checkpoint(tmp_path / "saved", load_policy(copy, **SETTINGS, asset_id=asset_id))
    saved = [path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("norm_stats.json")]
    assert saved == [stats.relative_to(copy)]
    check(tmp_path / "saved", asset_id=asset_id)
    expected = outputs(copy, asset_id=asset_id)
    assert same(outputs(tmp_path / "saved", asset_id=asset_id), expected)
    assert same(outputs(tmp_path / "saved"), expected)
    (tmp_path / "package").mkdir()
    _copy_checkpoint(tmp_path / "saved", tmp_path / "package")
    assert same(outputs(tmp_path / "package", asset_id=asset_id), expected)


@pytest.mark.parametrize("asset_id", ["../droid", "/droid", "droid/", "."])
def test_statistics_are_written_below_assets_only(folder, tmp_path, asset_id):
    policy = load_policy(folder, **SETTINGS)
    policy.asset_id = asset_id
    with pytest.raises(CheckpointError, match=r"names a folder below assets/"):
        save_checkpoint(tmp_path / "saved", policy)
    assert not list(tmp_path.iterdir())


def test_mean_and_deviation_are_enough_where_nothing_else_is_needed(copy):
    def forget(values):
        for field in values["norm_stats"].values():
            del field["q01"], field["q99"]

    rewrite_json(copy / "assets" / "fr3" / "norm_stats.json", forget)
    with pytest.raises(CheckpointError, match="state needs q01, q99 and lacks q01, q99"):
        check(copy)
    rewrite_json(copy / "config.json", lambda values: values["architecture"].update(normalization="mean_std"))
    check(copy)
    save_checkpoint(copy, load_policy(copy, **SETTINGS))
    check(copy)


def test_lerobot_statistics(folder, copy):
    state, actions = read_norm_stats(folder)
    tensors = {
        f"{name}.{key}": getattr(stats, key)
        for name, stats in (("observation.state", state), ("action", actions))
        for key in ("mean", "std", "q01", "q99")
    }
    (copy / "assets" / "fr3" / "norm_stats.json").unlink()
    save_file(tensors, copy / "policy_preprocessor_step_2_normalizer_processor.safetensors")
    assert same(outputs(folder), outputs(copy))


def test_bfloat16_keeps_masters_and_norms_wide(folder):
    policy = load_policy(folder, **SETTINGS, precision="bfloat16")
    for name, tensor in policy.network.state_dict().items():
        frozen = name.startswith("paligemma_with_expert.paligemma.")
        wide = any(part in name for part in ("patch_emb", "position_emb", "input_layernorm", "post_att", "model.norm"))
        assert tensor.dtype == (torch.bfloat16 if frozen and not wide else torch.float32), name
    exact, rounded = outputs(folder), outputs(folder, precision="bfloat16")
    torch.testing.assert_close(exact[0], rounded[0], atol=5e-3, rtol=0)


def test_configuration_round_trip_and_foreign_files():
    for config in (SMALL, preset("pi05"), preset("pi05_tiny"), preset("pi05_small")):
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    openpi = {
        "action_dim": 32,
        "action_horizon": 10,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "bfloat16",
    }
    assert config_from_json(openpi).horizon == 10
    assert config_from_json(LEROBOT) == preset("pi05")
    modes = {"STATE": "MEAN_STD", "ACTION": "MEAN_STD", "VISUAL": "IDENTITY"}
    read = config_from_json(LEROBOT | {"normalization_mapping": modes, "image_resolution": [448, 448]})
    assert (read.normalization, read.image_size) == ("mean_std", 448)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"paligemma_variant": "gemma_7b", "action_horizon": 5}, "'gemma_7b'; allowed: 'gemma_2b'"),
        ({"type": "act", "chunk_size": 5}, "type is 'act'; allowed: 'pi05', 'pi0'"),
        ({"architecture": {"family": "pi1"}}, "family is 'pi1'; allowed: pi05, pi0"),
        ({}, "add action_horizon"),
        ({"architecture": {"widht": 3}}, "unknown architecture key 'widht'"),
        ({"architecture": {"width": "wide"}}, "positive integer"),
        ({"architecture": {"width": 0}}, "positive integer"),
        ({"architecture": {"discrete_state": 1}}, "true or false"),
        ({"architecture": {"value_hidden": []}}, None),
        ({"architecture": {"value_hidden": [1.5]}}, "list of positive integers"),
        ({"architecture": {"normalization": "none"}}, "allowed: quantile, mean_std"),
        ({"architecture": 3}, "must be an object"),
        (LEROBOT | {"use_relative_actions": True}, "use_relative_actions is True; only False is supported"),
        (LEROBOT | {"max_period": 10.0}, "max_period is 10.0; only 4.0"),
        (LEROBOT | {"image_resolution": [224, 320]}, "must be square"),
        (LEROBOT | {"image_resolution": 224}, r"image_resolution is 224; expected \[height, width\]"),
        (LEROBOT | {"image_resolution": [224]}, r"image_resolution is \[224\]; expected"),
        (LEROBOT | {"image_resolution": ["a", "a"]}, "image_size must be a positive integer"),
        (
            LEROBOT | {"normalization_mapping": {"STATE": ["MEAN_STD"], "ACTION": ["MEAN_STD"]}},
            r"STATE \['MEAN_STD'\] and ACTION .*; allowed: the same for both",
        ),
        (LEROBOT | {"normalization_mapping": {"VISUAL": "MEAN_STD"}}, "VISUAL must be IDENTITY"),
        (
            LEROBOT | {"normalization_mapping": {"STATE": "MEAN_STD"}},
            "STATE 'MEAN_STD' and ACTION 'QUANTILES'; allowed",
        ),
        (LEROBOT | {"normalization_mapping": {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"}}, "allowed: the same for both"),
    ],
)
def test_bad_configurations(values, message):
    if message is None:
        assert config_from_json(values).value_hidden == ()
        return
    with pytest.raises(CheckpointError, match=message):
        config_from_json(values)


def test_folder_without_config_is_the_seeds_recipe(copy, caplog):
    (copy / "config.json").unlink()
    config = read_config(copy)
    assert (config.horizon, config.discrete_state, config.width) == (5, False, 2048)
    assert "no config.json" in caplog.text


def test_whether_the_prompt_carries_the_state_can_be_told(folder, copy, caplog):
    assert outputs(folder)[0].shape == outputs(folder, discrete_state=False)[0].shape
    assert not same(outputs(folder), outputs(folder, discrete_state=False))
    save_checkpoint(copy, load_policy(copy, **SETTINGS, discrete_state=False))
    assert not read_config(copy).discrete_state
    assert not caplog.text
    # openpi's converter does not write the key.
    (copy / "config.json").write_text(json.dumps({"action_horizon": 4, "paligemma_variant": "gemma_2b"}))
    assert read_config(copy).discrete_state
    assert "does not say whether the prompt carries the state" in caplog.text
    caplog.clear()
    assert not read_config(copy, discrete_state=False).discrete_state
    assert not caplog.text


def split(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), index=True):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    order = sorted(tensors)
    parts = dict(zip(names, (order[:20], order[20:]), strict=True))
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name)
    if index:
        weight_map = {key: name for name, part in parts.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_shards_load(folder, copy, index):
    split(copy, index=index)
    assert same(outputs(folder), outputs(copy))
    check(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors"):
        check(copy)


def test_a_single_file_of_any_name_loads(folder, copy):
    (copy / "model.safetensors").rename(copy / "pi05_base.safetensors")
    save_file({"a": torch.zeros(1)}, copy / "policy_preprocessor_step_2.safetensors")
    assert same(outputs(folder), outputs(copy))
    shutil.copy(copy / "pi05_base.safetensors", copy / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"several weights \(ema.safetensors, pi05_base.safetensors\); name the"):
        check(copy)
    shutil.copy(copy / "ema.safetensors", copy / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"several weights .* keep one series"):
        check(copy)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_named(copy, content):
    split(copy)
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json (is not an index|names) .*fetch it again"):
        check(copy)


def test_a_tensor_in_two_shards(copy):
    split(copy)
    shutil.copy(copy / "model-00001-of-00002.safetensors", copy / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="which another shard holds too"):
        check(copy)


def test_rlinfs_noise_head_loads(folder, copy):
    ours = load_policy(folder, **SETTINGS, noise_method="flow_noise")
    trained = {name: torch.randn_like(t) for name, t in ours.noise_head.state_dict().items()}
    low, high = (torch.tensor([2 * math.log(std)]) for std in (0.08, 0.16))
    theirs = {"noise_head.logvar_min": low, "noise_head.logvar_max": high}
    for name, tensor in trained.items():
        layer, kind = name.removeprefix("mlp.").split(".")
        theirs[f"noise_head.mlp_logvar.moduleList.{int(layer) // 2}.linear_1.{kind}"] = tensor
    rewrite(copy, lambda tensors: tensors | theirs)
    check(copy, noise_method="flow_noise")
    loaded = load_policy(copy, **SETTINGS, noise_method="flow_noise").noise_head.state_dict()
    assert all(torch.equal(loaded[name], trained[name]) for name in loaded | trained)
    assert load_policy(copy, **SETTINGS).noise_head is None


def load_and_check(folder, message, **choices):
    """Both refuse, in the same words."""
    for call in (lambda: load_policy(folder, **SETTINGS, **choices), lambda: check(folder, **choices)):
        with pytest.raises(CheckpointError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"0\.08 to 0\.16; set policy\.noise_std_range"),
        ({"logvar_min": None}, "logvar_min and logvar_max as one number each, or neither"),
        ({"logvar_max": None}, "logvar_min and logvar_max as one number each, or neither"),
        ({"logvar_max": torch.zeros(2)}, "logvar_min and logvar_max as one number each, or neither"),
        ({"logvar_max": torch.tensor(1e9)}, "0.08 to inf; set"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "full_weights.pt"])
def test_the_range_of_rlinfs_noise_head_must_be_the_configured_one(copy, name, change, message):
    bounds = {f"logvar_{end}": torch.tensor([2 * math.log(std)]) for end, std in (("min", 0.08), ("max", 0.16))}
    given = {f"noise_head.{key}": bound for key, bound in (bounds | change).items() if bound is not None}
    rewrite(copy, lambda tensors: tensors | given)
    if name == "full_weights.pt":
        torch.save(load_file(copy / "model.safetensors"), copy / name)
        (copy / "model.safetensors").unlink()
    check(copy)
    load_and_check(copy, message, noise_method="flow_noise", noise_std_range=(0.04, 0.1))


def test_saving_is_atomic(folder, tmp_path, monkeypatch):
    target = make_folder(tmp_path / "target")
    before = (target / "model.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gsrl_core.policy.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(target, load_policy(folder, **SETTINGS))
    assert (target / "model.safetensors").read_bytes() == before
    assert not [path for path in target.rglob(".*")]


@pytest.mark.parametrize("interrupted", ["save_tensors", "write_json", "write_bytes", "digest_file"])
def test_a_kill_while_saving_leaves_the_checkpoint_that_was_there(folder, tmp_path, monkeypatch, interrupted):
    """Old and new parts would load without complaint: weights of one run, statistics of another."""
    target = shutil.copytree(folder, tmp_path / "target")
    (target / "notes.txt").write_text("mine")
    before = digest_folder(target)
    policy = load_policy(folder, **SETTINGS)
    with torch.no_grad():
        policy.network.action_in_proj.weight.add_(1.0)
    monkeypatch.setattr(f"gsrl_core.policy.checkpoint.{interrupted}", lambda *_: (_ for _ in ()).throw(SystemExit))
    for place in (target, tmp_path / "new"):
        with pytest.raises(SystemExit):
            save_checkpoint(place, policy)
    assert digest_folder(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    monkeypatch.undo()
    save_checkpoint(target, policy)
    assert torch.equal(
        load_policy(target, **SETTINGS).network.action_in_proj.weight, policy.network.action_in_proj.weight
    )
    assert (target / "notes.txt").read_text() == "mine"


def test_a_rename_that_fails_puts_the_old_folder_back(folder, tmp_path, monkeypatch):
    target = shutil.copytree(folder, tmp_path / "target")
    before, rename = digest_folder(target), Path.rename

    def failing(self, to):
        if to == target and self.name.startswith(".target") and (self / "config.json").is_file() and not failed:
            failed.append(self)
            raise PermissionError(13, "denied")
        return rename(self, to)

    failed = []
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        save_checkpoint(target, load_policy(folder, **SETTINGS))
    assert digest_folder(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_parts_that_the_new_checkpoint_lacks_do_not_stay(folder, tmp_path):
    target = tmp_path / "target"
    save_checkpoint(target, load_policy(folder, **SETTINGS))
    assert (target / "heads.safetensors").is_file()
    make_folder(target)
    assert not (target / "heads.safetensors").exists()


def check(folder, action_chunk=2, noise_method="flow_sde", **choices):
    check_checkpoint(folder, action_chunk=action_chunk, noise_method=noise_method, **choices)


def test_a_good_checkpoint_passes_the_check_without_its_weights_being_read(folder, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    save_checkpoint(saved, load_policy(folder, **SETTINGS, noise_method="flow_noise"))
    monkeypatch.setattr("gsrl_core.policy.files.load_file", None)
    monkeypatch.setattr("gsrl_core.policy.weights.load_tensors", None)
    for noise_method in ("flow_sde", "flow_noise"):
        check(folder, noise_method=noise_method)
        check(saved, noise_method=noise_method)


@pytest.mark.parametrize("name", ["model.safetensors", "heads.safetensors"])
def test_the_check_names_missing_and_misshapen_tensors(folder, tmp_path, name):
    saved = tmp_path / "saved"
    save_checkpoint(saved, load_policy(folder, **SETTINGS))
    tensors = load_file(saved / name)
    missing, bent = sorted(tensors)[:2]
    save_file({**{k: t for k, t in tensors.items() if k != missing}, bent: torch.zeros(3, 3)}, saved / name)
    with pytest.raises(CheckpointError, match=r"1 missing: .*1 misshapen: .* \(3, 3\) instead of"):
        check(saved)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: os.truncate(f / "model.safetensors", 20_000), "not a readable safetensors file"),
        (lambda f: os.truncate(f / "tokenizer.model", 100), "not a SentencePiece model"),
        (lambda f: (f / "assets" / "fr3" / "norm_stats.json").unlink(), r"no norm_stats\.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: rewrite_json(f / "config.json", lambda v: v["architecture"].update(depth=3)), "missing: .*layers.2"),
        (lambda f: rewrite_json(f / "config.json", lambda v: v["architecture"].update(vocab_size=500)), "misshapen"),
        (
            lambda f: rewrite_json(
                f / "assets" / "fr3" / "norm_stats.json",
                lambda v: v["norm_stats"].update(actions=dict.fromkeys(("mean", "std", "q01", "q99"), [1.0] * 33)),
            ),
            "33 action values, config.json says action_dim 32",
        ),
    ],
)
def test_the_check_finds_what_loading_would_find(copy, spoil, message):
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        check(copy)


def test_the_check_knows_how_many_actions_are_asked_for(folder):
    with pytest.raises(CheckpointError, match="allowed: 1 to 4"):
        check(folder, action_chunk=5)


def rewrite_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
