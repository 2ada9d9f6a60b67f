"""Flow-matching supervised fine-tuning of pi0.5 on demonstrations; resumes to the same numbers."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsrl_core.artifacts import digest_folder
from gsrl_core.errors import CheckpointError, TrainingError
from gsrl_core.interfaces import Reporter
from gsrl_core.policy.card import model_card
from gsrl_core.policy.checkpoint import load_network, load_tokenizer, read_config, read_norm_stats, write_checkpoint
from gsrl_core.policy.config import preset
from gsrl_core.policy.demonstrations import Demonstrations, load_demonstrations, split_rows
from gsrl_core.policy.files import require_replaceable
from gsrl_core.policy.flow import flow_matching_target, sample_training_time
from gsrl_core.policy.frames import FrameSet, augment
from gsrl_core.policy.pi05 import Pi05, initialise
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import FieldStats, Normalizer
from gsrl_core.sections import SftConfig
from gsrl_core.states import load_state, save_state

logger = logging.getLogger(__name__)

TINY_TOKENIZER = Path(__file__).parent / "bundled" / "pi05_tiny" / "tokenizer.model"
FROM_RANDOM = ("pi05_tiny", "pi05_small")
"""Sizes that can be trained from random weights; they share the tiny tokenizer."""
LOG_EVERY = 100
MAX_GRAD_NORM = 1.0
FINAL_LEARNING_RATE = 0.1
"""The cosine ends at this fraction of the peak."""


@dataclass
class _Parts:
    """What a checkpoint is made of."""

    network: Pi05
    tokenizer: PromptTokenizer
    state_stats: FieldStats
    action_stats: FieldStats
    carried: dict[str, Tensor]


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
        workspace: where the resumable state lives; by default ``<out>.work``. Removed at the end.
        command: what made this checkpoint, for the model card.

    Returns:
        Facts: steps, held_out_loss (None with fewer than 20 episodes), steps per second, counts.

    Raises:
        CheckpointError: ``init`` or ``model`` cannot be used, or ``out`` cannot be replaced.
        TrainingError: no demonstrations, non-finite loss, or a workspace of another run.
    """
    workspace = workspace or out.with_name(out.name + ".work")
    require_replaceable(out)
    demonstrations = load_demonstrations(demos)
    inputs = {"demos": digest_folder(demos), "init": digest_folder(init) if init else model}
    parts = _start(init, model, config, demonstrations, device)
    normalizers = tuple(
        Normalizer(stats, parts.network.config.normalization) for stats in (parts.state_stats, parts.action_stats)
    )
    frames = FrameSet.build(demonstrations, parts.network.config, parts.tokenizer, normalizers, device)
    trainer = _Trainer(parts.network, frames, split_rows(demonstrations), config, workspace, reporter, inputs)
    facts = trainer.run() | {"frames": len(frames), "episodes": len(demonstrations.episodes())}
    parts.network = trainer.average
    _write(out, parts, facts, config, command, inputs["demos"])
    shutil.rmtree(workspace, ignore_errors=True)
    return facts


