import pytest
import torch

from gsrl_core.errors import TrainingError
from gsrl_core.policy.sft_memory import Footprint, picture_device
from gsrl_core.policy.storage import GIB, Memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_footprint_by_hand():
    frozen, trained = torch.zeros(1000, dtype=torch.bfloat16), torch.zeros(300)
    found = Footprint.of([frozen, trained], [trained], pictures=7)
    # 1000 x 2 + 300 x 4; 300 x 4; twice that; 300 x 4.
    assert (found.weights, found.gradients, found.moments, found.average, found.pictures) == (3200, 1200, 2400, 1200, 7)
    assert found.state == 4800


def test_footprint_in_words():
    found = str(Footprint(GIB, GIB // 2, GIB, GIB // 2, 2 * GIB))
    assert found == "weights 1, gradients 0.5, moments 1, average 0.5, pictures 2: 5 GiB"


def test_pictures_stay_where_they_fit():
    # Half of 10 - 4 GiB is 3 GiB.
    fits, large = (Footprint(GIB, GIB, 2 * GIB, GIB, pictures) for pictures in (3 * GIB, 3 * GIB + 1))
    free = Memory(device=10 * GIB, host=6 * GIB)
    assert picture_device(fits, free, CUDA) == CUDA
    assert picture_device(large, free, CUDA) == CPU
    assert picture_device(large, free, CPU) == CPU
    with pytest.raises(TrainingError, match=r"take 3 GiB; 10 GiB on the device and 1 GiB on the host are free"):
        picture_device(large, Memory(10 * GIB, GIB), CUDA)
    with pytest.raises(TrainingError, match="take 3 GiB"):
        picture_device(large, Memory(device=0, host=GIB), CPU)
