import sys

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.raster import make_rasterizer


def test_unknown_names_are_refused():
    with pytest.raises(SceneError, match="auto, numba, gsplat, cuda"):
        make_rasterizer("opengl")


@pytest.mark.parametrize("name", ["gsplat", "cuda"])
def test_without_cuda_it_is_said_what_to_use(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SceneError, match=f"{name} needs a CUDA device.*rasterizer=numba"):
        make_rasterizer(name)


@pytest.fixture
def a_gpu(monkeypatch):
    """Two CUDA devices, as far as choosing is concerned; returns the names of what can be built for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    buildable = {"ours", "reference"}

    def constructor(name):
        def construct(device):
            if name not in buildable:
                raise SceneError(f"{name} has no compiler")
            return f"{name} on {device}"

        return construct

    monkeypatch.setattr("gsrl_core.splat.raster_cuda.CudaRasterizer", constructor("ours"))
    monkeypatch.setattr("gsrl_core.splat.raster_gsplat.GsplatRasterizer", constructor("reference"))
    return buildable


def test_auto_takes_our_kernels_where_they_can_be_built(a_gpu, caplog):
    assert make_rasterizer("auto") == make_rasterizer("cuda") == "ours on cuda:0"
    assert make_rasterizer("gsplat") == "reference on cuda:0"
    assert not caplog.text


def test_auto_falls_back_with_a_warning_but_a_choice_is_a_choice(a_gpu, caplog):
    a_gpu.remove("ours")
    assert make_rasterizer("auto") == "reference on cuda:0"
    assert [record.message for record in caplog.records] == [
        "ours has no compiler; gsplat draws instead, many times slower"
    ]
    with pytest.raises(SceneError, match="ours has no compiler"):
        make_rasterizer("cuda")


def test_auto_falls_back_on_the_cpu_with_one_warning_of_both_causes(a_gpu, caplog):
    raster_numba = pytest.importorskip("gsrl_core.splat.raster_numba")
    a_gpu.clear()
    assert type(make_rasterizer("auto")) is raster_numba.NumbaRasterizer
    (record,) = caplog.records
    assert "ours has no compiler; reference has no compiler; the CPU draws instead" in record.message
    with pytest.raises(SceneError, match="reference has no compiler"):
        make_rasterizer("gsplat")


@pytest.mark.parametrize(("name", "who"), [("auto", "ours"), ("cuda", "ours"), ("gsplat", "reference")])
def test_the_device_is_the_callers(a_gpu, name, who):
    assert make_rasterizer(name, "cuda:1") == make_rasterizer(name, torch.device("cuda", 1)) == f"{who} on cuda:1"
    assert make_rasterizer(name, "cuda") == make_rasterizer(name, "cpu") == f"{who} on cuda:0"
    with pytest.raises(SceneError, match="no CUDA device cuda:2; this machine has 2"):
        make_rasterizer(name, "cuda:2")


def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raster_numba = pytest.importorskip("gsrl_core.splat.raster_numba")
    assert type(make_rasterizer("auto")) is type(make_rasterizer("numba")) is raster_numba.NumbaRasterizer


def test_choosing_a_rasteriser_does_not_import_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "gsplat", raising=False)
    make_rasterizer("numba")
    assert "gsplat" not in sys.modules
