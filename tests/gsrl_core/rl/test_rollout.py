import pytest
import torch
from toy import GaussianPolicy, ReachEnv

from gsrl_core.errors import SimulationError
from gsrl_core.rl.rollout import collect, concatenate, split


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_stored_sample_reproduces_its_log_prob_and_value():
    policy = GaussianPolicy()
    rollout, _ = collect([ReachEnv(6)], policy, range(18), generator(), max_chunks=4)
    now = policy.evaluate(rollout.chain_rows(torch.arange(rollout.num_samples)))
    assert torch.allclose(now.log_prob, rollout.samples(rollout.log_prob), atol=1e-6)
    assert torch.allclose(now.value, rollout.samples(rollout.value), atol=1e-6)


def test_only_running_environments_are_inferred_and_collection_stops_when_all_are_done():
    policy, env = GaussianPolicy(std=1.5), ReachEnv(32)
    rollout, stats = collect([env], policy, range(32), generator(), max_chunks=50)
    assert policy.batches[0] == 32 and policy.batches == sorted(policy.batches, reverse=True)
    assert sum(policy.batches) == rollout.num_samples == rollout.valid.sum()
    assert len(policy.batches) == env.calls == 4  # 8 steps in chunks of 2, not 50 chunks
    assert 0 < stats.success.sum() < 32
    # length in control steps: what the reward says, counted another way
    assert torch.equal(stats.success, stats.episode_return > 0)
    assert (stats.length[~stats.success] == 8).all()
    assert (rollout.terminated.any(0) == stats.success).all()
    assert (rollout.truncated.any(0) == ~stats.success).all()


def test_next_value_is_the_critics_view_of_where_the_chunk_ended():
    policy, env = GaussianPolicy(), ReachEnv(16)
    rollout, stats = collect([env], policy, range(16), generator(), max_chunks=4)
    for t in range(len(rollout.valid) - 1):
        on = rollout.valid[t + 1]
        assert torch.equal(rollout.next_value[t][on], rollout.value[t + 1][on])
    assert (rollout.next_value[rollout.terminated] == 0).all()
    final = policy.value(env._observation())  # the environment is frozen where the episodes ended
    cut = ~stats.success
    assert cut.any()
    last = rollout.valid.sum(0) - 1
    assert torch.allclose(rollout.next_value[last, torch.arange(16)][cut], final[cut])


def test_a_lost_episode_is_marked_and_bootstrapped_and_changes_nothing_else():
    def play(crashes):
        policy, env = GaussianPolicy(), ReachEnv(8, crashes=crashes)
        rollout, stats = collect([env], policy, range(8), generator(), max_chunks=4, explore=False)
        return policy, env, rollout, stats

    _, _, whole, before = play(())
    env_index = int((before.length > 4).nonzero()[0])
    policy, env, rollout, stats = play([(2, env_index)])
    assert stats.lost.tolist() == [b == env_index for b in range(8)]
    assert not stats.success[env_index] and stats.length[env_index] == 2
    assert rollout.truncated[:, env_index].tolist() == [False, True, False, False][: len(rollout.valid)]
    assert rollout.valid[:, env_index].sum() == 2
    assert torch.allclose(rollout.next_value[1, env_index], policy.value(env._observation())[env_index])
    others = torch.arange(8) != env_index
    assert torch.equal(rollout.valid[:, others], whole.valid[:, others])
    assert torch.equal(rollout.reward[:, others], whole.reward[:, others])
    assert torch.equal(stats.success[others], before.success[others]) and not before.lost.any()


def test_an_episode_cut_by_max_chunks_is_bootstrapped():
    policy, env = GaussianPolicy(), ReachEnv(8, max_episode_steps=100)
    rollout, stats = collect([env], policy, range(8), generator(), max_chunks=3)
    running = ~stats.success
    assert running.any() and not rollout.truncated.any()
    assert torch.allclose(rollout.next_value[-1][running], policy.value(env._observation())[running])


