"""Checkpoint folders in openpi's layout: model.safetensors, config.json, assets/<id>/norm_stats.json, tokenizer.model.

``heads.safetensors`` beside them holds what openpi does not know: the critic, and the noise head of Flow-Noise.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gsrl_core.artifacts import digest_file, write_bytes, write_json
from gsrl_core.errors import CheckpointError
from gsrl_core.policy.agent import Pi05Policy, require_horizon
from gsrl_core.policy.config import Pi05Config, config_from_json, config_to_json
from gsrl_core.policy.files import replacing, save_tensors
from gsrl_core.policy.heads import check_head, fresh_heads, load_head
from gsrl_core.policy.keys import HEADS, canonical, check_names, published_tensors, sort_tensors
from gsrl_core.policy.origin import Origin
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.sampler import Sampling
from gsrl_core.policy.statistics import (
    lerobot_prompts_state,
    read_json,
    read_statistics,
    require_asset_id,
    statistics_id,
)
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import FieldStats, norm_stats_to_json
from gsrl_core.policy.weights import load_weights, weights_files, weights_header

logger = logging.getLogger(__name__)

ASSET_ID = "fr3"
"""Of statistics that were read without an id."""
TOKENIZERS = ("tokenizer.model", "paligemma_tokenizer.model")
OPENPI_TOKENIZER = Path("~/.cache/openpi/big_vision/paligemma_tokenizer.model")
"""Where openpi keeps the tokenizer that its checkpoints do not bring."""
_WIDE = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm", "language_model.norm")
_FILES = {"model.safetensors", "heads.safetensors", "config.json", "assets", "README.md", *TOKENIZERS}
"""What belongs to a checkpoint, and is replaced with it."""
_FROZEN = "paligemma_with_expert.paligemma."


def load_policy(
    folder: Path,
    *,
    denoise_steps: int,
    action_chunk: int,
    noise_method: Literal["flow_sde", "flow_noise"] = "flow_sde",
    noise_level: float = 0.5,
    noise_std_range: tuple[float, float] = (0.08, 0.16),
    precision: Literal["float32", "bfloat16"] = "float32",
    compile: Literal["auto", "never"] = "never",
    device: torch.device | str = "cpu",
    discrete_state: bool | None = None,
    asset_id: str | None = None,
) -> Pi05Policy:
    """Read a checkpoint folder; heads that it does not bring start fresh, from a fixed seed.

    Args:
        folder: openpi layout (norm_stats.json in assets/<id>/, <id>/ or beside; weights in safetensors, whole or in
            shards, or RLinf's full_weights.pt), or a lerobot pi05 or pi0 folder with a tokenizer added.
        denoise_steps: integration steps N.
        action_chunk: actions executed per decision, at most the checkpoint's horizon.
        noise_method: how exploration noise enters.
        noise_level: of Flow-SDE.
        noise_std_range: of Flow-Noise.
        precision: of the frozen weights and the activations; trained weights stay float32.
        compile: ``auto`` infers with compiled kernels on a GPU, ``never`` with the network as it is written.
        device: where to put everything.
        discrete_state: whether the prompt carries the state; None leaves it to config.json.
        asset_id: which norm_stats.json if there are several.

    Raises:
        CheckpointError: anything missing, broken or not fitting.
    """
    config = read_config(folder, discrete_state)
    network, heads, carried = load_network(folder, config, precision, device)
    tokenizer = load_tokenizer(folder, config)
    state_stats, action_stats = read_norm_stats(folder, config, asset_id)
    sampling = Sampling(denoise_steps, action_chunk, noise_method, noise_level, tuple(noise_std_range))
    value_head, noise_head = fresh_heads(config, noise_method, sampling.noise_std_range)
    load_head(value_head, "value_head.", heads, folder)
    value_head.to(device)
    if noise_head is not None:
        load_head(noise_head, "noise_head.", heads, folder)
        noise_head.to(device)
    fast = compile == "auto" and torch.device(device).type == "cuda"
    return Pi05Policy(
        network, value_head, noise_head, tokenizer, state_stats, action_stats, sampling, carried, fast=fast,
        asset_id=statistics_id(folder, asset_id),
    )  # fmt: skip


def save_checkpoint(folder: Path, policy: Pi05Policy, *, card: str = "") -> None:
    """Write ``policy`` as a folder that :func:`load_policy` and openpi read; ``card`` becomes README.md.

    Its statistics keep their id, so that the settings that ``policy`` was loaded with load the new folder too.
    """
    heads = {
        name: tensor for name, tensor in policy.state_dict_trainable().items() if name.startswith(("value_", "noise_"))
    }
    write_checkpoint(
        folder,
        network=policy.network,
        tokenizer=policy.tokenizer.path,
        state_stats=policy.state_normalizer.stats,
        action_stats=policy.action_normalizer.stats,
        heads=heads,
        carried=policy.carried,
        card=card,
        asset_id=policy.asset_id,
    )


def write_checkpoint(
    folder: Path,
    *,
    network: Pi05,
    tokenizer: Path,
    state_stats: FieldStats,
    action_stats: FieldStats,
    heads: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    card: str,
    asset_id: str | None = None,
) -> None:
    """Write the parts of a checkpoint; an earlier one in ``folder`` is replaced as a whole, other files stay.

    Raises:
        CheckpointError: a file that ``network`` was read from was written to since, or ``folder`` cannot be replaced.
    """
    network.origin.require_unchanged()
    own = {name: network.origin.as_stored(name, tensor) for name, tensor in network.state_dict().items()}
    tensors = published_tensors(own, carried, network.config.family)
    write_folder(folder, network.config, tensors, tokenizer, state_stats, action_stats, heads, card, asset_id)


def write_folder(
    folder: Path,
    config: Pi05Config,
    tensors: Mapping[str, Tensor],
    tokenizer: Path,
    state_stats: FieldStats,
    action_stats: FieldStats,
    heads: Mapping[str, Tensor],
    card: str,
    asset_id: str | None = None,
) -> None:
    """The same for ``tensors`` under the names that the file gets."""
    place = require_asset_id(asset_id or ASSET_ID)
    with replacing(folder, _FILES) as fresh:
        save_tensors(fresh / "model.safetensors", tensors)
        if heads:
            save_tensors(fresh / "heads.safetensors", heads)
        assets = fresh / "assets" / place
        assets.mkdir(parents=True)
        write_json(assets / "norm_stats.json", norm_stats_to_json(state_stats, action_stats))
        write_bytes(fresh / "tokenizer.model", tokenizer.read_bytes())
        if card:
            write_bytes(fresh / "README.md", card.encode())
        digest = digest_file(fresh / "tokenizer.model")
        write_json(fresh / "config.json", config_to_json(config) | {"tokenizer_sha256": digest})


def read_config(folder: Path, discrete_state: bool | None = None) -> Pi05Config:
    """The sizes of the network in ``folder``.

    A folder without config.json (openpi's trainer writes none) is taken as the 3.6 B model in the seed's recipe:
    5 actions, no state in the prompt; that is logged.

    Args:
        folder: of a checkpoint.
        discrete_state: whether the prompt carries the state, against what config.json says or does not say.

    Raises:
        CheckpointError: no folder, or a config.json that cannot be used.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}")
    values = read_json(folder / "config.json")
    if values is None:
        logger.warning(
            "%s has no config.json: assuming pi05 with action_horizon 5 and discrete_state_input false (the seed's "
            "recipe); write a config.json with these keys if that is wrong", folder
        )  # fmt: skip
        values = {"action_horizon": 5, "discrete_state_input": False, "pi05": True}
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{folder / 'config.json'} must hold a JSON object")
    files = weights_files(folder)
    if not {"architecture", "type", "pi05"} & set(values) and files[0].is_file():
        # openpi's converter does not say which of the two it is, but only pi0 projects the state.
        names = {canonical(name) for name in weights_header(files)}
        values = {**values, "pi05": "state_proj.weight" not in names}
    if values.get("type") == "pi05":
        values = {"discrete_state_input": lerobot_prompts_state(folder), **values}
    config = config_from_json(values)
    if discrete_state is None:
        if not {"architecture", "type", "discrete_state_input"} & set(values):
            logger.warning(
                "config.json of %s does not say whether the prompt carries the state (discrete_state_input): assuming "
                "%s; set policy.discrete_state if that is wrong", folder, str(config.discrete_state).lower()
            )  # fmt: skip
        return config
    return dataclasses.replace(config, discrete_state=discrete_state)


class Stored(NamedTuple):
    """The tensors of a checkpoint folder, under canonical names."""

    files: tuple[Path, ...]
    """Where they are."""
    network: dict[str, Tensor]
    heads: dict[str, Tensor]
    carried: dict[str, Tensor]
    """What no computation needs."""


def read_tensors(folder: Path, network: Pi05, read: Callable[[Sequence[Path]], dict[str, Tensor]]) -> Stored:
    """What ``folder`` stores.

    Args:
        folder: of a checkpoint.
        network: whose names and shapes the weights must have.
        read: of :mod:`gsrl_core.policy.weights`, with numbers or without.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, or a file is broken.
    """
    files = weights_files(folder)
    tensors, heads, carried = sort_tensors(read(files))
    check_names(tensors, network.state_dict(), str(files[0]))
    own = folder / "heads.safetensors"
    if own.is_file():
        heads |= read((own,))
        files = (*files, own)
    return Stored(files, tensors, heads, carried)


def load_network(
    folder: Path, config: Pi05Config, precision: str, device: torch.device | str
) -> tuple[Pi05, dict[str, Tensor], dict[str, Tensor]]:
    """The network, the heads' tensors and the carried tensors of ``folder``. Raises CheckpointError."""
    compute_dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.device("meta"):
        network = Pi05(config, compute_dtype)
    files, tensors, heads, carried = read_tensors(folder, network, load_weights)
    dtypes = {name: _stored_dtype(name, compute_dtype) for name in tensors}
    network.origin = Origin.of(files, tensors, dtypes)
    # Copies: what stayed mapped would change with its file.
    placed = {name: tensor.to(device, dtypes[name], copy=True) for name, tensor in tensors.items()}
    network.load_state_dict(placed, assign=True)
    return network.eval(), heads, carried


def check_checkpoint(
    folder: Path,
    *,
    action_chunk: int,
    noise_method: str,
    noise_std_range: tuple[float, float] = (0.08, 0.16),
    discrete_state: bool | None = None,
    asset_id: str | None = None,
) -> None:
    """Find out in seconds whether :func:`load_policy` will succeed: everything but the weights' bytes is read.

    Args:
        folder: as for :func:`load_policy`.
        action_chunk: actions executed per decision.
        noise_method: ``flow_sde`` or ``flow_noise``, which needs a head of its own.
        noise_std_range: of Flow-Noise; must be what a head of RLinf's was trained for.
        discrete_state: as for :func:`load_policy`.
        asset_id: likewise.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen, a file is broken, the statistics, the tokenizer
            or ``action_chunk`` do not fit config.json, or the noise head is of another range.
    """
    config = read_config(folder, discrete_state)
    with torch.device("meta"):
        network = Pi05(config)
    heads = read_tensors(folder, network, weights_header).heads
    for head, prefix in zip(fresh_heads(config, noise_method, tuple(noise_std_range)), HEADS, strict=True):
        if head is not None:
            check_head(head, prefix, heads, folder)
    load_tokenizer(folder, config)
    _, actions = read_norm_stats(folder, config, asset_id)
    if actions.mean.numel() > config.action_dim:
        raise CheckpointError(
            f"the statistics of {folder} are of {actions.mean.numel()} action values, config.json says "
            f"action_dim {config.action_dim}; put the norm_stats.json of the training run there"
        )
    require_horizon(action_chunk, config.horizon)


def load_tokenizer(folder: Path, config: Pi05Config, given: Path | None = None) -> PromptTokenizer:
    """The tokenizer of a checkpoint, or the ``given`` one, checked against its vocabulary. Raises CheckpointError."""
    candidates = [given] if given else [*(folder / name for name in TOKENIZERS), OPENPI_TOKENIZER.expanduser()]
    path = next((path for path in candidates if path.is_file()), candidates[0])
    tokenizer = PromptTokenizer(path, config.max_token_len, config.discrete_state)
    values = read_json(folder / "config.json")
    expected = values.get("tokenizer_sha256") if isinstance(values, Mapping) else None
    if tokenizer.vocab_size > config.vocab_size or (expected and digest_file(path) != expected):
        raise CheckpointError(
            f"{path} ({tokenizer.vocab_size} pieces) is not the tokenizer of this checkpoint (vocabulary of "
            f"{config.vocab_size}); put the file that it was trained with there"
        )
    return tokenizer


def read_norm_stats(
    folder: Path, config: Pi05Config | None = None, asset_id: str | None = None
) -> tuple[FieldStats, FieldStats]:
    """State and action statistics of ``folder``, see :func:`~gsrl_core.policy.statistics.read_statistics`."""
    return read_statistics(folder, config or read_config(folder), asset_id)


def _stored_dtype(name: str, compute_dtype: torch.dtype) -> torch.dtype:
    # What PPO trains keeps float32 masters: steps of 5e-6 are lost in bfloat16.
    return compute_dtype if name.startswith(_FROZEN) and not any(part in name for part in _WIDE) else torch.float32
