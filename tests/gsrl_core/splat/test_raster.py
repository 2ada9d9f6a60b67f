import sys

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.splat.raster import make_rasterizer


def test_unknown_names_are_refused():
    with pytest.raises(SceneError, match="auto, numba, gsplat"):
        make_rasterizer("opengl")


def test_gsplat_without_cuda_says_what_to_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SceneError, match="rasterizer=numba"):
        make_rasterizer("gsplat")


def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raster_numba = pytest.importorskip("gsrl_core.splat.raster_numba")
    assert type(make_rasterizer("auto")) is type(make_rasterizer("numba")) is raster_numba.NumbaRasterizer


def test_choosing_a_rasteriser_does_not_import_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "gsplat", raising=False)
    make_rasterizer("numba")
    assert "gsplat" not in sys.modules
