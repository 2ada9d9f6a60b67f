import pytest
import torch

from gsrl_core.dist.weights import WeightPublisher, WeightReceiver
from gsrl_core.errors import WorkerError


def test_only_what_changed_travels_and_arrives():
    source = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    target = {name: torch.full_like(tensor, 7) for name, tensor in source.items()}
    publisher, receiver = WeightPublisher(), WeightReceiver()
    first = publisher.changes(source)
    assert set(first.tensors) == {"a", "b"} and first.base is None
    receiver.apply(first, target)
    source["b"] += 1e-3
    second = publisher.changes(source)
    assert set(second.tensors) == {"b"}
    receiver.apply(second, target)
    assert all(torch.equal(source[name], target[name]) for name in source)
    assert publisher.changes(source).tensors == {}


def test_an_update_is_a_copy_that_later_training_does_not_touch():
    source = {"a": torch.zeros(2)}
    update = WeightPublisher().changes(source)
    source["a"] += 1
    assert update.tensors["a"].tolist() == [0, 0]


def test_a_missed_version_is_noticed_and_everything_heals_it():
    source, target = {"a": torch.zeros(1)}, {"a": torch.zeros(1)}
    publisher, receiver = WeightPublisher(), WeightReceiver()
    receiver.apply(publisher.changes(source), target)
    source["a"] += 1
    publisher.changes(source)
    source["a"] += 1
    late = publisher.changes(source)
    with pytest.raises(WorkerError, match="change version 2, but this worker has 1"):
        receiver.apply(late, target)
    receiver.apply(publisher.everything(), target)
    assert target["a"].item() == 2 and receiver.version == 3


def test_weights_of_another_network_are_refused():
    update = WeightPublisher().changes({"a": torch.zeros(2), "c": torch.zeros(1)})
    with pytest.raises(WorkerError, match="a, c"):
        WeightReceiver().apply(update, {"a": torch.zeros(3)})
