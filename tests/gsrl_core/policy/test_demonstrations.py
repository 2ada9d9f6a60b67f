import numpy as np
import pytest
import torch

from gsrl_core.errors import TrainingError
from gsrl_core.policy.demonstrations import (
    Episode,
    action_chunks,
    load_demonstrations,
    shard_folder,
    write_shard,
)


def episode(seed, length, value=None):
    rng = np.random.default_rng(seed)
    return Episode(
        seed,
        f"sentence {seed % 2}",
        {"camera": rng.integers(256, size=(length, 6, 8, 3), dtype=np.uint8)},
        rng.normal(size=(length, 9)).astype(np.float32),
        rng.normal(size=(length, 7)).astype(np.float32),
    )


def test_round_trip_over_shards(tmp_path):
    written = [episode(5, 3), episode(6, 1), episode(12, 4)]
    write_shard(tmp_path, 5, written[:2])
    write_shard(tmp_path, 9, [])
    write_shard(tmp_path, 12, written[2:])
    read = load_demonstrations(tmp_path)
    assert len(read) == 8
    assert read.seed.tolist() == [5, 5, 5, 6, 12, 12, 12, 12]
    assert read.episodes() == [slice(0, 3), slice(3, 4), slice(4, 8)]
    assert read.instructions == {5: "sentence 1", 6: "sentence 0", 12: "sentence 0"}
    for rows, original in zip(read.episodes(), written, strict=True):
        np.testing.assert_array_equal(read.frames("camera", rows), original.rgb["camera"])
        np.testing.assert_array_equal(read.state[rows], original.state)
        np.testing.assert_array_equal(read.action[rows], original.action)
    # A range across the border of two shards.
    joined = np.concatenate([e.rgb["camera"] for e in written])
    np.testing.assert_array_equal(read.frames("camera", slice(2, 6)), joined[2:6])
    assert isinstance(read.rgb["camera"][0], np.memmap)


def test_chunks_stay_inside_the_episode():
    action = torch.arange(1.0, 11.0).reshape(5, 2)
    chunks = action_chunks(action, [slice(0, 3), slice(3, 5)], 3)
    assert chunks.tolist() == [
        [[1, 2], [3, 4], [5, 6]],
        [[3, 4], [5, 6], [0, 6]],
        [[5, 6], [0, 6], [0, 6]],
        [[7, 8], [9, 10], [0, 10]],
        [[9, 10], [0, 10], [0, 10]],
    ]


def test_horizon_of_one_is_the_action():
    action = torch.randn(4, 7)
    assert torch.equal(action_chunks(action, [slice(0, 4)], 1)[:, 0], action)


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, 0, [episode(0, 2)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shard: (shard / "state.npy").write_bytes(b"junk"), "are broken"),
        (lambda shard: (shard / "action.npy").unlink(), "are broken"),
        (lambda shard: (shard / "instructions.json").write_text("{"), "are broken"),
        (lambda shard: np.save(shard / "state.npy", np.zeros((2, 9), np.float32)), "do not belong together"),
    ],
)
def test_broken_shards_are_named(tmp_path, spoil, message):
    write_shard(tmp_path, 0, [episode(0, 5)])
    spoil(shard_folder(tmp_path, 0))
    with pytest.raises(TrainingError, match=message):
        load_demonstrations(tmp_path)


def test_nothing_to_load(tmp_path):
    with pytest.raises(TrainingError, match="no demonstrations"):
        load_demonstrations(tmp_path)
    write_shard(tmp_path, 0, [])
    with pytest.raises(TrainingError, match="no episode"):
        load_demonstrations(tmp_path)
