import math

import pytest
import torch

from gsrl_core.policy.finite import FirstFailure, non_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_first_failure_is_remembered_and_keeps_the_optimizer_from_stepping(bad):
    failure = FirstFailure(torch.device("cpu"))
    fine, broken = torch.tensor(1.0), torch.tensor(bad)
    found = [failure.note(step, fine, broken if step in (3, 5) else fine).item() for step in range(1, 7)]
    assert found == [0, 0, 1, 1, 1, 1]
    assert failure.step() == 3


def test_no_failure_is_step_zero():
    failure = FirstFailure(torch.device("cpu"))
    assert failure.step() == 0
    failure.note(1, torch.tensor(1.0), torch.tensor(2.0))
    assert failure.step() == 0


def test_non_finite_tensors_are_named():
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, math.nan]), "c": torch.tensor(math.inf)}
    assert non_finite(tensors) == ["b", "c"]
    assert non_finite({}) == []
