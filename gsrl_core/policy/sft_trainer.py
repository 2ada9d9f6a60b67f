"""The loop of supervised fine-tuning: accumulate, step, average, save; resumes to the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gsrl_core.errors import TrainingError, listed
from gsrl_core.interfaces import Reporter
from gsrl_core.policy.finite import FirstFailure, non_finite
from gsrl_core.policy.frames import FrameSet
from gsrl_core.policy.matching import Batch, matching_loss
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.sections import SftConfig
from gsrl_core.states import load_state, save_state

LOG_EVERY = 100
"""Steps over which a reported loss is the mean."""
MAX_GRAD_NORM = 1.0
FINAL_LEARNING_RATE = 0.1
"""The cosine ends at this fraction of the peak."""
_SHOWN = 3
"""Tensors that a message names."""


class SftTrainer:
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
        self.trained = trained_parameters(network, config)
        self.parameters = list(self.trained.values())
        network.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.step = 0
        self._losses: list[Tensor] = []
        """Of the steps since the last multiple of LOG_EVERY."""
        self._failure = FirstFailure(self.device)
        self._saved: int | None = None
        self._state_path = workspace / "state.pt"
        self._key = {"config": deciding(config), "frames": len(frames), **inputs}
        self._resume()

    def run(self) -> dict[str, Any]:
        """Train to the last step. Returns facts."""
        started, first = time.perf_counter(), self.step
        while self.step < self.config.steps:
            self._losses.append(self._train_step())
            self.step += 1
            last = self.step == self.config.steps
            if last or self.step % LOG_EVERY == 0:
                self._log((self.step - first) / (time.perf_counter() - started))
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
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
        }

    def adopt_average(self) -> None:
        """Put the averaged weights into the network, for good."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(self.average.values()))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with the averaged weights, for a while and without a copy."""
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.average.values(), strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    @torch.no_grad()
    def _held_out_metrics(self, samples: int = 1024, batch: int = 128) -> dict[str, float]:
        """Flow-matching loss of the averaged weights on episodes that are not trained on, if any, with fixed noise."""
        if not len(self.held_out_rows):
            return {}
        generator = torch.Generator().manual_seed(self.config.seed)
        pick = torch.randint(len(self.held_out_rows), (samples,), generator=generator)
        total = 0.0
        with self._averaged():
            for index in self.held_out_rows[pick].split(batch):
                drawn = Batch.draw(self.frames, index, generator, augmented=False)
                total += matching_loss(self.network, self.frames, drawn).item() * len(index)
        return {"sft/held_out_loss": total / samples}

    def _train_step(self) -> Tensor:
        """One optimizer step, or none if a number is not finite, now or before. Returns the loss."""
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate(self.step)
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.found_inf = self._failure.note(self.step + 1, loss, norm)
        self.optimizer.step()
        # A young average would otherwise remember the random start.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), self.parameters, 1.0 - decay)
        return loss

    def _accumulate(self, step: int) -> Tensor:
        """Leave the gradients of the batch of ``step`` (from 0) in the parameters. Returns its loss."""
        batch_size = self.config.batch_size
        generator = torch.Generator().manual_seed(self.config.seed * 2**32 + step)
        pick = torch.randint(len(self.train_rows), (batch_size,), generator=generator)
        batch = Batch.draw(self.frames, self.train_rows[pick], generator, augmented=self.config.image_augmentation)
        self.optimizer.zero_grad(set_to_none=True)
        micro_batch = self.config.micro_batch or batch_size
        losses = []
        for part in batch.split(micro_batch):
            loss = matching_loss(self.network, self.frames, part) * (micro_batch / batch_size)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _log(self, rate: float) -> None:
        self._require_finite_steps()
        loss = torch.stack(self._losses).mean().item()
        # The last step of a run that may be prolonged reports in between.
        if self.step % LOG_EVERY == 0:
            self._losses.clear()
        numbers = {"sft/loss": loss, "sft/steps_per_second": rate}
        numbers["sft/learning_rate"] = learning_rate(self.step - 1, self.config)
        if self.step % (10 * LOG_EVERY) == 0:
            numbers |= self._held_out_metrics()
        self.reporter.metrics(numbers, self.step)
        self.reporter.progress(self.step / self.config.steps, f"step {self.step}, loss {loss:.4f}")

    def _require_finite_steps(self) -> None:
        """Raise TrainingError that names step and tensors if a step since the last look had a non-finite number."""
        if not (step := self._failure.step()):
            return
        # The weights are still those of that step, and so are its random numbers: it can be looked at again.
        loss = self._accumulate(step - 1)
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        found = ["the loss"] if non_finite({"loss": loss}) else []
        for kind, tensors in (("weights", dict(self.network.named_parameters())), ("gradients", gradients)):
            if names := non_finite(tensors):
                found.append(f"the {kind} {listed(names, _SHOWN)}")
        # Finite gradients can have a norm that is not.
        what = "; ".join(found) or "the norm of the gradients, none of which is alone"
        raise TrainingError(f"not finite in step {step}: {what}; {self._advice()}")

    def _save(self) -> None:
        self._require_finite_steps()
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        optimizer = self.optimizer.state_dict()
        names = list(self.trained)
        held = {f"weights {name}": tensor for name, tensor in weights.items()}
        held |= {f"average {name}": tensor for name, tensor in self.average.items()}
        held |= {f"{key} {names[i]}": tensor for i, own in optimizer["state"].items() for key, tensor in own.items()}
        if broken := non_finite(held):
            raise TrainingError(f"not finite after step {self.step}: {listed(broken, _SHOWN)}; {self._advice()}")
        state = {
            "step": self.step,
            "key": self._key,
            "weights": weights,
            "average": self.average,
            "optimizer": optimizer,
            "losses": [loss.item() for loss in self._losses],
        }
        save_state(self._state_path, state)
        self._saved = self.step

    def _advice(self) -> str:
        kept = "no state was saved yet" if self._saved is None else f"the state of step {self._saved} is kept"
        return (
            f"{kept} in {self._state_path.parent}. Lower sft.learning_rate (now {self.config.learning_rate}) and "
            "train anew, or look for such numbers in the demonstrations"
        )

    def _resume(self) -> None:
        entries = ("key", "step", "weights", "average", "optimizer", "losses")
        state = load_state(self._state_path, entries, self.device)
        if state is None:
            return
        if state["key"] != self._key:
            changed = _differing(state["key"], self._key)
            raise TrainingError(
                f"{self._state_path.parent} holds the state of a run with other settings or inputs "
                f"({', '.join(changed)}); delete it to start again"
            )
        if state["step"] > self.config.steps:
            raise TrainingError(
                f"{self._state_path.parent} holds the state of step {state['step']}, and sft.steps is "
                f"{self.config.steps}; ask for more steps, or delete it to start again"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self._saved = state["step"]
        self._losses = list(torch.tensor(state["losses"], device=self.device).unbind())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def trained_parameters(network: Pi05, config: SftConfig) -> dict[str, nn.Parameter]:
    """What ``sft.trainable`` says, by name."""
    return network.trainable_in_ppo() if config.trainable == "expert" else dict(network.named_parameters())


def deciding(config: SftConfig) -> dict[str, Any]:
    """The settings that decide the numbers of past steps: a state with others belongs to another run."""
    harmless = {"checkpoint_every", "gradient_checkpointing"}
    if config.decay_steps is not None:
        harmless.add("steps")
    return config.model_dump(mode="json", exclude=harmless)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the entries that differ; of those that are mappings themselves, ``name.entry``."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += [f"{name}.{inner}" for inner in _differing(was, now)]
        elif was != now:
            found.append(name)
    return found


def learning_rate(step: int, config: SftConfig) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it at ``decay_steps`` (the last step if not given)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    end = config.steps if config.decay_steps is None else config.decay_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (FINAL_LEARNING_RATE + (1.0 - FINAL_LEARNING_RATE) * cosine)
