"""Checkpoints for lerobot's PI05Policy, and checkpoints of any readable layout as ours.

A folder of lerobot's holds config.json (its PI05Config), model.safetensors (our names after ``model.``, and two tensors
that nothing computes with) and its two processor pipelines, whose safetensors files hold the normalisation statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gsrl_core.artifacts import write_bytes
from gsrl_core.errors import CheckpointError, listed
from gsrl_core.policy.checkpoint import load_tokenizer, read_config, read_norm_stats, read_tensors, write_folder
from gsrl_core.policy.config import IMAGE_SLOTS, LEROBOT_MODES, PRESETS, Pi05Config
from gsrl_core.policy.files import replacing, save_tensors
from gsrl_core.policy.keys import EMBEDDING, TIED_EMBEDDING, UNUSED, check_names, published_tensors
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.statistics import LEROBOT_FIELDS, statistics_id
from gsrl_core.policy.transforms import STATISTICS, FieldStats
from gsrl_core.policy.weights import load_weights

if TYPE_CHECKING:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

TOKENIZER = "google/paligemma-3b-pt-224"
"""Where lerobot's pi05 gets PaliGemma's tokenizer from."""
_PREFIX = "model."
_WIDE = ("vision_tower", "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "model.norm")
"""What lerobot keeps in float32 in a policy of dtype bfloat16 (``to_bfloat16_for_selected_params``)."""
_FIXED = (
    "width", "depth", "vocab_size", "mlp", "heads", "kv_heads", "head_dim", "expert_width", "expert_mlp", "patch_size",
    "vision_width", "vision_depth", "vision_heads", "vision_mlp",
)  # fmt: skip
"""Sizes that lerobot's PI05Config has no setting for."""


def export_checkpoint(folder: Path, out: Path) -> dict[str, Any]:
    """Write a folder that lerobot's ``PI05Policy.from_pretrained`` loads strictly, whole or not at all.

    The processors' statistics and prompt are the checkpoint's: a prompt without the state becomes pi0's (the text and a
    newline). Its cameras are openpi's slots, ``observation.images.base_0_rgb`` and so on; lerobot masks those that an
    observation lacks. The critic and the tokenizer come along for the way back; lerobot does not read them.

    Args:
        folder: a pi0.5 checkpoint in any layout that :func:`~gsrl_core.policy.checkpoint.load_policy` reads.
        out: a new folder.

    Returns:
        Facts: tensors, dtype (of lerobot's policy), filled_with_zeros (names of tensors that nothing computes with).

    Raises:
        CheckpointError: ``folder`` cannot be read or is not pi0.5, its sizes are not those that lerobot builds, or
            ``out`` exists.
    """
    _require_new(out)
    config = read_config(folder)
    if config.family != "pi05":
        raise CheckpointError(f"{folder} is a {config.family} checkpoint; only pi05 can be exported")
    _require_full_size(folder, config)
    state, actions = read_norm_stats(folder, config)
    tokenizer = load_tokenizer(folder, config).path
    with torch.device("meta"):
        wanted = Pi05(config)
    _, network, heads, carried = read_tensors(folder, wanted, load_weights)
    settings = _settings(config, network, state.mean.numel(), actions.mean.numel())
    tensors, zeros = _with_unused(network, carried, settings, folder)
    facts = {"tensors": len(tensors), "dtype": settings.dtype, "filled_with_zeros": zeros}
    with replacing(out, ()) as fresh:
        settings.save_pretrained(fresh)
        save_tensors(fresh / "model.safetensors", tensors)
        _save_processors(fresh, config, settings, {"state": state, "actions": actions})
        if heads:
            save_tensors(fresh / "heads.safetensors", heads)
        write_bytes(fresh / "tokenizer.model", tokenizer.read_bytes())
        write_bytes(fresh / "README.md", _card(facts).encode())
    return facts


