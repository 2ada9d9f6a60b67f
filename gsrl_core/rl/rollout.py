"""Experience: what episodes leave behind for learning, and how it is gathered.

Only environments that are still running are inferred. Groups of environments (pipeline stages) are stepped in threads,
so that the physics and rendering of one group overlap with the policy's work for another; the order of the policy's
calls, and with it the use of the random generator, does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gsrl_core.errors import SimulationError
from gsrl_core.interfaces import ActionSample, Observation, Policy, Step, VecEnv


@dataclass(frozen=True)
class Rollout:
    """T chunks of B episodes. Where ``valid`` is false the episode was over and the other fields are zero."""

    log_prob: Tensor
    """float32 [T, B], [T, B, H] or [T, B, H, A], as the policy's level says."""
    value: Tensor
    """float32 [T, B]: critic of the observation the chunk was chosen in."""
    next_value: Tensor
    """float32 [T, B]: critic of the observation the chunk ended in; zero after termination."""
    reward: Tensor
    """float32 [T, B]."""
    terminated: Tensor
    """bool [T, B]: the task ended inside this chunk."""
    truncated: Tensor
    """bool [T, B]: time ran out inside this chunk, or its simulation crashed; both are bootstrapped, neither is a
    failure."""
    valid: Tensor
    """bool [T, B]."""
    chain: tuple[Mapping[str, Tensor], ...]
    """``Policy.evaluate``'s input in parts, as they were inferred; N rows in all, for valid chunks only."""
    position: Tensor
    """int64 [N]: flat index t * B + b of every row of ``chain``."""

    @property
    def num_samples(self) -> int:
        """N, the number of valid chunks."""
        return len(self.position)

    def samples(self, grid: Tensor) -> Tensor:
        """Of a [T, B, ...] tensor the entries of the stored samples, [N, ...] in the order of ``chain``."""
        return grid.flatten(0, 1)[self.position]

    def cpu(self) -> Rollout:
        """The same with the chain in host memory (the rest is there always)."""
        return replace(self, chain=tuple({key: row.cpu() for key, row in part.items()} for part in self.chain))

    def chain_rows(self, index: Tensor) -> dict[str, Tensor]:
        """The rows ``index`` (int64 [n]) of ``chain``; the parts are never joined, that would double the memory.

        Quickest where ``index`` is sorted. Rows of pinned parts are pinned.
        """
        ends = torch.tensor([len(next(iter(part.values()))) for part in self.chain]).cumsum(0)
        index, order = index.sort()
        owner = torch.searchsorted(ends, index, right=True)
        numbers, counts = owner.unique_consecutive(return_counts=True)
        local = index - torch.cat([ends.new_zeros(1), ends])[owner]
        rows = {key: _room(len(index), tensor) for key, tensor in self.chain[0].items()}
        places = {device: local.to(device) for device in {tensor.device for tensor in rows.values()}}
        first = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            for key, tensor in self.chain[number].items():
                place = slice(first, first + count)
                torch.index_select(tensor, 0, places[tensor.device][place], out=rows[key][place])
            first += count
        if bool((order[1:] > order[:-1]).all()):
            return rows
        back = order.argsort()
        return {key: tensor[back.to(tensor.device)] for key, tensor in rows.items()}


def _room(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, *like.shape[1:], dtype=like.dtype, device=like.device, pin_memory=like.is_pinned())


_GRIDS = tuple(field.name for field in fields(Rollout) if field.name not in ("chain", "position"))


@dataclass(frozen=True)
class EpisodeStats:
    """One row per episode."""

    seeds: tuple[int, ...]
    success: Tensor
    """bool [E]: strict."""
    success_seed: Tensor
    """bool [E]: the seed's looser test, at any time."""
    length: Tensor
    """int64 [E]: control steps."""
    episode_return: Tensor
    """float32 [E]: undiscounted sum of rewards."""
    lost: Tensor
    """bool [E]: the simulation crashed; the other fields of this row say nothing about the policy."""


