"""The worker of fine-tuning: it collects episodes, or updates the policy, or both, in whatever process it lives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsrl_core.dist.collective import ProcessGroup, SingleProcess
from gsrl_core.dist.weights import WeightPublisher, WeightReceiver, WeightUpdate
from gsrl_core.embodiment import Embodiment
from gsrl_core.errors import WorkerError
from gsrl_core.rl.ppo import Learner, PpoSettings
from gsrl_core.rl.rollout import EpisodeStats, Rollout, collect, concatenate, split
from gsrl_core.sections import PpoConfig
from gsrl_core.sharding import whole


@dataclass(frozen=True)
class WorkerSpec:
    """How to make the worker of a rank; picklable."""

    embodiment: Embodiment
    ppo: PpoConfig
    stages: int
    """Pipeline stages."""
    num_envs: int
    """Environments of one worker over all stages; 0 for a worker that only learns."""
    max_chunks: int
    learns: bool
    sharded: bool = False
    """Learners hold a part of the weights each, and nothing else on their devices; they never collect."""

    def __call__(self, rank: int) -> TrainingWorker:
        """Make the worker."""
        return TrainingWorker(self, rank)


class TrainingWorker:
    """Holds environments and a policy; see the methods for what it is asked to do in an iteration."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        render_device, policy_device = own_devices()
        self._spec, self._rank = spec, rank
        # Weights that will be divided must not all be on the device before.
        self._policy = spec.embodiment.make_policy(torch.device("cpu") if spec.sharded else policy_device)
        self._envs = [
            spec.embodiment.make_env(spec.num_envs // spec.stages, render_device)
            for _ in range(spec.stages if spec.num_envs else 0)
        ]
        samples = spec.num_envs * spec.ppo.rollout_epochs * spec.max_chunks
        self._policy.set_levels(spec.ppo.logprob_level, spec.ppo.entropy_level)
        self._policy.keep_prefixes(spec.ppo.prefix_cache, samples, spec.ppo.micro_batch)
        self._collective: SingleProcess | ProcessGroup = SingleProcess()
        self._learner = self._new_learner() if spec.learns else None
        self._publisher, self._receiver = WeightPublisher(), WeightReceiver()
        self._rollout: Rollout | None = None

    def join(self, world_size: int, address: str, nccl: bool) -> None:
        """Train together with the other learners; called on all at once."""
        self._collective = ProcessGroup(self._rank, world_size, address, nccl=nccl)
        if self._spec.sharded:
            self._policy.shard(self._collective.mesh(own_devices()[1].type))
        self._learner = self._new_learner()

    def collect(self, seeds: Sequence[int], noise_seed: Sequence[int]) -> tuple[EpisodeStats, float]:
        """Play the episodes of these seeds with exploration and keep them. Returns statistics and seconds."""
        start = time.perf_counter()
        self._rollout, stats = self._play(seeds, noise_seed, explore=True)
        return stats, time.perf_counter() - start

    def evaluate(self, seeds: Sequence[int], noise_seed: Sequence[int]) -> EpisodeStats:
        """Play without exploration; nothing is kept."""
        return self._play(seeds, noise_seed, explore=False)[1]

    def take_rollout(self, part: int, parts: int) -> Rollout:
        """One of ``parts`` equal pieces of what was collected, for a learner elsewhere."""
        if self._rollout is None:
            raise WorkerError(
                f"worker {self._rank} holds no episodes (it was restarted); resume from the last checkpoint"
            )
        return split(self._rollout, parts)[part].cpu()

    def update(self, *rollouts: Rollout) -> dict[str, float]:
        """One PPO iteration on the given rollouts, or on the worker's own; returns metrics."""
        start = time.perf_counter()
        own = [self._rollout] if self._rollout is not None else []
        metrics = self._require_learner().update(concatenate(list(rollouts) or own))
        self._rollout = None
        return metrics | {"time/actor_training": time.perf_counter() - start}

    def changed_weights(self) -> WeightUpdate | None:
        """What changed since the last call; called on all learners at once, and the first one answers."""
        weights = self._policy.state_dict_trainable()
        if self._rank == 0:
            return self._publisher.changes(weights)
        for tensor in weights.values():
            whole(tensor)
        return None

    def all_weights(self) -> WeightUpdate:
        """What was sent so far, in full."""
        return self._publisher.everything()

    def apply_weights(self, update: WeightUpdate) -> None:
        """Take over a learner's weights."""
        self._receiver.apply(update, self._policy.state_dict_trainable())

    def training_state(self) -> dict[str, Any] | None:
        """The learner's state on the CPU, for a checkpoint: it may be read where no GPU is.

        Called on all learners at once, and the first one answers.
        """
        state = _on_cpu(self._require_learner().state_dict(), keep=self._rank == 0)
        return state if self._rank == 0 else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put a checkpoint's state back."""
        self._require_learner().load_state_dict(state)

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        self._spec.embodiment.save_policy(self._policy, folder)

    def close(self) -> None:
        """Stop environments and leave the process group."""
        for env in self._envs:
            env.close()
        self._collective.close()

    def _play(self, seeds: Sequence[int], noise_seed: Sequence[int], *, explore: bool) -> tuple[Rollout, EpisodeStats]:
        # The rank is part of the noise: workers must not explore in step.
        entropy = np.random.SeedSequence([*noise_seed, self._rank]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))
        return collect(self._envs, self._policy, seeds, generator, max_chunks=self._spec.max_chunks, explore=explore)

    def _new_learner(self) -> Learner:
        settings = PpoSettings(**{field.name: getattr(self._spec.ppo, field.name) for field in fields(PpoSettings)})
        return Learner(self._policy, settings, self._collective)

    def _require_learner(self) -> Learner:
        if self._learner is None:
            raise WorkerError(f"worker {self._rank} collects only; ask a learner")
        return self._learner


def own_devices() -> tuple[torch.device, torch.device]:
    """Of this process's visible devices the first renders and the last holds the policy."""
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu"), torch.device("cpu")
    return torch.device("cuda", 0), torch.device("cuda", count - 1)


def _on_cpu(tree: Any, *, keep: bool) -> Any:
    """Whole tensors in host memory; a process that does not ``keep`` them only gives its parts."""
    if isinstance(tree, torch.Tensor):
        full = whole(tree)
        return full.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: _on_cpu(value, keep=keep) for key, value in tree.items()}
    return [_on_cpu(value, keep=keep) for value in tree] if isinstance(tree, (list, tuple)) else tree
