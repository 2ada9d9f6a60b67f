import numpy as np
import pytest
import torch
from PIL import Image

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.transforms import (
    NEEDED,
    FieldStats,
    Normalizer,
    discretize_state,
    norm_stats_from_json,
    norm_stats_to_json,
    pad_last,
    resize_with_pad,
    to_network_range,
)


def pil_resize_with_pad(image, size):
    height, width = image.shape[:2]
    ratio = max(width / size, height / size)
    new = int(width / ratio), int(height / ratio)
    small = Image.fromarray(image).resize(new, Image.BILINEAR)
    canvas = Image.new("RGB", (size, size), 0)
    canvas.paste(small, (max(0, int((size - new[0]) / 2)), max(0, int((size - new[1]) / 2))))
    return np.asarray(canvas)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(480, 640, 224), (120, 160, 128), (33, 57, 40), (50, 20, 64), (64, 64, 64)]
)
def test_resize_with_pad_is_pil_within_one_level(height, width, size):
    images = torch.randint(256, (2, height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours = resize_with_pad(images, size)
    assert ours.dtype == torch.uint8
    for image, result in zip(images, ours, strict=True):
        reference = pil_resize_with_pad(image.numpy(), size).astype(int)
        assert np.abs(result.numpy().astype(int) - reference).max() <= 1


def test_seed_picture_gets_28_black_rows_above_and_below():
    out = resize_with_pad(torch.full((1, 480, 640, 3), 255, dtype=torch.uint8), 224)
    assert not out[0, :28].any()
    assert not out[0, -28:].any()
    assert (out[0, 28:-28] == 255).all()


def test_network_range():
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(1, 1, 1, 3)
    torch.testing.assert_close(to_network_range(image).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("mode", ["quantile", "mean_std"])
def test_normalizer_round_trip(mode):
    data = torch.randn(500, 7, generator=torch.Generator().manual_seed(1)) * 3 + 1
    normalizer = Normalizer(FieldStats.of(data), mode)
    torch.testing.assert_close(normalizer.denormalize(normalizer.normalize(data)), data, atol=1e-5, rtol=1e-5)
    padded = pad_last(normalizer.normalize(data), 32)
    torch.testing.assert_close(normalizer.denormalize(padded), data, atol=1e-5, rtol=1e-5)


def test_quantile_formula_by_hand():
    stats = FieldStats(*(torch.tensor([value]) for value in (0.0, 1.0, -2.0, 6.0)))
    normalizer = Normalizer(stats)
    # (x - q01) / (q99 - q01 + 1e-6) * 2 - 1
    assert normalizer.normalize(torch.tensor([0.0])).item() == pytest.approx(2 / (8 + 1e-6) * 2 - 1, abs=1e-6)
    assert normalizer.denormalize(torch.tensor([1.0])).item() == pytest.approx(6.0, abs=1e-5)


def test_constant_entry_survives_the_round_trip():
    stats = FieldStats(*(torch.tensor([0.3]) for _ in range(4)))
    normalizer = Normalizer(stats)
    assert normalizer.denormalize(normalizer.normalize(torch.tensor([0.3]))).item() == pytest.approx(0.3)
    # Whatever the network says, a constant entry stays within a micrometre.
    assert normalizer.denormalize(torch.tensor([0.5])).item() == pytest.approx(0.3, abs=1e-5)


def test_field_stats_match_numpy():
    data = torch.randn(1001, 3, generator=torch.Generator().manual_seed(2))
    stats = FieldStats.of(data)
    array = data.double().numpy()
    np.testing.assert_allclose(stats.q01, np.quantile(array, 0.01, axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.q99, np.quantile(array, 0.99, axis=0), atol=1e-6)
    np.testing.assert_allclose(stats.std, array.std(axis=0), atol=1e-6)


def test_field_stats_of_more_rows_than_torch_quantile_takes():
    count = 2**24 + 1
    column = torch.arange(count - 1, -1, -1, dtype=torch.float32)[:, None] / 2**24
    stats = FieldStats.of(column)
    assert [getattr(stats, name).item() for name in ("mean", "q01", "q99")] == pytest.approx([0.5, 0.01, 0.99])
    assert stats.std.item() == pytest.approx(12**-0.5)


def test_state_bins_are_numpy_digitize():
    state = torch.tensor([-5.0, -1.0, -0.999, 0.0, 0.0078124, 0.0078126, 0.9999, 1.0, 7.0])
    edges = np.linspace(-1, 1, 257)[:-1]
    assert discretize_state(state).tolist() == (np.digitize(state.double().numpy(), edges) - 1).tolist()
    assert discretize_state(state).tolist() == [-1, 0, 0, 128, 128, 129, 255, 255, 255]


def test_pad_refuses_to_cut():
    with pytest.raises(CheckpointError, match="40 entries does not fit"):
        pad_last(torch.zeros(2, 40), 32)


def test_norm_stats_round_trip_and_padding_is_cut():
    state, actions = FieldStats.of(torch.randn(50, 9)), FieldStats.of(torch.randn(50, 7))
    tree = norm_stats_to_json(state, actions)
    for values in tree["norm_stats"]["actions"].values():
        values += [0.0] * 25
    state2, actions2 = norm_stats_from_json(tree, "x", padded_width=32)
    assert torch.equal(state.q01, state2.q01)
    assert torch.equal(actions.std, actions2.std)


def test_a_last_entry_that_was_always_zero_is_kept():
    stats = FieldStats.of(torch.randn(50, 7) * torch.tensor([1.0] * 6 + [0.0]))
    for read in norm_stats_from_json(norm_stats_to_json(stats, stats), "x", padded_width=32):
        assert torch.equal(torch.stack([read.mean, read.q99]), torch.stack([stats.mean, stats.q99]))


def test_only_what_the_normalisation_needs_has_to_be_there():
    tree = norm_stats_to_json(FieldStats.of(torch.randn(50, 9)), FieldStats.of(torch.randn(50, 7)))
    for values in tree["norm_stats"].values():
        del values["q01"], values["q99"]
    _, actions = norm_stats_from_json(tree, "x", NEEDED["mean_std"])
    assert actions.q01.isnan().all()
    assert norm_stats_to_json(*norm_stats_from_json(tree, "x", NEEDED["mean_std"])) == tree
    with pytest.raises(CheckpointError, match="state needs q01, q99 and lacks q01, q99"):
        norm_stats_from_json(tree, "x", NEEDED["quantile"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("actions"), "'state' and 'actions'"),
        (lambda t: t["state"].pop("q99"), "needs mean, std, q01, q99"),
        (lambda t: t["state"]["mean"].append(1.0), "equally long"),
        (lambda t: t["state"]["mean"].__setitem__(0, float("nan")), "finite"),
        (lambda t: t["state"].update(q01=t["state"]["q99"], q99=t["state"]["q01"]), "below q01"),
        (lambda t: t.update(state=[1, 2]), "needs mean"),
    ],
)
def test_broken_norm_stats_are_named(spoil, message):
    tree = norm_stats_to_json(FieldStats.of(torch.randn(50, 9)), FieldStats.of(torch.randn(50, 7)))
    spoil(tree["norm_stats"])
    with pytest.raises(CheckpointError, match=message):
        norm_stats_from_json(tree, "norm_stats.json")
