import dataclasses

import pytest
import torch
from policy_examples import SMALL, randomised

from gsrl_core.policy.flow import flow_matching_target
from gsrl_core.policy.frames import FrameSet
from gsrl_core.policy.matching import Batch, matching_loss

CPU = torch.device("cpu")


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(9, 8, dtype=torch.bool)
    mask[:, :5] = True
    mask[3, 5] = True
    return FrameSet(
        {"base_0_rgb": torch.randint(256, (9, 32, 32, 3), generator=generator, dtype=torch.uint8)},
        torch.randint(1, 500, (9, 8), generator=generator) * mask,
        mask,
        torch.randn(9, SMALL.horizon, SMALL.action_dim, generator=generator),
        None,
        CPU,
    )


def draw(frames, *, augmented=True):
    return Batch.draw(frames, torch.tensor([3, 1, 7, 3, 0, 8]), torch.Generator().manual_seed(1), augmented=augmented)


def test_parts_of_a_batch_are_its_rows(frames):
    batch = draw(frames)
    parts = list(batch.split(4))
    assert [len(part.index) for part in parts] == [4, 2]
    for name in ("index", "noise", "t"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.changes["base_0_rgb"] for part in parts]), batch.changes["base_0_rgb"])
    assert draw(frames, augmented=False).changes == {}


@pytest.mark.parametrize("augmented", [False, True])
def test_loss_is_the_mean_of_its_parts(frames, augmented):
    network, batch = randomised(SMALL), draw(frames, augmented=augmented)
    parts = torch.stack([matching_loss(network, frames, part) for part in batch.split(2)])
    torch.testing.assert_close(parts.mean(), matching_loss(network, frames, batch))


def test_loss_by_the_whole_prefix(frames):
    # With features, that is with what the last layer of the prefix computes and nobody sees.
    network, batch = randomised(SMALL), draw(frames, augmented=False)
    loss = matching_loss(network, frames, batch)
    masks = {"base_0_rgb": torch.ones(6, dtype=torch.bool)}
    tokens, mask = frames.tokens[batch.index], frames.token_mask[batch.index]
    prefix = network.embed_prefix(frames.pictures(batch.index), masks, tokens, mask)
    x_t, target = flow_matching_target(frames.chunks[batch.index], batch.noise, batch.t)
    assert loss.item() == (network.velocity(prefix, x_t, batch.t) - target).square().mean().item()


def test_pi0_is_shown_the_state(frames):
    network = randomised(dataclasses.replace(SMALL, family="pi0", discrete_state=False))
    batch = draw(frames)
    losses = []
    for value in (0.0, 1.0):
        seen = dataclasses.replace(frames, state=torch.full((9, SMALL.action_dim), value))
        losses.append(matching_loss(network, seen, batch).item())
    assert losses[0] != losses[1]
