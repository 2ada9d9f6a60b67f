import numpy as np
import pytest
import torch
from policy_examples import SMALL, TOKENIZER, stats
from test_demonstrations import episode

from gsrl_core.policy import frames
from gsrl_core.policy.demonstrations import load_demonstrations, write_shard
from gsrl_core.policy.frames import FrameSet, augment
from gsrl_core.policy.tokenizer import PromptTokenizer
from gsrl_core.policy.transforms import Normalizer, resize_with_pad


@pytest.fixture
def demonstrations(tmp_path):
    write_shard(tmp_path, 0, [episode(0, 6), episode(1, 5)])
    return load_demonstrations(tmp_path)


def test_samples_are_what_the_policy_would_see(demonstrations):
    tokenizer = PromptTokenizer(TOKENIZER, 64, discrete_state=True)
    normalizers = Normalizer(stats(9)), Normalizer(stats(7))
    built = FrameSet.build(demonstrations, SMALL, tokenizer, normalizers, "cpu")
    assert len(built) == 11
    row = torch.tensor([7])
    picture = torch.from_numpy(demonstrations.frames("camera", slice(7, 8)).copy())
    expected = resize_with_pad(picture, SMALL.image_size).permute(0, 3, 1, 2) / 255 * 2 - 1
    torch.testing.assert_close(built.pictures(row)["base_0_rgb"], expected)
    assert built.chunks.shape == (11, SMALL.horizon, SMALL.action_dim)
    restored = normalizers[1].denormalize(built.chunks)
    torch.testing.assert_close(restored[7, 0], demonstrations.action[7])
    torch.testing.assert_close(restored[7, 1], demonstrations.action[8])
    assert not built.chunks[:, :, 7:].any()


def picture(batch=2, side=64):
    ramp = torch.linspace(-0.5, 0.5, side)
    return torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)]).expand(
        batch, -1, -1, -1
    )


def test_augmentation_is_seeded_small_and_different_for_each_sample():
    images = {"base_0_rgb": picture()}
    first, second = (augment(images, torch.Generator().manual_seed(0))["base_0_rgb"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.abs().max() <= 1.0
    inside = (first - images["base_0_rgb"])[:, :, 12:-12, 12:-12]
    assert 0.01 < inside.abs().mean() < 0.25


def test_no_motion_and_no_colour_is_the_identity(monkeypatch):
    for name in ("MAX_ZOOM", "MAX_SHIFT", "MAX_TURN", "MAX_COLOR"):
        monkeypatch.setattr(frames, name, 0.0)
    images = {"base_0_rgb": picture()}
    result = augment(images, torch.Generator().manual_seed(0))["base_0_rgb"]
    torch.testing.assert_close(result, images["base_0_rgb"], atol=1e-5, rtol=0)


def test_wrist_pictures_are_not_moved(monkeypatch):
    monkeypatch.setattr(frames, "MAX_COLOR", 0.0)
    images = {"left_wrist_0_rgb": picture(), "base_0_rgb": picture()}
    result = augment(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result["left_wrist_0_rgb"], images["left_wrist_0_rgb"], atol=1e-5, rtol=0)
    assert not torch.allclose(result["base_0_rgb"], images["base_0_rgb"], atol=1e-3)


def test_what_moves_in_from_outside_is_black(monkeypatch):
    monkeypatch.setattr(frames, "MAX_SHIFT", 0.5)
    monkeypatch.setattr(frames, "MAX_COLOR", 0.0)
    moved = augment({"base_0_rgb": torch.ones(8, 3, 32, 32)}, torch.Generator().manual_seed(1))["base_0_rgb"]
    assert moved.min().item() == pytest.approx(-1.0)
    assert np.isclose(moved.max().item(), 1.0)
