"""Proximal policy optimisation of a chunk policy, data-parallel over any number of processes.

Every process holds its own rollout, and all draw the same permutation of the union of samples: a minibatch is the same
set of samples, and the update the same up to rounding, whatever the number of processes. All go through a minibatch in
the same number of passes, because sharded weights are gathered in every pass by all processes together.

The rollout's log-probabilities may be of another arithmetic than the learner's: a compiled sampler in bfloat16 is off
by delta_mean / std in each of a chunk's entries, which for pi0.5 adds up to several hundredths, and the surrogate's
ratio starts beside 1. Where that is so, the learner evaluates all samples first, and its numbers are the old ones.

A sample is a chunk, with one advantage. Its ratio may be one number, or one for each executed action, or one for each
entry of those (:data:`~gsrl_core.interfaces.Level`). The advantage is that of all its entries, and the actor's loss is
the mean over them: at ratio 1 the gradient is the chunk's divided by their number. An episode that ends inside a chunk
does not mask the rest of it, as the policy chose it all the same (RLinf masks whole chunks likewise). Estimates of the
KL divergence are sums over a chunk's ratios, which have the same expectation at all levels (the chain rule); a sum of
k3 over entries is larger on the same samples than k3 of the sum. Its penalty is a mean over ratios, as the surrogate
that it is weighed against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from gsrl_core.errors import TrainingError
from gsrl_core.interfaces import Level, Policy
from gsrl_core.rl import losses
from gsrl_core.rl.returns import generalized_advantages
from gsrl_core.rl.rollout import Rollout
from gsrl_core.sharding import memory_of, own_part, reduce_gradients, whole


class TrainablePolicy(Policy, Protocol):
    """A policy whose weights PPO may change."""

    sharded: FSDPModule | None
    """What :meth:`shard` made: its backward pass sums gradients over all processes. None before."""

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep only this process's part of all weights, from now on; then the policy can be evaluated, but not act."""
        ...

    def trainable_parameters(self) -> Mapping[str, list[nn.Parameter]]:
        """``{"actor": [...], "critic": [...]}``, disjoint, always in the same order."""
        ...

    def state_dict_trainable(self) -> Mapping[str, Tensor]:
        """The same tensors by name, sharing their memory."""
        ...

    def keep_prefixes(
        self, where: Literal["auto", "device", "host", "recompute"], samples: int, micro_batch: int
    ) -> None:
        """Say how what its chains hold of ``samples`` samples is kept until updates in passes of ``micro_batch``."""
        ...

    def set_levels(self, log_prob: Level, entropy: Level) -> None:
        """Say what one number of later log-probabilities and entropies belongs to; both are ``chunk`` until then."""
        ...


class Collective(Protocol):
    """What processes that train together do together."""

    rank: int
    world_size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """The equally shaped tensors of all processes, stacked by rank: [world_size, ...]."""
        ...


@dataclass(frozen=True)
class PpoSettings:
    """Constants of the update; meanings and ranges are those of the ``ppo`` section of the configuration."""

    iterations: int
    update_epochs: int
    global_batch: int
    micro_batch: int
    learning_rate: float
    value_learning_rate: float
    warmup_steps: int
    lr_schedule: Literal["constant", "cosine"]
    weight_decay: float
    max_grad_norm: float
    gamma: float
    gae_lambda: float
    clip_low: float
    clip_high: float
    dual_clip: float | None
    value_clip: float
    huber_delta: float
    value_coef: float
    entropy_coef: float
    kl_coef: float
    target_kl: float | None
    critic_warmup_iterations: int
    normalize_advantages: bool
    recompute_log_prob: Literal["auto", "on", "off"]
    seed: int


@dataclass(frozen=True)
class _Batch:
    """The N samples of this process, aligned with the rows of the rollout's chain."""

    log_prob: Tensor
    """[N], or with one or two more dimensions at a finer level; the others are [N]."""
    value: Tensor
    advantages: Tensor
    returns: Tensor


