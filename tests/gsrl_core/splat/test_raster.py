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
    """A CUDA device for which our kernels can be built, as far as choosing is concerned; returns a switch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    buildable = [True]

    def ours():
        if not buildable[0]:
            raise SceneError("no compiler")
        return "ours"

    monkeypatch.setattr("gsrl_core.splat.raster_cuda.CudaRasterizer", ours)
    monkeypatch.setattr("gsrl_core.splat.raster_gsplat.GsplatRasterizer", lambda: "reference")
    return buildable


def test_auto_takes_our_kernels_where_they_can_be_built(a_gpu, caplog):
    assert make_rasterizer("auto") == make_rasterizer("cuda") == "ours"
    assert make_rasterizer("gsplat") == "reference"
    assert not caplog.text


def test_auto_falls_back_with_a_warning_but_a_choice_is_a_choice(a_gpu, caplog):
    a_gpu[0] = False
    assert make_rasterizer("auto") == "reference"
    assert "no compiler" in caplog.text
    with pytest.raises(SceneError, match="no compiler"):
        make_rasterizer("cuda")


def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raster_numba = pytest.importorskip("gsrl_core.splat.raster_numba")
    assert type(make_rasterizer("auto")) is type(make_rasterizer("numba")) is raster_numba.NumbaRasterizer


def test_choosing_a_rasteriser_does_not_import_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "gsplat", raising=False)
    make_rasterizer("numba")
    assert "gsplat" not in sys.modules
