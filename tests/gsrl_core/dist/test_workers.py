import os

import pytest
import torch

from gsrl_core.dist.collective import ProcessGroup, SingleProcess
from gsrl_core.dist.workers import LocalWorkers, RayWorkers, start_ray, stop_ray
from gsrl_core.errors import PlacementError, TrainingError, WorkerError


def make_counter_class():
    # Inside a function, so that it is pickled by value and Ray's processes need not import this test.
    class Counter:
        def __init__(self, rank):
            self.rank, self.total, self.group = rank, 0, None
            if rank == 99:
                raise TrainingError("cannot start")

        def add(self, amount):
            self.total += amount
            return self.rank, self.total

        def join(self, world_size, address):
            self.group = ProcessGroup(self.rank, world_size, address, nccl=False, timeout_s=60)

        def reduce(self):
            shared = self.group.broadcast(torch.tensor([float(self.rank + 5)]))
            mine = torch.tensor([float(self.rank + 1)])
            return self.group.sum(mine.clone()).item(), self.group.gather(mine).flatten().tolist(), shared.item()

        def refuse(self):
            raise TrainingError("the message for people")

        def crash(self):
            return {}["nothing"]

        def die(self):
            os._exit(1)

        def close(self):
            if self.group:
                self.group.close()

    return Counter


def test_local_workers_call_plainly_and_let_errors_through():
    group = LocalWorkers(make_counter_class())
    assert group.call("add", 2) == [(0, 2)]
    assert group.submit(0, "add", 3).result() == (0, 5)
    with pytest.raises(TrainingError, match="for people"):
        group.call("refuse")
    with pytest.raises(KeyError):
        group.call("crash")
    with pytest.raises(PlacementError):
        group.submit(1, "add", 1)


def test_a_single_process_reduces_to_itself():
    tensor = torch.arange(3.0)
    alone = SingleProcess()
    assert alone.sum(tensor) is tensor and alone.broadcast(tensor) is tensor
    assert alone.gather(tensor).shape == (1, 3)


def test_ray_workers_share_an_interface_reduce_and_keep_causes():
    revived = []
    counter = make_counter_class()
    try:
        group = RayWorkers("env", counter, [(0,), (0,)], restarts=1, on_restart=revived.append)
        assert group.call("add", 2) == [(0, 2), (1, 2)]
        first = group.submit(0, "add", 3)
        assert group.submit(1, "add", 4).result() == (1, 6) and first.result() == (0, 5)
        group.call("join", 2, group.node_address(0))
        assert group.call("reduce") == [(3.0, [1.0, 2.0], 5.0)] * 2

        with pytest.raises(TrainingError, match="for people") as caught:
            group.call("refuse")
        assert isinstance(caught.value.__cause__, WorkerError) and "in refuse" in str(caught.value.__cause__)
        with pytest.raises(WorkerError, match=r"env worker 1 failed in crash:[\s\S]*KeyError: 'nothing'"):
            group.submit(1, "crash").result()
        with pytest.raises(WorkerError, match="env worker 0 died"):
            group.submit(0, "die").result()  # dies again after its one restart
        assert revived == [0]
        with pytest.raises(TrainingError, match="cannot start"):
            RayWorkers("actor", lambda rank: counter(99), [(0,)])
    finally:
        stop_ray()


def test_a_ray_that_does_not_start_is_tried_again_and_then_reported(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    calls = []

    def late(**options):
        calls.append(options)
        if len(calls) != 2:
            raise Exception("timed out during startup")

    monkeypatch.setattr(ray, "init", late)
    assert start_ray() and len(calls) == 2
    with pytest.raises(WorkerError, match=r"in 3 attempts \(timed out during startup\).*cluster.runtime to local"):
        start_ray()
    assert len(calls) == 5

    def absent(**options):
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "init", absent)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(WorkerError, match=r"no Ray cluster at RAY_ADDRESS=192\.0\.2\.1:6379: refused"):
        start_ray()
