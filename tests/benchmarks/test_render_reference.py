"""The reference's rule of hiding against the CPU rasteriser, with contributions from the readable torch twin."""

import sys
from pathlib import Path

import pytest
import torch

from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.raster_gsplat import Layer, posed
from gsrl_core.splat.raster_numba import NumbaRasterizer
from gsrl_core.splat.raster_torch import _compositing_weights, _pixel_alphas, project, rasterize_reference
from gsrl_core.splat.scene import Scene

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import render_reference

CAMERA = Camera(
    look_at(torch.tensor([[0.3, 0.25, 0.5]]), torch.zeros(1, 3)), intrinsics(90.0, 92.0, 47, 34)[None], 96, 70
)


def _cloud(count, spread, seed, size):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=generator) * torch.tensor(spread),
        torch.randn(count, 4, generator=generator),
        torch.randn(count, 3, generator=generator) * 0.4 + size,
        torch.randn(count, generator=generator) + 1.0,
        torch.randn(count, 4, 3, generator=generator) * 0.3,
    )


def _contributions(gaussians, means, quats, colors):
    view, K, size = CAMERA.world_to_camera[0], CAMERA.K[0], (CAMERA.width, CAMERA.height)
    seen = project(means, quats, gaussians.log_scales, view, K, *size)
    order = torch.argsort(seen.depths, stable=True)
    opacities = torch.sigmoid(gaussians.logit_opacities[order])
    alpha = _pixel_alphas(seen.means2d[order], seen.covariances2d[order], opacities, *size)
    pixel, index = (_compositing_weights(alpha) > 0).nonzero(as_tuple=True)
    chosen = order[index]
    return render_reference.Contributions(pixel, alpha[pixel, index], seen.depths[chosen], colors[chosen])


def test_bodies_half_inside_the_table_are_hidden_as_the_cpu_rasteriser_hides_them():
    table, block = _cloud(900, (0.2, 0.2, 0.004), 0, -4.2), _cloud(200, (0.03, 0.03, 0.05), 1, -4.6)
    scene = Scene.from_parts(table, {"block": (block, torch.eye(4))})
    pose = make_rigid(rotvec_to_matrix(torch.tensor([[0.4, -0.3, 0.9]])), torch.tensor([[0.02, -0.03, 0.01]]))[None]
    expected = NumbaRasterizer().render(scene, pose, {"c": CAMERA})["c"].rgb[0]

    view, K, black = CAMERA.world_to_camera[0], CAMERA.K[0], torch.zeros(3)
    rgb, alpha, depth, _ = rasterize_reference(*table.tensors(), view, K, CAMERA.width, CAMERA.height, black)
    static = Layer(rgb, alpha, depth * alpha)
    means, quats, colors = (
        t[0] for t in posed(block, torch.zeros(200, dtype=torch.long), pose, CAMERA.world_to_camera)
    )
    drawn = render_reference.blend(_contributions(block, means, quats, colors), static)

    error = (drawn.int() - expected.int()).abs()
    assert int(error.max()) <= 2
    without = render_reference.blend(_contributions(block, means, quats, colors), Layer(rgb, alpha * 0, depth))
    assert int((without.int() - expected.int()).abs().max()) > 20, "the surface matters in this picture"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_picture_is_the_one_of_gsplats_contributions():
    from gsrl_core.splat.raster_cuda import CudaRasterizer

    table, block = _cloud(3000, (0.2, 0.2, 0.004), 0, -4.2), _cloud(900, (0.03, 0.03, 0.05), 1, -4.6)
    scene = Scene.from_parts(table, {"block": (block, torch.eye(4))})
    turns = rotvec_to_matrix(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))
    poses = make_rigid(turns, torch.tensor([[0.02, -0.03, 0.01], [0.1, 0.05, 0.0], [0.0, 0.0, -0.02]]))[:, None]
    drawn = CudaRasterizer().render(scene, poses, {"c": CAMERA})["c"].rgb
    error = (drawn.int() - render_reference.render(scene, poses, CAMERA).int()).abs().float()
    assert float(10 * torch.log10(255**2 / error.square().mean().clamp_min(1e-9))) >= 70