TOLERATED_MISMATCH = 1e-3
"""Of a log-probability between rollout and learner. Float32 is off by about 1e-5, bfloat16 by some 1e-2."""

BUCKET = 1 << 24
"""Gradients that are summed over processes at once: few calls, and a copy of 64 MiB rather than of all of them."""

# Sums over samples that every minibatch collects, in this order.
_SUMS = ("loss", "value_loss", "entropy", "approx_kl", "kl_k3", "pg_clipfrac", "value_clip_ratio", "total_loss")
_ALIASES = {
    "actor/policy_loss": "actor/loss", "actor/clip_fraction": "actor/pg_clipfrac",
    "critic/value_loss": "actor/value_loss", "critic/value_clip_ratio": "actor/value_clip_ratio",
}  # fmt: skip
# Tensors of a pass that are checked for non-finite numbers, in this order.
_CHECKED = ("advantages", "entropy", "log_prob", "loss", "old_log_prob", "old_value", "returns", "value")


class Learner:
    """Updates a policy from rollouts; owns the optimizer and the shuffling."""

    def __init__(self, policy: TrainablePolicy, settings: PpoSettings, collective: Collective) -> None:
        self.policy, self.settings, self.collective = policy, settings, collective
        given = policy.trainable_parameters()
        if set(given) != {"actor", "critic"} or not all(given.values()):
            raise TrainingError(f"trainable parameters must be of 'actor' and 'critic'; given {sorted(given)}")
        self.groups = {name: list(given[name]) for name in ("actor", "critic")}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.groups["actor"], "lr": settings.learning_rate},
                {"params": self.groups["critic"], "lr": settings.value_learning_rate},
            ],
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            # The others need temporary copies of all parameters.
            fused=all(parameter.is_cuda for group in self.groups.values() for parameter in group) or None,
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.steps = dict.fromkeys(self.groups, 0)
        """Optimizer steps that each group has made."""
        self.iteration = 0
        """Updates done so far."""
        self._at = ""
        """Where in training the learner is, for messages: counted from 1, as progress and metrics are."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One iteration: ``update_epochs`` passes over the rollouts of all processes. Returns metrics by name.

        Raises:
            TrainingError: no samples, or a number that is not finite (the weights are those before the bad step).
        """
        batch, metrics = self._prepare(rollout)
        counts = self.collective.gather(torch.tensor([rollout.num_samples])).reshape(-1)
        if self.policy.sharded is not None and not counts.all():
            raise TrainingError(f"processes of sharded weights need samples each; given {counts.tolist()}")
        warming_up = self.iteration < self.settings.critic_warmup_iterations
        sums = torch.zeros(len(_SUMS), dtype=torch.float64)
        norms, seen, stopped = [], 0, False
        minibatches = self._minibatches(int(counts.sum()))
        shares = [self._passes(minibatch, counts) for minibatch in minibatches]
        first_epoch = shares[: len(shares) // self.settings.update_epochs]
        batch, mismatch = self._in_own_arithmetic(rollout, batch, [piece for share in first_epoch for piece in share])
        metrics |= mismatch
        for number, (minibatch, share) in enumerate(zip(minibatches, shares, strict=True)):
            self._at = self._position(number, len(minibatches))
            minibatch_sums = self._accumulate_gradients(rollout, batch, share, len(minibatch), warming_up)
            sums += minibatch_sums
            seen += len(minibatch)
            mean_kl = float(minibatch_sums[_SUMS.index("kl_k3")]) / len(minibatch)
            if self.settings.target_kl is not None and mean_kl > 1.5 * self.settings.target_kl:
                stopped = True
                break
            norms.append(self._step())
        self.optimizer.zero_grad(set_to_none=True)
        self.iteration += 1
        metrics |= {f"actor/{name}": value for name, value in zip(_SUMS, (sums / seen).tolist(), strict=True)}
        # As they are called in RLinf's code; the first names are those of the seed's specification.
        metrics |= {alias: metrics[name] for alias, name in _ALIASES.items()}
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            metrics[f"{name}/learning_rate"] = group["lr"] if norms else 0.0
        metrics["actor/grad_norm"] = sum(norms) / max(1, len(norms))
        metrics["actor/optimizer_steps"] = float(len(norms))
        metrics["actor/stopped_by_kl"] = float(stopped)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All that a restart needs to go on with the same numbers. Shares memory with the running learner.

        Sharded tensors stay sharded; :func:`~gsrl_core.sharding.whole` gives what any number of processes can load.
        """
        return {
            "iteration": self.iteration,
            "steps": dict(self.steps),
            "parameters": {name: [p.detach() for p in group] for name, group in self.groups.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned, be it of whole or of sharded weights.

        Raises TrainingError if it belongs to another policy.
        """
        stored = {name: [tuple(t.shape) for t in group] for name, group in state["parameters"].items()}
        own = {name: [tuple(p.shape) for p in group] for name, group in self.groups.items()}
        if stored != own:
            raise TrainingError(
                "the training state was saved for a policy with other trainable parameters; use the checkpoint that "
                "this run started from, or delete the workspace"
            )
        with torch.no_grad():
            for name, group in self.groups.items():
                for parameter, value in zip(group, state["parameters"][name], strict=True):
                    parameter.copy_(own_part(value, parameter))
        parameters = [*self.groups["actor"], *self.groups["critic"]]
        moments = {
            index: {name: v if name == "step" else own_part(v, parameters[index]) for name, v in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.generator.set_state(state["generator"].cpu())
        self.iteration, self.steps = state["iteration"], dict(state["steps"])

    def _prepare(self, rollout: Rollout) -> tuple[_Batch, dict[str, float]]:
        advantages, returns = generalized_advantages(
            rollout.reward, rollout.value, rollout.next_value, rollout.terminated, rollout.truncated, rollout.valid,
            gamma=self.settings.gamma, gae_lambda=self.settings.gae_lambda,
        )  # fmt: skip
        raw = rollout.samples(advantages).double()
        batch_returns, value = rollout.samples(returns), rollout.samples(rollout.value)
        totals = self.collective.sum(torch.stack([torch.ones_like(raw), raw, batch_returns.double()]).sum(1))
        count, mean_advantage, mean_return = float(totals[0]), *(totals[1:] / totals[0].clamp(min=1)).tolist()
        if not count:
            raise TrainingError("the rollout holds no valid sample; nothing can be learned from it")
        squares = self.collective.sum(((raw - mean_advantage) ** 2).sum()[None])
        std = math.sqrt(float(squares) / count)
        scaled = (raw - mean_advantage) / (std + 1e-5) if self.settings.normalize_advantages else raw
        metrics = {
            "rollout/advantages_mean": mean_advantage,
            "rollout/advantages_std": std,
            "rollout/returns_mean": mean_return,
            "rollout/samples": count,
            "critic/explained_variance": self._explained_variance(value, batch_returns, count),
        }
        for name, samples in (("advantages", raw), ("returns", batch_returns)):
            metrics[f"rollout/{name}_min"], metrics[f"rollout/{name}_max"] = self._range(samples)
        return _Batch(rollout.samples(rollout.log_prob), value, scaled.float(), batch_returns), metrics

    def _range(self, samples: Tensor) -> tuple[float, float]:
        """Smallest and largest of all processes' samples [N]; some may have none."""
        nothing = samples.new_tensor([math.inf, -math.inf])
        own = torch.stack([samples.min(), samples.max()]) if len(samples) else nothing
        lowest, highest = self.collective.gather(own.double()).unbind(dim=1)
        return float(lowest.min()), float(highest.max())

    def _explained_variance(self, value: Tensor, returns: Tensor, count: float) -> float:
        """1 - Var(R - V) / Var(R) of all processes' samples; 0 is no better than a constant, and for constant R."""
        both = torch.stack([returns.double(), returns.double() - value.double()])
        mean = self.collective.sum(both.sum(1)) / count
        variance = self.collective.sum(((both - mean[:, None]) ** 2).sum(1))
        return float(1 - variance[1] / variance[0]) if variance[0] > 0 else 0.0

    def _in_own_arithmetic(
        self, rollout: Rollout, batch: _Batch, passes: Sequence[Tensor]
    ) -> tuple[_Batch, dict[str, float]]:
        """The batch with old log-probabilities and values of the learner's own evaluation, where that is wanted.

        ``auto`` looks at one pass of each process and goes on where a log-probability is off by more than
        ``TOLERATED_MISMATCH`` in any of them. The metrics are of the samples that were looked at.

        Args:
            rollout: of this process.
            batch: its samples.
            passes: of the first epoch. The samples are evaluated in the same ones, because kernels and with them the
                rounding depend on a batch's shape.
        """
        wanted = self.settings.recompute_log_prob
        looked_at = passes if wanted == "on" else passes[:1]
        evaluated = self._evaluate(rollout, batch, looked_at)
        metrics = self._mismatch(batch, evaluated, looked_at)
        if wanted == "auto" and metrics["rollout/log_prob_mismatch_max"] > TOLERATED_MISMATCH:
            wanted, evaluated = "on", self._evaluate(rollout, batch, passes)
            metrics = self._mismatch(batch, evaluated, passes)
        metrics["rollout/log_prob_recomputed"] = float(wanted == "on")
        return (evaluated if wanted == "on" else batch), metrics

    def _evaluate(self, rollout: Rollout, batch: _Batch, passes: Sequence[Tensor]) -> _Batch:
        """The batch with log-probabilities and values of the current weights at the samples of ``passes``."""
        log_prob, value = batch.log_prob.clone(), batch.value.clone()
        for index in passes:
            if not len(index):
                if self.policy.sharded is not None:  # takes part with a sample that does not count
                    self.policy.evaluate(rollout.chain_rows(torch.tensor([0])))
                continue
            # With autograd on, as in the update: attention chooses its kernel by that, and kernels round differently.
            now = self.policy.evaluate(rollout.chain_rows(index))
            for old, new in ((log_prob, now.log_prob), (value, now.value)):
                # What is not finite stays, so that the first pass finds and names it.
                old[index] = torch.where(old[index].isfinite(), new.detach().to(old), old[index])
        return replace(batch, log_prob=log_prob, value=value)

    def _mismatch(self, rolled_out: _Batch, evaluated: _Batch, passes: Sequence[Tensor]) -> dict[str, float]:
        """Mean and largest |log-probability by the learner - by the rollout|, over ``passes`` of all processes."""
        index = torch.cat([*passes, torch.zeros(0, dtype=torch.int64)])
        off = (evaluated.log_prob[index] - rolled_out.log_prob[index]).abs().double()
        largest = off.max() if len(off) else off.new_zeros(())
        own = torch.stack([off.sum(), off.new_tensor(off.numel()), largest])
        sums, counts, maxima = self.collective.gather(own).unbind(dim=1)
        return {
            "rollout/log_prob_mismatch_mean": float(sums.sum() / counts.sum()),
            "rollout/log_prob_mismatch_max": float(maxima.max()),
        }

    def _position(self, number: int, minibatches: int) -> str:
        """In words: minibatch ``number`` (from 0) of the iteration's ``minibatches``, one optimizer step each."""
        an_epoch = minibatches // self.settings.update_epochs
        return (
            f"iteration {self.iteration + 1}, update epoch {number // an_epoch + 1} of {self.settings.update_epochs}, "
            f"minibatch {number % an_epoch + 1} of {an_epoch} (optimizer step {number + 1} of the iteration)"
        )

    def _minibatches(self, total: int) -> list[Tensor]:
        # Even pieces of at most global_batch: a small remainder would weigh its samples more than the others'.
        pieces = math.ceil(total / self.settings.global_batch)
        epochs = (torch.randperm(total, generator=self.generator) for _ in range(self.settings.update_epochs))
        return [piece for epoch in epochs for piece in epoch.tensor_split(pieces)]

    def _passes(self, minibatch: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        """This process's samples of a minibatch in passes of at most ``micro_batch``.

        There are as many passes as the process with most of its samples needs, so some may be empty.

        Args:
            minibatch: int64 [n], numbers of samples of all processes.
            counts: int64 [world_size], the samples of each.
        """
        owner = torch.searchsorted(counts.cumsum(0), minibatch, right=True)
        passes = math.ceil(int(owner.bincount().max()) / self.settings.micro_batch)
        first = int(counts[: self.collective.rank].sum())
        # In the order of storage, which is quickest to gather; a sum does not care.
        return (minibatch[owner == self.collective.rank] - first).sort().values.tensor_split(passes)

    def _accumulate_gradients(
        self, rollout: Rollout, batch: _Batch, passes: Sequence[Tensor], minibatch_size: int, warming_up: bool
    ) -> Tensor:
        """Gradients of the minibatch's mean loss, of this process's samples; sums of ``_SUMS`` over all processes'."""
        self.optimizer.zero_grad(set_to_none=True)
        # Read at the end, so that the device is not waited for after every microbatch.
        sums, broken = [torch.zeros(len(_SUMS), dtype=torch.float64)], [torch.zeros(len(_CHECKED))]
        for number, index in enumerate(passes, start=1):
            if self.policy.sharded is not None:
                reduce_gradients(self.policy.sharded, number == len(passes))
            elif not len(index):
                continue
            # A process without samples takes part in the pass all the same, with a sample that does not count.
            weight = 1 / minibatch_size if len(index) else 0.0
            loss, named, terms = self._loss(rollout, batch, index if len(index) else torch.tensor([0]), warming_up)
            (loss * weight).backward()
            if len(index):
                sums.append(torch.stack([term.detach().double().sum() for term in terms]))
                broken.append(torch.stack([(~named[name].detach().isfinite()).any().float() for name in _CHECKED]))
        counted = torch.cat([torch.stack([part.cpu().double() for part in parts]).sum(0) for parts in (sums, broken)])
        # One sum for both: what is not finite in one process stops all of them here. The flags decide, not the sums
        # alone, because a limited log-ratio makes a finite loss of an infinite log-probability.
        total, found = self.collective.sum(counted).split([len(_SUMS), len(_CHECKED)])
        culprits = [name for name, count in zip(_CHECKED, found.tolist(), strict=True) if count]
        # A statistic that is not part of the loss may overflow alone.
        culprits = culprits or [name for name, value in zip(_SUMS, total, strict=True) if not value.isfinite()]
        if culprits:
            raise TrainingError(
                f"{self._at}: non-finite numbers in {', '.join(culprits)}; resume from the last checkpoint with a "
                "smaller ppo.learning_rate, and look at actor/approx_kl and actor/grad_norm of the iterations before"
            )
        return total

    def _loss(
        self, rollout: Rollout, batch: _Batch, index: Tensor, warming_up: bool
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        now = self.policy.evaluate(rollout.chain_rows(index))
        device, s = now.log_prob.device, self.settings
        advantages, old_value = batch.advantages[index].to(device), batch.value[index].to(device)
        returns, old_log_prob = batch.returns[index].to(device), batch.log_prob[index].to(device)
        ratio = losses.log_ratio(now.log_prob, old_log_prob)
        spread = advantages.reshape(-1, *[1] * (ratio.ndim - 1)).expand_as(ratio)
        clip = {"clip_low": s.clip_low, "clip_high": s.clip_high}
        surrogate = _mean(losses.policy_loss(ratio, spread, **clip, dual_clip=s.dual_clip))
        critic = losses.value_loss(now.value, old_value, returns, value_clip=s.value_clip, huber_delta=s.huber_delta)
        divergence, entropy = losses.kl_k3(ratio), _mean(now.entropy)
        actor = surrogate - s.entropy_coef * entropy + s.kl_coef * _mean(divergence)
        total = s.value_coef * critic if warming_up else s.value_coef * critic + actor
        terms = (
            surrogate, critic, entropy, _chunk(losses.kl_k1(ratio)), _chunk(divergence),
            _mean(losses.policy_clipped(ratio, spread, **clip).to(ratio.dtype)),
            losses.value_clipped(now.value, old_value, value_clip=s.value_clip),
            total,
        )  # fmt: skip
        named = {
            "log_prob": now.log_prob, "entropy": now.entropy, "value": now.value, "advantages": advantages,
            "returns": returns, "old_log_prob": old_log_prob, "old_value": old_value, "loss": total,
        }  # fmt: skip
        return total.sum(), named, terms

    def _step(self) -> float:
        """Average gradients over processes, clip and apply; returns the norm before clipping."""
        parameters = self._trained()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.collective.world_size > 1 and self.policy.sharded is None:
            _sum_gradients(parameters, self.collective)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if not norm.isfinite():
            names = {memory_of(tensor): name for name, tensor in self.policy.state_dict_trainable().items()}
            bad = [
                names.get(memory_of(parameter), f"a tensor of shape {tuple(parameter.shape)}")
                for parameter in parameters
                if parameter.grad is not None and not whole(parameter.grad).isfinite().all()
            ]
            raise TrainingError(
                f"{self._at}: non-finite gradients of {', '.join(bad[:8])} ({len(bad)} tensors); "
                "resume from the last checkpoint with a smaller ppo.learning_rate"
            )
        nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        self._set_rates()
        self.optimizer.step()
        # The fused optimizer does not count, and copies of the weights are renewed when the count has changed.
        torch.autograd.graph.increment_version(parameters)
        return float(norm)

    def _set_rates(self) -> None:
        """Learning rates of the step that follows, and its number.

        Warm-up counts a group's own steps, so that the actor warms up after the critic's warm-up too. The cosine falls
        from iteration to iteration, because how many steps one has depends on how long its episodes were.
        """
        s = self.settings
        cosine = 0.5 * (1 + math.cos(math.pi * self.iteration / s.iterations)) if s.lr_schedule == "cosine" else 1.0
        full = {"actor": s.learning_rate, "critic": s.value_learning_rate}
        frozen = {"actor"} if self.iteration < s.critic_warmup_iterations else set()
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            self.steps[name] += name not in frozen
            warm = min(1.0, self.steps[name] / s.warmup_steps) if s.warmup_steps else 1.0
            group["lr"] = 0.0 if name in frozen else full[name] * warm * cosine

    def _trained(self) -> list[nn.Parameter]:
        # AdamW leaves parameters without a gradient alone, weight decay included: that is the critic's warm-up.
        if self.iteration < self.settings.critic_warmup_iterations:
            for parameter in self.groups["actor"]:
                parameter.grad = None
            return self.groups["critic"]
        return [*self.groups["actor"], *self.groups["critic"]]


def _mean(entries: Tensor) -> Tensor:
    """Of each sample's entries: [N, ...] -> [N]."""
    return entries if entries.ndim == 1 else entries.flatten(1).mean(dim=1)


def _chunk(entries: Tensor) -> Tensor:
    """Sum of each sample's entries, [N, ...] -> [N]: a divergence of the whole chunk, whatever the ratio's level."""
    return entries if entries.ndim == 1 else entries.flatten(1).sum(dim=1)


def _sum_gradients(parameters: list[nn.Parameter], collective: Collective) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = collective.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        for gradient, piece in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of at most ``BUCKET`` numbers together; a larger tensor is alone."""
    buckets, room = [], 0
    for tensor in tensors:
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    return buckets
