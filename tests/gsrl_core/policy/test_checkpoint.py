import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from policy_examples import SMALL, make_folder, make_observation
from safetensors.torch import load_file, save_file

from gsrl_core.artifacts import digest_folder
from gsrl_core.errors import CheckpointError
from gsrl_core.policy.checkpoint import (
    _stored_dtype,
    check_checkpoint,
    load_policy,
    read_config,
    read_norm_stats,
    save_checkpoint,
)
from gsrl_core.policy.config import config_from_json, config_to_json, preset
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED, canonical

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


def test_two_spellings_of_different_tensors(copy):
    rewrite(copy, lambda tensors: tensors | {EMBEDDING: tensors[TIED_EMBEDDING] + 1})
    with pytest.raises(CheckpointError, match="stored twice, under two spellings"):
        load_policy(copy, **SETTINGS)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_written_back_is_bit_by_bit_what_was_read(copy, tmp_path, precision):
    narrow = ("q_proj", "mlp.", "lm_head", "dense", "fc1")
    rewrite(copy, lambda ts: {n: t.bfloat16() if any(part in n for part in narrow) else t for n, t in ts.items()})
    if precision == "bfloat16":  # the frozen part is computed in it, so it has to be stored in it
        rewrite(copy, lambda ts: {n: t.to(_stored_dtype(canonical(n), torch.bfloat16)) for n, t in ts.items()})
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


def test_two_norm_stats_are_ambiguous(copy):
    shutil.copy(copy / "assets" / "fr3" / "norm_stats.json", copy / "norm_stats.json")
    with pytest.raises(CheckpointError, match=r"several norm_stats\.json"):
        read_norm_stats(copy)


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
    lerobot = {"type": "pi05", "chunk_size": 50, "max_action_dim": 32, "tokenizer_max_length": 200}
    assert config_from_json(lerobot) == preset("pi05")


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


def check(folder, action_chunk=2, noise_method="flow_sde"):
    check_checkpoint(folder, action_chunk=action_chunk, noise_method=noise_method)


def test_a_good_checkpoint_passes_the_check_without_its_weights_being_read(folder, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    save_checkpoint(saved, load_policy(folder, **SETTINGS, noise_method="flow_noise"))
    monkeypatch.setattr("gsrl_core.policy.files.load_file", None)
    monkeypatch.setattr("gsrl_core.policy.checkpoint.load_tensors", None)
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