def import_checkpoint(
    folder: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    discrete_state: bool | None = None,
    asset_id: str | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of lerobot's, openpi's or RLinf's in this repository's layout; no bit of a weight changes.

    Args:
        folder: what :func:`~gsrl_core.policy.checkpoint.load_policy` reads, except that the tokenizer may be missing.
        out: a new folder.
        tokenizer: PaliGemma's SentencePiece file if it is neither in ``folder`` nor in openpi's cache.
        discrete_state: whether the prompt carries the state; None leaves it to ``folder``.
        asset_id: which norm_stats.json if there are several.

    Returns:
        Facts: tensors, horizon, discrete_state, normalization.

    Raises:
        CheckpointError: ``folder`` cannot be read, or ``out`` exists.
    """
    _require_new(out)
    config = read_config(folder, discrete_state)
    stats = read_norm_stats(folder, config, asset_id)
    tokenizer = load_tokenizer(folder, config, tokenizer).path
    with torch.device("meta"):
        wanted = Pi05(config)
    _, network, heads, carried = read_tensors(folder, wanted, load_weights)
    tensors = published_tensors(network, carried, config.family)
    # Under the id that they had, so that settings which read the one read the other.
    own_id = statistics_id(folder, asset_id)
    write_folder(out, config, tensors, tokenizer, *stats, heads, card="", asset_id=own_id)
    return {
        "tensors": len(tensors),
        "horizon": config.horizon,
        "discrete_state": config.discrete_state,
        "normalization": config.normalization,
    }


def _require_new(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} exists; a checkpoint is written to a new folder")


def _require_full_size(folder: Path, config: Pi05Config) -> None:
    sizes = {name: (getattr(config, name), getattr(PRESETS["pi05"], name)) for name in _FIXED}
    differing = [f"{name} {given} instead of {full}" for name, (given, full) in sizes.items() if given != full]
    if differing:
        raise CheckpointError(
            f"{folder} is not of pi0.5's full size, the only one that lerobot builds, so it cannot be exported: "
            f"{listed(differing, 3)}"
        )


def _settings(config: Pi05Config, network: Mapping[str, Tensor], state_width: int, action_width: int) -> PI05Config:
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    size = config.image_size
    mode = NormalizationMode(LEROBOT_MODES[config.normalization])
    images = {f"observation.images.{slot}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for slot in IMAGE_SLOTS}
    return PI05Config(
        dtype=_dtype(network),
        chunk_size=config.horizon,
        n_action_steps=config.horizon,
        max_state_dim=config.action_dim,
        max_action_dim=config.action_dim,
        image_resolution=(size, size),
        tokenizer_max_length=config.max_token_len,
        normalization_mapping={"VISUAL": NormalizationMode.IDENTITY, "STATE": mode, "ACTION": mode},
        input_features=images | {LEROBOT_FIELDS["state"]: PolicyFeature(FeatureType.STATE, (state_width,))},
        output_features={LEROBOT_FIELDS["actions"]: PolicyFeature(FeatureType.ACTION, (action_width,))},
        device="cpu",
        push_to_hub=False,
    )


def _dtype(network: Mapping[str, Tensor]) -> str:
    """bfloat16 if that loses nothing: lerobot converts what it loads."""
    narrow = all(
        tensor.dtype == torch.bfloat16
        for name, tensor in network.items()
        if name.startswith("paligemma_with_expert.") and not any(part in name for part in _WIDE)
    )
    return "bfloat16" if narrow else "float32"


def _with_unused(
    network: Mapping[str, Tensor], carried: Mapping[str, Tensor], settings: PI05Config, folder: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of lerobot's policy, and the names of those that had to be made up: nothing computes with them."""
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    with torch.device("meta"):
        wanted = PI05Pytorch(settings).state_dict()
    tensors = dict(network) | dict(carried)
    # lerobot would copy an lm_head over an embedding that is not there.
    tensors.setdefault(TIED_EMBEDDING, tensors[EMBEDDING].clone())
    zeros = [name for name in (UNUSED,) if name in wanted and name not in tensors]
    tensors |= {name: torch.zeros(wanted[name].shape, dtype=tensors[EMBEDDING].dtype) for name in zeros}
    check_names(tensors, wanted, f"{folder}, for lerobot's PI05Policy,")
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}, [_PREFIX + name for name in zeros]


def _save_processors(out: Path, config: Pi05Config, settings: PI05Config, fields: Mapping[str, FieldStats]) -> None:
    """The pipelines of lerobot's ``make_pi05_pre_post_processors``, without its download of the tokenizer."""
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        RelativeActionsProcessorStep,
        make_default_policy_processor_steps,
        make_policy_processor_pipelines,
    )

    statistics = {
        LEROBOT_FIELDS[name]: {key: row for key in STATISTICS if not (row := getattr(stats, key)).isnan().any()}
        for name, stats in fields.items()
    }
    steps = make_default_policy_processor_steps(settings, statistics)
    relative = RelativeActionsProcessorStep(enabled=False)
    prompt = (
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.action_dim)
        if config.discrete_state
        else Pi0NewLineProcessor()
    )
    before = [steps.rename_observations, steps.add_batch_dim, relative, steps.normalize, prompt]
    pipelines = make_policy_processor_pipelines(
        input_steps=[*before, _tokenizer_step(config.max_token_len), steps.to_device],
        output_steps=[
            steps.unnormalize,
            AbsoluteActionsProcessorStep(enabled=False, relative_step=relative),
            steps.to_cpu,
        ],
    )
    for pipeline in pipelines:
        pipeline.save_pretrained(out)


def _tokenizer_step(max_length: int) -> Any:
    from lerobot.processor import TokenizerProcessorStep

    # By name, it would download the tokenizer now; what is saved is the name.
    step = TokenizerProcessorStep(tokenizer=object(), max_length=max_length)
    step.tokenizer, step.tokenizer_name = None, TOKENIZER
    return step


def _card(facts: Mapping[str, Any]) -> str:
    filler = ", ".join(facts["filled_with_zeros"]) or "none"
    return f"""---
library_name: lerobot
pipeline_tag: robotics
---

# pi0.5, exported by real2sim2real

For `lerobot.policies.pi05.PI05Policy.from_pretrained` and `make_pre_post_processors` (tokenizer: {TOKENIZER}).

Tensors filled with zeros, because the checkpoint lacks them and nothing computes with them: {filler}.
"""
