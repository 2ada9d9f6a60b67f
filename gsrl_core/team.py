"""The workers of a fine-tuning run: who collects, who learns, and how episodes and weights travel between them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from gsrl_core.dist.placement import Placement, parse_placement
from gsrl_core.dist.workers import LocalWorkers, RayWorkers, WorkerGroup, cluster_devices, finish, start_ray, stop_ray
from gsrl_core.embodiment import Embodiment
from gsrl_core.errors import ConfigError, PlacementError
from gsrl_core.rl.rollout import EpisodeStats, join_stats
from gsrl_core.sections import PipelineConfig
from gsrl_core.training import WorkerSpec

TRAINING_NOISE, VALIDATION_NOISE = 0, 1


class Team:
    """Collectors and learners; one group where the placement is the same for all roles."""

    def __init__(self, embodiment: Embodiment, config: PipelineConfig) -> None:
        """Start all workers. Raises PlacementError, and what making policies and environments raises."""
        self._config = config
        self._ray = config.cluster.runtime == "ray"
        # A cluster that the caller had joined before stays joined.
        self._joined_ray = self._ray and start_ray()
        self.placement = _placement(config)
        self._sharded = config.cluster.data_parallel == "fsdp2"
        # Learners that hold parts of the weights cannot act: they are processes of their own beside the collectors.
        self._collocated = self.placement.collocated and not self._sharded
        count, stages = len(self.placement.env), config.cluster.pipeline_stage_num
        if config.sim.num_envs % (count * stages):
            raise PlacementError(
                f"sim.num_envs ({config.sim.num_envs}) must be a multiple of {count} env processes x {stages} "
                "pipeline stages"
            )
        learning = WorkerSpec(
            embodiment=embodiment,
            ppo=config.ppo,
            stages=stages,
            num_envs=config.sim.num_envs // count if self._collocated else 0,
            max_chunks=config.sim.max_episode_steps // config.policy.action_chunk,
            learns=True,
            sharded=self._sharded,
        )
        self._learners: WorkerGroup
        self._collectors: WorkerGroup
        if not self._ray:
            self._learners = self._collectors = LocalWorkers(learning)
            return
        self._start_ray_workers(learning)

    def collect(self, iteration: int) -> tuple[EpisodeStats, float]:
        """Training episodes of an iteration, kept by the collectors. Returns statistics and mean seconds."""
        seeds = training_seeds(self._config, iteration)
        noise = (self._config.ppo.seed, TRAINING_NOISE, iteration)
        pending = [
            self._collectors.submit(rank, "collect", self._share(seeds, rank), noise)
            for rank in range(self._collectors.size)
        ]
        results = finish(pending)
        return join_stats([stats for stats, _ in results]), sum(seconds for _, seconds in results) / len(results)

    def validate(self, iteration: int) -> EpisodeStats:
        """Episodes without exploration on seeds that neither training nor the final evaluation uses."""
        seeds = validation_seeds(self._config)
        noise = (self._config.ppo.seed, VALIDATION_NOISE, 0)
        pending = [
            self._collectors.submit(rank, "evaluate", self._share(seeds, rank), noise)
            for rank in range(self._collectors.size)
        ]
        return join_stats(finish(pending))

    def update(self) -> dict[str, float]:
        """PPO on what was collected; afterwards the collectors have the new weights. Returns metrics."""
        if self._collocated:
            return self._learners.call("update")[0]
        collectors, learners = self._collectors.size, self._learners.size
        parts = max(1, learners // collectors)
        pieces = [
            self._collectors.submit(rank, "take_rollout", part, parts)
            for rank in range(collectors)
            for part in range(parts)
        ]
        each = len(pieces) // learners
        updates = [
            self._learners.submit(rank, "update", *pieces[rank * each : (rank + 1) * each]) for rank in range(learners)
        ]
        metrics = finish(updates)[0]
        start = time.perf_counter()
        self._sync_weights()
        return metrics | {"time/sync_weights": time.perf_counter() - start}

    def training_state(self) -> dict[str, Any]:
        """For a checkpoint; the same whatever the number of learners and however they divide the weights."""
        return self._learners.call("training_state")[0]

    def restore(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state back everywhere."""
        self._learners.call("restore", state)
        if not self._collocated:
            self._sync_weights()

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        # A collector has the learners' weights, and has them whole.
        self._collectors.submit(0, "save_policy", folder).result()

    def close(self) -> None:
        """End all workers."""
        self._learners.close()
        if self._collectors is not self._learners:
            self._collectors.close()
        if self._joined_ray:
            stop_ray()

    def _start_ray_workers(self, learning: WorkerSpec) -> None:
        placement = self.placement
        if self._collocated:
            self._learners = self._collectors = RayWorkers("actor", learning, placement.actor)
        else:
            if self._sharded and len(placement.actor) == 1:
                raise PlacementError("cluster.data_parallel fsdp2 divides weights among actor processes; one is placed")
            if any(len(devices) > 1 for devices in placement.actor):
                raise PlacementError(
                    f"actor processes with several devices ({placement.actor}): a learner uses one device; give as "
                    "many processes as devices"
                )
            collecting = WorkerSpec(
                embodiment=learning.embodiment,
                ppo=learning.ppo,
                stages=learning.stages,
                num_envs=self._config.sim.num_envs // len(placement.env),
                max_chunks=learning.max_chunks,
                learns=False,
            )
            self._learners = RayWorkers("actor", learning, placement.actor)
            self._collectors = RayWorkers(
                "env/rollout", collecting, placement.collectors, restarts=1, on_restart=self._heal
            )
        if self._learners.size > 1:
            policy_devices = [devices[-1] for devices in placement.actor]
            nccl = bool(cluster_devices()) and len(set(policy_devices)) == len(policy_devices)
            if self._sharded and cluster_devices() and not nccl:
                raise PlacementError(
                    f"cluster.data_parallel fsdp2 needs a GPU for each actor process; given {placement.actor}"
                )
            self._learners.call("join", self._learners.size, self._learners.node_address(0), nccl)
        if not self._collocated:
            self._sync_weights()

    def _sync_weights(self) -> None:
        # Sharded weights are gathered by all learners together.
        changed = [self._learners.submit(rank, "changed_weights") for rank in range(self._learners.size)]
        applied = [self._collectors.submit(rank, "apply_weights", changed[0]) for rank in range(self._collectors.size)]
        finish([*changed[1:], *applied])

    def _heal(self, rank: int) -> None:
        self._collectors.submit(rank, "apply_weights", self._learners.submit(0, "all_weights")).result()

    def _share(self, seeds: range, rank: int) -> list[int]:
        """A worker's part of every batch of ``sim.num_envs`` seeds, batch after batch."""
        batch, own = self._config.sim.num_envs, self._config.sim.num_envs // self._collectors.size
        starts = range(rank * own, len(seeds), batch)
        return [seed for start in starts for seed in seeds[start : start + own]]


