"""The parity benchmark measures what it says, on sizes that both networks can be cut to."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "gsrl_core" / "policy"))
import parity as benchmark
from lerobot_examples import CONFIG, small_lerobot

CPU = torch.device("cpu")
SIZES = dataclasses.replace(CONFIG, max_token_len=40)


@pytest.fixture(scope="module")
def found():
    with small_lerobot():
        return {precision: benchmark.compare(SIZES, precision, CPU) for precision in ("float32", "bfloat16")}


def test_the_two_agree_and_bfloat16_is_what_it_is(found):
    assert list(found["float32"].errors) == [
        "velocity at t = 1.0", "velocity at t = 0.6", "velocity at t = 0.1", "chunk of 5 actions, 10 steps",
    ]  # fmt: skip
    assert max(found["float32"].errors.values()) < 1e-4
    assert 1e-4 < max(found["bfloat16"].errors.values()) < 0.05


def test_another_network_is_told_apart(monkeypatch):
    def spoiled(config, weights, precision, make=benchmark.make_ours):
        return make(config, weights | {"time_mlp_in.bias": weights["time_mlp_in.bias"] + 0.1}, precision)

    monkeypatch.setattr(benchmark, "make_ours", spoiled)
    with small_lerobot():
        assert min(benchmark.compare(SIZES, "float32", CPU).errors.values()) > 1e-3


def test_fewer_layers_can_be_asked_for():
    with small_lerobot():
        found = benchmark.compare(dataclasses.replace(SIZES, depth=1), "float32", CPU)
    assert max(found.errors.values()) < 1e-4


def test_weights_are_not_copied():
    with small_lerobot():
        weights = benchmark.make_weights(SIZES, "bfloat16", CPU)
        reference = benchmark.make_reference(SIZES, weights, "bfloat16", CPU)
    network = benchmark.make_ours(SIZES, weights, "bfloat16")
    own = dict(reference.named_parameters())
    assert all(parameter.data_ptr() == own[name].data_ptr() for name, parameter in network.named_parameters())


def test_the_table(found):
    lines = benchmark.table(found).splitlines()
    assert lines[0] == "| relative error, ours against lerobot's | float32 | bfloat16 |"
    assert len(lines) == 8
    assert lines[-1].startswith("| the chunk in bfloat16 (ours) against lerobot's in float32 |  | ")
    assert len(benchmark.table({"bfloat16": found["bfloat16"]}).splitlines()) == 6
