"""A small environment and policy whose optimum is known, for tests of learning (nothing here is physics)."""

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from gsrl_core.interfaces import ActionSample, Evaluation, Observation, Step
from gsrl_core.sharding import shard, shard_root


class ReachEnv:
    """Points on a line must be brought within 0.1 of a goal; a step moves by at most 0.2. Success ends the episode."""

    action_dim = 1
    control_hz = 10.0

    def __init__(self, num_envs, max_episode_steps=8, fail_at=None, crashes=()):
        self.num_envs, self.max_episode_steps, self.fail_at = num_envs, max_episode_steps, fail_at
        self.crashes = list(crashes)
        """(call, environment): where the simulation crashes, as physics workers may."""
        self.calls, self.die_at, self.token = 0, None, ""
        self.threads = set()

    def reset(self, seeds):
        assert len(seeds) == self.num_envs
        draws = [torch.rand(2, generator=torch.Generator().manual_seed(int(seed))) * 2 - 1 for seed in seeds]
        self.position, self.goal = torch.stack(draws).T.clone()
        self.steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self.success = torch.zeros(self.num_envs, dtype=torch.bool)
        self.loose = self.success.clone()
        self.lost = self.success.clone()
        return self._observation()

    def step_chunk(self, actions):
        self.threads.add(threading.current_thread().name)
        self.calls += 1
        if self.calls == self.die_at and not Path(self.token).exists():
            Path(self.token).touch()
            os._exit(1)
        for call, env in self.crashes:
            self.lost[env] |= call == self.calls and not self.success[env]
        reward, executed = torch.zeros(self.num_envs), torch.zeros(self.num_envs, dtype=torch.int64)
        for h in range(actions.shape[1]):
            running = ~self.success & ~self.lost & (self.steps < self.max_episode_steps)
            move = actions[:, h, 0].cpu().clamp(-1, 1) * 0.2
            self.position = torch.where(running, self.position + move, self.position)
            reached = running & ((self.position - self.goal).abs() < 0.1)
            self.loose |= running & ((self.position - self.goal).abs() < 0.2)
            self.success |= reached
            reward += reached.float()
            executed += running
            self.steps += running
        if self.fail_at == self.calls:
            reward[0] = float("nan")
        truncated = (self.lost | (self.steps >= self.max_episode_steps)) & ~self.success
        done = self.success.clone()
        return Step(self._observation(), reward, done, truncated, done, self.loose.clone(), executed, self.lost.clone())

    def _observation(self):
        level = ((self.position - self.goal).clamp(-1, 1) * 127 + 127).to(torch.uint8)
        picture = level[:, None, None, None].expand(self.num_envs, 12, 16, 3).contiguous()
        state = torch.stack([self.position, self.goal], 1)
        return Observation(rgb={"camera": picture}, state=state, instruction=("reach",) * self.num_envs)

    def render_video_frame(self):
        return self._observation().rgb["camera"]

    def close(self):
        pass


class GaussianPolicy(nn.Module):
    """A tanh network's mean and a learned standard deviation, for chunks of ``horizon`` actions."""

    action_dim = 1

    def __init__(self, horizon=2, seed=0, std=0.5):
        super().__init__()
        self.horizon = horizon
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, horizon))
            self.critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        self.levels = "chunk", "chunk"
        self.log_std = nn.Parameter(torch.full((horizon,), math.log(std)))
        self.batches = []

    def act(self, observation, generator, *, explore):
        self.batches.append(len(observation.state))
        with torch.no_grad():
            noise = torch.randn(len(observation.state), self.horizon, generator=generator)
            mean = self.actor(observation.state)
            actions = mean + (noise * self.log_std.exp() if explore else 0)
            chain = {"state": observation.state, "actions": actions}
            now = self.evaluate(chain)
        return ActionSample(actions[..., None], now.log_prob, now.value, chain)

    @property
    def sharded(self):
        return self if isinstance(self, FSDPModule) else None

    def shard(self, mesh):
        shard(self.actor, mesh)
        shard_root(self, mesh)

    def evaluate(self, chain):
        return Evaluation(*self(chain))

    def forward(self, chain):
        normal = torch.distributions.Normal(self.actor(chain["state"]), self.log_std.exp())
        at = {"chunk": lambda x: x.sum(1), "action": lambda x: x, "token": lambda x: x[..., None]}
        log_prob, entropy = at[self.levels[0]](normal.log_prob(chain["actions"])), at[self.levels[1]](normal.entropy())
        return log_prob, entropy, self.critic(chain["state"]).squeeze(1)

    def set_levels(self, log_prob, entropy):
        self.levels = log_prob, entropy

    def value(self, observation):
        with torch.no_grad():
            return self.critic(observation.state).squeeze(1)

    def trainable_parameters(self):
        return {"actor": [*self.actor.parameters(), self.log_std], "critic": list(self.critic.parameters())}

    def state_dict_trainable(self):
        return self.state_dict()

    def keep_prefixes(self, where, samples, micro_batch):
        self.kept = where, samples, micro_batch


@dataclass(frozen=True)
class ToyEmbodiment:
    """Implements gsrl_core.embodiment.Embodiment. ``die_at``: the env process kills itself once at that call."""

    episode_steps: int = 8
    die_at: int | None = None
    token: str = ""

    def make_policy(self, device):
        return GaussianPolicy(std=0.5).to(device)

    def make_env(self, num_envs, device, perturbation=None):
        env = ReachEnv(num_envs, self.episode_steps)
        if self.die_at is not None and self.token and not Path(self.token).exists():
            env.die_at, env.token = self.die_at, self.token
        return env

    def save_policy(self, policy, folder):
        torch.save(policy.state_dict(), folder / "policy.pt")