def test_stages_run_in_their_own_threads_and_give_each_seed_its_episode():
    policy = GaussianPolicy()
    stages = [ReachEnv(4), ReachEnv(4)]
    rollout, stats = collect(stages, policy, range(8), generator(), max_chunks=4)
    again, _ = collect([ReachEnv(4), ReachEnv(4)], policy, range(8), generator(), max_chunks=4)
    assert stats.seeds == tuple(range(8))
    assert torch.equal(rollout.log_prob, again.log_prob) and torch.equal(rollout.reward, again.reward)
    assert all(name.startswith("env-stage") for env in stages for name in env.threads)
    first = rollout.chain_rows(torch.arange(8))["state"]
    assert torch.equal(first[:4], ReachEnv(4).reset(range(4)).state)
    positions = rollout.position[:4].tolist()
    assert positions == [0, 1, 2, 3]


def test_a_stage_starts_its_next_batch_while_another_is_still_at_its_first():
    order = []

    class Logged(ReachEnv):
        def reset(self, seeds):
            self.seeds = seeds
            order.append(("reset", *seeds))
            return super().reset(seeds)

        def step_chunk(self, actions):
            order.append(("chunk", *self.seeds))
            return super().step_chunk(actions)

    quick, slow = Logged(1, max_episode_steps=2), Logged(1, max_episode_steps=8)
    _, stats = collect([quick, slow], GaussianPolicy(std=1e-3), range(4), generator(), max_chunks=9)
    assert stats.seeds == (0, 1, 2, 3) and stats.length.tolist() == [2, 8, 2, 8]
    assert order.index(("reset", 2)) < len(order) - 1 - order[::-1].index(("chunk", 1))


def test_without_exploration_the_noise_does_not_matter():
    policy = GaussianPolicy()
    one, _ = collect([ReachEnv(4)], policy, range(4), generator(1), max_chunks=4, explore=False)
    two, _ = collect([ReachEnv(4)], policy, range(4), generator(2), max_chunks=4, explore=False)
    assert torch.equal(one.log_prob, two.log_prob)


def test_concatenation_pads_and_keeps_samples_with_their_numbers():
    policy = GaussianPolicy(std=1.0)
    short, _ = collect([ReachEnv(3, max_episode_steps=4)], policy, range(3), generator(), max_chunks=9)
    long, _ = collect([ReachEnv(5)], policy, range(5), generator(), max_chunks=9)
    both = concatenate([short, long])
    assert both.valid.shape == (4, 8) and not both.valid[2:, :3].any()
    assert both.num_samples == short.num_samples + long.num_samples
    now = policy.evaluate(both.chain_rows(torch.arange(both.num_samples)))
    assert torch.allclose(both.samples(both.log_prob), now.log_prob, atol=1e-6)
    assert both.samples(both.valid).all()
    shuffled = torch.randperm(both.num_samples, generator=generator())
    states = both.chain_rows(torch.arange(both.num_samples))["state"]
    assert torch.equal(both.chain_rows(shuffled)["state"], states[shuffled])


def test_wrong_number_of_seeds_and_diverged_physics_are_errors():
    policy = GaussianPolicy()
    with pytest.raises(SimulationError, match="multiple of 4"):
        collect([ReachEnv(4)], policy, range(6), generator(), max_chunks=4)
    with pytest.raises(SimulationError, match=r"seeds \[10\]"):
        collect([ReachEnv(2, fail_at=1)], policy, [10, 11], generator(), max_chunks=4)


def test_split_undoes_concatenation_sample_for_sample():
    policy = GaussianPolicy(std=1.0)
    parts = [collect([ReachEnv(4)], policy, range(n, n + 4), generator(n), max_chunks=9)[0] for n in (0, 10)]
    for piece, part in zip(split(concatenate(parts), 2), parts, strict=True):
        assert torch.equal(piece.reward[: len(part.reward)], part.reward) and piece.num_samples == part.num_samples
        now = policy.evaluate(piece.chain_rows(torch.arange(piece.num_samples)))
        assert torch.allclose(piece.samples(piece.log_prob), now.log_prob, atol=1e-6)
    pieces = split(parts[0], 3)  # sizes 2, 1, 1
    assert [piece.valid.shape[1] for piece in pieces] == [2, 1, 1]
    assert sum(piece.num_samples for piece in pieces) == parts[0].num_samples
