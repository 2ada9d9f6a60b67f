"""Flow-matching supervised fine-tuning of pi0.5 and pi0 on demonstrations; resumes to the same numbers."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsrl_core.artifacts import digest_folder
from gsrl_core.errors import CheckpointError
from gsrl_core.interfaces import Reporter
from gsrl_core.policy.card import model_card
from gsrl_core.policy.checkpoint import load_network, load_tokenizer, read_config, read_norm_stats, write_checkpoint
from gsrl_core.policy.config import Pi05Config, preset
from gsrl_core.policy.demonstrations import Demonstrations, load_demonstrations, split_rows
from gsrl_core.policy.files import require_replaceable
from gsrl_core.policy.frames import FrameSet, picture_bytes
from gsrl_core.policy.pi05 import Pi05, initialise
from gsrl_core.policy.sft_memory import Footprint, picture_device
from gsrl_core.policy.sft_trainer import SftTrainer, trained_parameters
from gsrl_core.policy.statistics import require_asset_id, statistics_id
from gsrl_core.policy.storage import GIB, free_memory
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import FieldStats, Normalizer
from gsrl_core.sections import SftConfig

logger = logging.getLogger(__name__)

TINY_TOKENIZER = Path(__file__).parent / "bundled" / "pi05_tiny" / "tokenizer.model"
FROM_RANDOM = ("pi05_tiny", "pi05_small")
"""Sizes that can be trained from random weights; they share the tiny tokenizer."""


@dataclass
class _Parts:
    """What a checkpoint is made of."""

    network: Pi05
    tokenizer: PromptTokenizer
    state_stats: FieldStats
    action_stats: FieldStats
    carried: dict[str, Tensor]
    asset_id: str | None


def train_sft(
    demos: Path,
    out: Path,
    init: Path | None,
    model: str,
    config: SftConfig,
    *,
    device: torch.device | str,
    reporter: Reporter,
    workspace: Path | None = None,
    command: str = "",
    discrete_state: bool | None = None,
    asset_id: str | None = None,
) -> dict[str, Any]:
    """Train on the demonstrations in ``demos`` and write a checkpoint folder to ``out``.

    Args:
        demos: folder written by :func:`gsrl_core.demos.collect_demos` or `gsrl_core.lerobot_data.import_lerobot`.
        out: checkpoint folder (openpi layout).
        init: checkpoint to start from, with its statistics and tokenizer; None starts from random weights.
        model: name of the sizes for a random start; ``pi05_tiny`` and ``pi05_small`` share a tokenizer of their own.
        config: the ``sft`` section.
        device: where to train.
        reporter: told losses and progress.
        workspace: where the resumable state lives; by default ``<out>.work``. Removed at the end, unless the learning
            rate is planned beyond it (``decay_steps``), so that the run can be prolonged.
        command: what made this checkpoint, for the model card.
        discrete_state: whether the prompt carries the state; None leaves it to ``init`` or ``model``.
        asset_id: which norm_stats.json of ``init`` if there are several, and the id of those that are written.

    Returns:
        Facts: steps, held_out_loss (None with fewer than 20 episodes), steps per second, counts.

    Raises:
        CheckpointError: ``init`` or ``model`` cannot be used or does not fit the demonstrations, or ``out`` cannot be
            replaced.
        TrainingError: no demonstrations, too many for the memory, non-finite numbers, or a workspace of another run.
    """
    workspace = workspace or out.with_name(out.name + ".work")
    require_replaceable(out)
    if asset_id is not None:
        require_asset_id(asset_id)
    demonstrations = load_demonstrations(demos)
    inputs = {"demos": digest_folder(demos), "init": digest_folder(init) if init else model}
    choices = {"discrete_state": str(discrete_state), "asset_id": str(asset_id)}
    parts = _start(init, model, config, demonstrations, device, discrete_state, asset_id)
    frames = _frames(parts, config, demonstrations, torch.device(device))
    split = split_rows(demonstrations)
    trainer = SftTrainer(parts.network, frames, split, config, workspace, reporter, inputs | choices)
    facts = trainer.run() | {"frames": len(frames), "episodes": len(demonstrations.episodes())}
    trainer.adopt_average()
    _write(out, parts, facts, config, command, inputs["demos"])
    if config.decay_steps is None or config.decay_steps <= config.steps:
        shutil.rmtree(workspace, ignore_errors=True)
    return facts


def _start(
    init: Path | None,
    model: str,
    config: SftConfig,
    demonstrations: Demonstrations,
    device: torch.device | str,
    discrete_state: bool | None = None,
    asset_id: str | None = None,
) -> _Parts:
    stats = FieldStats.of(demonstrations.state), FieldStats.of(demonstrations.action)
    if init is not None:
        sizes = read_config(init, discrete_state)
        precision = config.precision if config.trainable == "expert" else "float32"
        network, _, carried = load_network(init, sizes, precision, device)
        if config.stats == "init":
            stats = _fitting_stats(init, sizes, asset_id, demonstrations)
            asset_id = statistics_id(init, asset_id)
        parts = _Parts(network, load_tokenizer(init, sizes), *stats, carried, asset_id)
    else:
        sizes = preset(model)
        if discrete_state is not None:
            sizes = replace(sizes, discrete_state=discrete_state)
        if model not in FROM_RANDOM:
            raise CheckpointError(f"{model} is not trained from random weights; give a checkpoint to start from")
        if config.trainable == "expert":
            raise CheckpointError(
                "sft.trainable is expert, which leaves the vision-language model as it starts: at random weights; give "
                "a checkpoint to start from, or set it to all"
            )
        network = Pi05(sizes)
        initialise(network, config.seed)
        tokenizer = PromptTokenizer(TINY_TOKENIZER, sizes.max_token_len, sizes.discrete_state)
        parts = _Parts(network.to(device), tokenizer, *stats, {}, asset_id)
    parts.network.compute_dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    parts.network.gradient_checkpointing = config.gradient_checkpointing
    return parts


def _fitting_stats(
    init: Path, sizes: Pi05Config, asset_id: str | None, demonstrations: Demonstrations
) -> tuple[FieldStats, FieldStats]:
    """State and action statistics of a checkpoint, for data of the same widths."""
    stats = read_norm_stats(init, sizes, asset_id)
    own, given = (
        "/".join(str(len(field)) for field in fields)
        for fields in ([s.mean for s in stats], [demonstrations.state.T, demonstrations.action.T])
    )
    if own != given:
        raise CheckpointError(
            f"the statistics of {init} are of {own} values (state/action), the demonstrations have {given}; set "
            "sft.stats to demos to train with the demonstrations' own, or choose a checkpoint of the same robot"
        )
    return stats


def _frames(parts: _Parts, config: SftConfig, demonstrations: Demonstrations, device: torch.device) -> FrameSet:
    """The samples, on the device if the memory estimate, which is logged, allows."""
    network = parts.network
    needed = Footprint.of(
        network.parameters(),
        trained_parameters(network, config).values(),
        picture_bytes(demonstrations, network.config),
    )
    free = free_memory(device)
    images_on = picture_device(needed, free, device)
    logger.info(
        "memory beside activations [GiB]: %s; free are %.3g GiB on the device and %.3g GiB on the host; pictures: %s",
        needed, free.device / GIB, free.host / GIB, images_on,
    )  # fmt: skip
    mode = network.config.normalization
    normalizers = Normalizer(parts.state_stats, mode), Normalizer(parts.action_stats, mode)
    return FrameSet.build(demonstrations, network.config, parts.tokenizer, normalizers, device, images_on)


def _write(out: Path, parts: _Parts, facts: dict[str, Any], config: SftConfig, command: str, digest: str) -> None:
    write_checkpoint(
        out,
        network=parts.network,
        tokenizer=parts.tokenizer.path,
        state_stats=parts.state_stats,
        action_stats=parts.action_stats,
        heads={},
        carried=parts.carried,
        card=model_card(parts.network.config, facts, config.model_dump(mode="json"), command, digest),
        asset_id=parts.asset_id,
    )
