import pytest

from gsrl_core.dist.placement import parse_placement
from gsrl_core.errors import PlacementError


def test_the_three_placements_of_the_seed():
    everything = parse_placement({"env,rollout,actor": "all"}, 4)
    assert everything.env == ((0,), (1,), (2,), (3,)) and everything.collocated
    split = parse_placement({"env": "0-3", "rollout": "4-7", "actor": "0-7"}, 8)
    assert not split.collocated and len(split.actor) == 8
    assert split.collectors == ((0, 4), (1, 5), (2, 6), (3, 7))
    shared = parse_placement({"env,rollout,actor": "0:0-1"}, 1)
    assert shared.actor == ((0,), (0,))


def test_several_devices_for_a_process_and_several_segments():
    assert parse_placement({"env,rollout,actor": "0-3:0-1"}, 4).env == ((0, 1), (2, 3))
    assert parse_placement({"env,rollout,actor": "0-1:0-3"}, 2).env == ((0,), (0,), (1,), (1,))
    assert parse_placement({"env,rollout,actor": "0-1,3"}, 4).env == ((0,), (1,), (3,))
    assert parse_placement({"env,rollout,actor": "2:1-2, 0:0"}, 4).env == ((0,), (2,), (2,))


def test_without_a_gpu_all_is_the_cpu_and_processes_may_share_it():
    assert parse_placement({"env,rollout,actor": "all"}, 0).env == ((0,),)
    assert len(parse_placement({"env,rollout,actor": "0:0-1"}, 0).actor) == 2


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ({"env,rollout,actor": "0-7"}, "device 4; devices here: 0-3"),
        ({"env,rollout,critic": "all"}, "unknown role 'critic'.*env, rollout, actor"),
        ({"env,rollout": "all"}, "does not place actor"),
        ({"env,rollout,actor": "all", "env": "0"}, "places 'env' twice"),
        ({"env,rollout,actor": "zero"}, "cannot read 'zero'"),
        ({"env,rollout,actor": "3-1"}, "cannot read '3-1'"),
        ({"env,rollout,actor": ""}, "cannot read ''"),
        ({"env,rollout,actor": "0-2:0-1"}, "3 devices and 2 processes"),
        ({"env,rollout,actor": "0:1"}, "from 0 without gaps"),
        ({"env,rollout,actor": "0:0,1:0"}, "process 0 twice"),
        ({"env": "0-1", "rollout,actor": "0-3"}, "2 env processes but 4 rollout"),
        ({"env,rollout": "0-1", "actor": "0-2"}, "2 env processes and 3 actor"),
    ],
)
def test_each_mistake_has_its_own_line(strings, message):
    with pytest.raises(PlacementError, match=message):
        parse_placement(strings, 4)


def test_a_missing_gpu_is_named_as_such():
    with pytest.raises(PlacementError, match=r"device 1; devices here: 0 \(the CPU\)"):
        parse_placement({"env,rollout,actor": "0-1"}, 0)