def collect(
    envs: Sequence[VecEnv],
    policy: Policy,
    seeds: Sequence[int],
    generator: torch.Generator,
    *,
    max_chunks: int,
    explore: bool = True,
) -> tuple[Rollout, EpisodeStats]:
    """Play one episode per seed and keep what learning needs.

    Args:
        envs: the pipeline stages; the seeds are dealt to them in order, ``num_envs`` each.
        policy: chooses the chunks and judges observations.
        seeds: as many as the environments of all stages together, or a multiple: then batch after batch.
        generator: of the policy's noise.
        max_chunks: an episode still running after this many chunks is cut and bootstrapped, as truncation is.
        explore: false integrates the policy's ODE.

    Raises:
        SimulationError: the number of seeds does not fit, or an environment reports a non-finite reward.
    """
    width = sum(env.num_envs for env in envs)
    if not seeds or len(seeds) % width:
        raise SimulationError(f"{len(seeds)} seeds for {width} environments; give a positive multiple of {width}")
    queues: list[list[_Stage]] = [[] for _ in envs]
    first = 0
    while first < len(seeds):
        for queue, env in zip(queues, envs, strict=True):
            queue.append(_Stage(env, policy, seeds[first : first + env.num_envs], generator, explore))
            first += env.num_envs
    with ThreadPoolExecutor(len(envs), thread_name_prefix="env-stage") as threads:
        _play([_Lane(queue, threads, max_chunks) for queue in queues])
    finished = [stage.finished for batch in zip(*queues, strict=True) for stage in batch]
    return concatenate([rollout for rollout, _ in finished]), join_stats([stats for _, stats in finished])


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Side by side along B, shorter ones padded with invalid chunks; chain rows follow in the order given."""
    length = max(len(rollout.valid) for rollout in rollouts)
    width = sum(rollout.valid.shape[1] for rollout in rollouts)
    grids = {
        name: torch.cat([_padded(getattr(rollout, name), length) for rollout in rollouts], dim=1) for name in _GRIDS
    }
    positions, first = [], 0
    for rollout in rollouts:
        own_width = rollout.valid.shape[1]
        t, b = rollout.position // own_width, rollout.position % own_width
        positions.append(t * width + first + b)
        first += own_width
    chain = tuple(part for rollout in rollouts for part in rollout.chain)
    return Rollout(**grids, chain=chain, position=torch.cat(positions))


def split(rollout: Rollout, parts: int) -> list[Rollout]:
    """The inverse of :func:`concatenate`: ``parts`` groups of neighbouring episodes, sizes differing by at most one."""
    pieces = []
    t, b = rollout.position // rollout.valid.shape[1], rollout.position % rollout.valid.shape[1]
    for columns in torch.arange(rollout.valid.shape[1]).tensor_split(parts):
        first, width = int(columns[0]), len(columns)
        own = (b >= first) & (b < first + width)
        grids = {name: getattr(rollout, name)[:, first : first + width] for name in _GRIDS}
        chain = (rollout.chain_rows(own.nonzero().squeeze(1)),)
        pieces.append(Rollout(**grids, chain=chain, position=t[own] * width + b[own] - first))
    return pieces


def _padded(grid: Tensor, length: int) -> Tensor:
    return torch.cat([grid, grid.new_zeros(length - len(grid), *grid.shape[1:])])


def join_stats(parts: Sequence[EpisodeStats]) -> EpisodeStats:
    """Row after row."""
    return EpisodeStats(
        seeds=tuple(seed for part in parts for seed in part.seeds),
        success=torch.cat([part.success for part in parts]),
        success_seed=torch.cat([part.success_seed for part in parts]),
        length=torch.cat([part.length for part in parts]),
        episode_return=torch.cat([part.episode_return for part in parts]),
        lost=torch.cat([part.lost for part in parts]),
    )


def _play(lanes: Sequence[_Lane]) -> None:
    # The policy is asked by this thread only, lane after lane: the generator's use is reproducible.
    while lanes := [lane for lane in lanes if lane.advance()]:
        pass


class _Lane:
    """One group of environments and the batches of episodes that it plays one after another.

    Lanes do not wait for each other between batches: the stragglers of one leave the processors to the others.
    """

    def __init__(self, stages: Sequence[_Stage], threads: ThreadPoolExecutor, max_chunks: int) -> None:
        self._threads, self._max_chunks = threads, max_chunks
        self._waiting = list(stages)
        self._next()

    def advance(self) -> bool:
        """Wait for the chunk under way and start the next; False when all batches are finished."""
        self._pending.result()
        actions = self._stage.choose() if self._chunks < self._max_chunks else None
        if actions is not None:
            self._chunks += 1
            self._pending = self._threads.submit(self._stage.execute, actions)
            return True
        self._stage.finish()
        if not self._waiting:
            return False
        self._next()
        return True

    def _next(self) -> None:
        self._stage, self._chunks = self._waiting.pop(0), 0
        self._pending: Future[None] = self._threads.submit(self._stage.reset)


class _Stage:
    """One group of environments on its way through an episode each; ``finished`` is what it left behind."""

    finished: tuple[Rollout, EpisodeStats]

    def __init__(
        self, env: VecEnv, policy: Policy, seeds: Sequence[int], generator: torch.Generator, explore: bool
    ) -> None:
        self.env, self.policy, self.seeds = env, policy, tuple(seeds)
        self.generator, self.explore = generator, explore
        self.observation: Observation | None = None
        self.done = torch.zeros(env.num_envs, dtype=torch.bool)
        self.success = torch.zeros(env.num_envs, dtype=torch.bool)
        self.success_seed = torch.zeros(env.num_envs, dtype=torch.bool)
        self.lost = torch.zeros(env.num_envs, dtype=torch.bool)
        self.length = torch.zeros(env.num_envs, dtype=torch.int64)
        self._cut = torch.zeros_like(self.done)
        """bool [B]: truncated in the last chunk; valued by the thread that also calls ``act``."""
        self.rows: list[dict[str, Tensor]] = []
        self.chains: list[Mapping[str, Tensor]] = []

    def reset(self) -> None:
        self.observation = self.env.reset(self.seeds)

    def choose(self) -> Tensor | None:
        """Actions [B, H, A] for the next chunk, zero where the episode is over; None when all are."""
        self._bootstrap(self._cut)
        self._cut = torch.zeros_like(self.done)
        active = (~self.done).nonzero().squeeze(1)
        if not len(active):
            return None
        assert self.observation is not None
        observation = self.observation
        everyone = len(active) == self.env.num_envs
        sample = self.policy.act(
            observation if everyone else observation.select(active), self.generator, explore=self.explore
        )
        self._close_previous(active, sample.value)
        self._open_row(active, sample)
        actions = sample.actions.new_zeros(self.env.num_envs, *sample.actions.shape[1:])
        actions[active.to(actions.device)] = sample.actions
        return actions

    def execute(self, actions: Tensor) -> None:
        step: Step = self.env.step_chunk(actions)
        row, was_active = self.rows[-1], ~self.done
        reward = step.reward.cpu().float()
        if not reward[was_active].isfinite().all():
            bad = [self.seeds[b] for b in (was_active & ~reward.isfinite()).nonzero().squeeze(1).tolist()]
            raise SimulationError(f"non-finite reward in the episodes of seeds {bad}; the physics diverged")
        row["reward"] = torch.where(was_active, reward, 0.0)
        row["terminated"] = step.terminated.cpu() & was_active
        row["truncated"] = step.truncated.cpu() & was_active & ~row["terminated"]
        self.observation = step.observation
        self.success, self.success_seed, self.lost = step.success.cpu(), step.success_seed.cpu(), step.lost.cpu()
        self.length += step.executed.cpu()
        self._cut = row["truncated"]
        self.done = self.done | row["terminated"] | row["truncated"]

    def finish(self) -> None:
        self._bootstrap(self._cut | ~self.done)
        grids = {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}
        rollout = Rollout(**grids, chain=tuple(self.chains), position=grids["valid"].reshape(-1).nonzero().squeeze(1))
        stats = EpisodeStats(
            seeds=self.seeds,
            success=self.success,
            success_seed=self.success_seed,
            length=self.length,
            episode_return=grids["reward"].sum(0),
            lost=self.lost,
        )
        self.finished = rollout, stats
        self.observation = None

    def _close_previous(self, active: Tensor, value: Tensor) -> None:
        # Those still active did not end in the previous chunk: the value of now is its next value.
        if self.rows:
            self.rows[-1]["next_value"][active] = value.detach().cpu().float()

    def _open_row(self, active: Tensor, sample: ActionSample) -> None:
        row = {name: torch.zeros(self.env.num_envs) for name in ("value", "next_value", "reward")}
        row["log_prob"] = torch.zeros(self.env.num_envs, *sample.log_prob.shape[1:])
        row["log_prob"][active] = sample.log_prob.detach().cpu().float()
        row["value"][active] = sample.value.detach().cpu().float()
        row["valid"] = ~self.done
        row["terminated"] = row["truncated"] = torch.zeros_like(self.done)
        self.rows.append(row)
        self.chains.append({key: tensor.detach() for key, tensor in sample.chain.items()})

    def _bootstrap(self, ended: Tensor) -> None:
        index = ended.nonzero().squeeze(1)
        if len(index):
            assert self.observation is not None
            value = self.policy.value(self.observation.select(index)).detach().cpu().float()
            self.rows[-1]["next_value"][index] = value