def training_seeds(config: PipelineConfig, iteration: int) -> range:
    """Episode seeds of one iteration; no two iterations share any."""
    count = config.ppo.rollout_epochs * config.sim.num_envs
    start = 100_000_000 + 1_000_000 * (config.ppo.seed % 1000) + iteration * count
    return range(start, start + count)


def validation_seeds(config: PipelineConfig) -> range:
    """Episode seeds for evaluations during training."""
    return range(90_000_000, 90_000_000 + config.sim.num_envs)


def check_seeds(config: PipelineConfig) -> None:
    """Raise ConfigError if an episode of the sweep is also trained or validated on."""
    first, last = training_seeds(config, 0), training_seeds(config, config.ppo.iterations - 1)
    evaluation = config.evaluation
    reserved = range(evaluation.seed, evaluation.seed + max(evaluation.episodes, evaluation.episodes_per_perturbation))
    used = {"training": range(first.start, last.stop), "validation": validation_seeds(config)}
    for name, seeds in used.items():
        if seeds.start < reserved.stop and reserved.start < seeds.stop:
            raise ConfigError(
                f"evaluation seeds {reserved.start}-{reserved.stop - 1} overlap {name} seeds {seeds.start}-"
                f"{seeds.stop - 1}; choose another evaluation.seed (the default is 9000000)"
            )


def _placement(config: PipelineConfig) -> Placement:
    if config.cluster.runtime == "ray":
        return parse_placement(config.cluster.component_placement, len(cluster_devices()))
    placement = parse_placement(config.cluster.component_placement, min(1, torch.cuda.device_count()))
    if len(placement.actor) > 1 or not placement.collocated:
        raise PlacementError(
            "cluster.runtime 'local' is one process on one device, but component_placement asks for more "
            f"({config.cluster.component_placement}); set cluster.runtime to ray, or place 'env,rollout,actor' on 'all'"
        )
    return placement
