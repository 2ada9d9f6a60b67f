import dataclasses

import numpy as np
import pytest
import torch
from policy_examples import SMALL, TOKENIZER, stats
from test_demonstrations import episode

from gsrl_core.policy import frames
from gsrl_core.policy.demonstrations import load_demonstrations, write_shard
from gsrl_core.policy.frames import FrameSet, augment, draw_augmentation, picture_bytes
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


def built_for(demonstrations, config=SMALL, **places):
    tokenizer = PromptTokenizer(TOKENIZER, 64, discrete_state=True)
    return FrameSet.build(
        demonstrations, config, tokenizer, (Normalizer(stats(9)), Normalizer(stats(7))), **({"device": "cpu"} | places)
    )


def test_pictures_take_as_much_as_estimated(demonstrations):
    images = built_for(demonstrations).images.values()
    assert sum(image.numel() for image in images) == picture_bytes(demonstrations, SMALL) == 11 * 32 * 32 * 3


def test_pictures_that_wait_on_the_host_are_converted_where_training_happens(demonstrations):
    # The meta device stands for the accelerator.
    frames = dataclasses.replace(built_for(demonstrations, images_on="cpu"), device=torch.device("meta"))
    assert frames.images["base_0_rgb"].device.type == "cpu"
    assert frames.pictures(torch.tensor([1, 2]))["base_0_rgb"].device.type == "meta"
    there = built_for(demonstrations, images_on="meta")
    assert there.images["base_0_rgb"].device.type == "meta"


def test_only_pi0_gets_the_state_beside_the_prompt(demonstrations):
    assert built_for(demonstrations).state is None
    state = built_for(demonstrations, dataclasses.replace(SMALL, family="pi0")).state
    torch.testing.assert_close(state[:, :9], Normalizer(stats(9)).normalize(demonstrations.state))
    assert state.shape == (11, SMALL.action_dim)
    assert not state[:, 9:].any()


def augmented(images, seed):
    batch = len(next(iter(images.values())))
    return augment(images, draw_augmentation(images, batch, torch.Generator().manual_seed(seed)))


def picture(batch=2, side=64):
    ramp = torch.linspace(-0.5, 0.5, side)
    return torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)]).expand(
        batch, -1, -1, -1
    )


def test_augmentation_is_seeded_small_and_different_for_each_sample():
    images = {"base_0_rgb": picture()}
    first, second = (augmented(images, 0)["base_0_rgb"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.abs().max() <= 1.0
    inside = (first - images["base_0_rgb"])[:, :, 12:-12, 12:-12]
    assert 0.01 < inside.abs().mean() < 0.25


def test_no_motion_and_no_colour_is_the_identity(monkeypatch):
    for name in ("MAX_ZOOM", "MAX_SHIFT", "MAX_TURN", "MAX_COLOR"):
        monkeypatch.setattr(frames, name, 0.0)
    images = {"base_0_rgb": picture()}
    result = augmented(images, 0)["base_0_rgb"]
    torch.testing.assert_close(result, images["base_0_rgb"], atol=1e-5, rtol=0)


def test_wrist_pictures_are_not_moved(monkeypatch):
    monkeypatch.setattr(frames, "MAX_COLOR", 0.0)
    images = {"left_wrist_0_rgb": picture(), "base_0_rgb": picture()}
    result = augmented(images, 0)
    torch.testing.assert_close(result["left_wrist_0_rgb"], images["left_wrist_0_rgb"], atol=1e-5, rtol=0)
    assert not torch.allclose(result["base_0_rgb"], images["base_0_rgb"], atol=1e-3)


def test_what_moves_in_from_outside_is_black(monkeypatch):
    monkeypatch.setattr(frames, "MAX_SHIFT", 0.5)
    monkeypatch.setattr(frames, "MAX_COLOR", 0.0)
    moved = augmented({"base_0_rgb": torch.ones(8, 3, 32, 32)}, 1)["base_0_rgb"]
    assert moved.min().item() == pytest.approx(-1.0)
    assert np.isclose(moved.max().item(), 1.0)