class _Trainer:
    """The loop. Every random number of step k follows from (seed, k), so a resumed run repeats exactly."""

    def __init__(
        self,
        network: Pi05,
        frames: FrameSet,
        split: tuple[Tensor, Tensor],
        config: SftConfig,
        workspace: Path,
        reporter: Reporter,
        inputs: Mapping[str, str],
    ) -> None:
        self.network, self.frames, self.config, self.reporter = network, frames, config, reporter
        self.train_rows, self.held_out_rows = split
        self.device = network.action_in_proj.weight.device
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.step = 0
        self._state_path = workspace / "state.pt"
        # What decides every number: a state with another key belongs to another run.
        self._key = {"config": config.model_dump(mode="json"), "frames": len(frames), **inputs}
        self._resume()

    def run(self) -> dict[str, Any]:
        """Train to the last step. Returns facts."""
        started, first = time.perf_counter(), self.step
        losses: list[Tensor] = []
        while self.step < self.config.steps:
            losses.append(self._train_step())
            self.step += 1
            last = self.step == self.config.steps
            if last or self.step % LOG_EVERY == 0:
                rate = (self.step - first) / (time.perf_counter() - started)
                self._log(torch.stack(losses).mean().item(), rate)
                losses.clear()
            if last or self.step % self.config.checkpoint_every == 0:
                self._save()
        self._synchronize()
        elapsed = time.perf_counter() - started
        held_out = self._held_out_metrics()
        if held_out:
            self.reporter.metrics(held_out, self.step)
        return {
            "steps": self.step,
            "held_out_loss": held_out.get("sft/held_out_loss"),
            "steps_per_second": (self.step - first) / elapsed,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
        }

    @torch.no_grad()
    def _held_out_metrics(self, samples: int = 1024, batch: int = 128) -> dict[str, float]:
        """Flow-matching loss of the averaged weights on episodes that are not trained on, if any, with fixed noise."""
        if not len(self.held_out_rows):
            return {}
        generator = torch.Generator().manual_seed(self.config.seed)
        pick = torch.randint(len(self.held_out_rows), (samples,), generator=generator)
        total = 0.0
        for index in self.held_out_rows[pick].split(batch):
            total += self._loss(self.average, index, generator, augmented=False).item() * len(index)
        return {"sft/held_out_loss": total / samples}

    def _train_step(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 2**32 + self.step)
        pick = torch.randint(len(self.train_rows), (self.config.batch_size,), generator=generator)
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self.network, self.train_rows[pick], generator, augmented=self.config.image_augmentation)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        # A young average would otherwise remember the random start.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), self.parameters, 1.0 - decay)
        return loss.detach()

    def _loss(self, network: Pi05, index: Tensor, generator: torch.Generator, *, augmented: bool) -> Tensor:
        """Mean squared error of the velocity over horizon and padded width."""
        actions = self.frames.chunks[index]
        noise = torch.randn(actions.shape, generator=generator)
        t = sample_training_time(len(index), generator)
        x_t, target = (part.to(self.device, non_blocking=True) for part in flow_matching_target(actions, noise, t))
        images = self.frames.pictures(index)
        if augmented:
            images = augment(images, generator)
        masks = dict.fromkeys(images, torch.ones(len(index), dtype=torch.bool))
        tokens = self.frames.tokens[index].to(self.device, non_blocking=True)
        prefix = network.embed_prefix(images, masks, tokens, self.frames.token_mask[index])
        velocity = network.velocity(prefix, x_t, t.to(self.device, non_blocking=True))
        return (velocity - target).square().mean()

    def _log(self, loss: float, rate: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite at step {self.step}; lower sft.learning_rate (now {self.config.learning_rate})"
            )
        numbers = {"sft/loss": loss, "sft/steps_per_second": rate}
        numbers["sft/learning_rate"] = learning_rate(self.step - 1, self.config)
        if self.step % (10 * LOG_EVERY) == 0:
            numbers |= self._held_out_metrics()
        self.reporter.metrics(numbers, self.step)
        self.reporter.progress(self.step / self.config.steps, f"step {self.step}, loss {loss:.4f}")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "key": self._key,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self._state_path, state)

    def _resume(self) -> None:
        state = load_state(self._state_path, ("key", "step", "network", "average", "optimizer"), self.device)
        if state is None:
            return
        if state["key"] != self._key:
            changed = sorted(name for name in self._key if state["key"].get(name) != self._key[name])
            raise TrainingError(
                f"{self._state_path.parent} holds the state of a run with other settings or inputs "
                f"({', '.join(changed)}); delete it to start again"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def learning_rate(step: int, config: SftConfig) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it at ``decay_steps`` (the last step if not given)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.steps if config.decay_steps is None else config.decay_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (FINAL_LEARNING_RATE + (1.0 - FINAL_LEARNING_RATE) * cosine)


def _start(
    init: Path | None, model: str, config: SftConfig, demonstrations: Demonstrations, device: torch.device | str
) -> _Parts:
    if init is not None:
        sizes = read_config(init)
        if sizes.family != "pi05":
            raise CheckpointError(f"{init} is a {sizes.family} checkpoint; supervised fine-tuning knows pi05 only")
        network, _, carried = load_network(init, sizes, "float32", device)
        # Its own statistics: with others the weights would mean other motions.
        parts = _Parts(network, load_tokenizer(init, sizes), *read_norm_stats(init), carried)
    else:
        sizes = preset(model)
        if model not in FROM_RANDOM:
            raise CheckpointError(f"{model} is not trained from random weights; give a checkpoint to start from")
        network = Pi05(sizes)
        initialise(network, config.seed)
        stats = FieldStats.of(demonstrations.state), FieldStats.of(demonstrations.action)
        tokenizer = PromptTokenizer(TINY_TOKENIZER, sizes.max_token_len, sizes.discrete_state)
        parts = _Parts(network.to(device), tokenizer, *stats, {})
    parts.network.compute_dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    parts.network.gradient_checkpointing = config.gradient_checkpointing
    return parts


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
    )
