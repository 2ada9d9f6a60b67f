"""The CPU rasteriser: one differentiable picture, or a batch of posed scenes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.composite_numba import composite_extras, composite_tiles, project_bodies
from gsrl_core.splat.constants import CONTACT_TOLERANCE, SURFACE_ALPHA
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.kernels_numba import EXTENT_X, EXTENT_Y, MEAN_X, MEAN_Y, Doubles
from gsrl_core.splat.parallel import num_threads, run_chunks
from gsrl_core.splat.picture_numba import (
    TILE_CHUNK,
    Picture,
    camera_arrays,
    covariance_array,
    draw,
    draw_backward,
    float_array,
)
from gsrl_core.splat.raster_gsplat import check_batch
from gsrl_core.splat.scene import Scene


def rasterize(
    means: Tensor,
    quats: Tensor,
    log_scales: Tensor,
    logit_opacities: Tensor,
    harmonics: Tensor,
    world_to_camera: Tensor,
    K: Tensor,
    width: int,
    height: int,
    background: Tensor,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Draw Gaussians for one camera; the fast version of :func:`raster_torch.rasterize_reference` (same arguments).

    Differentiable in the five Gaussian parameters and in ``background``, not in the camera. The same input gives the
    same bits, whatever the number of threads.

    Returns:
        rgb [h, w, 3], alpha [h, w], depth [h, w] (m), and ``info``: ``radii`` [N] (px, 0 where not drawn) and
        ``means2d`` [N, 2] (px), a leaf that after ``backward`` holds the gradient of the projected centres in ``grad``
        and the sum over pixels of its absolute value in ``absgrad`` (gsplat's convention).

    Raises:
        ValueError: a camera tensor requires gradients.
    """
    if world_to_camera.requires_grad or K.requires_grad:
        raise ValueError(
            "the CPU rasteriser has no camera gradients; detach world_to_camera and K, or use raster_torch"
        )
    parameters = (means, quats, log_scales, logit_opacities, harmonics)
    fitted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters)
    means2d = torch.zeros(len(means), 2, requires_grad=fitted)
    radii = torch.zeros(len(means))
    view, lens = camera_arrays(world_to_camera, K)
    frame = (view, lens, width, height, means2d, radii)
    color, summed_depth, alpha = _Rasterize.apply(*parameters, means2d, frame)
    rgb = color + (1 - alpha)[..., None] * background
    return rgb, alpha, summed_depth / alpha.clamp_min(1e-10), {"means2d": means2d, "radii": radii}


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        log_scales: Tensor,
        logit_opacities: Tensor,
        harmonics: Tensor,
        means2d: Tensor,
        frame: tuple[Doubles, Doubles, int, int, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        view, lens, width, height, means2d_leaf, radii = frame
        parameters = (means, quats, log_scales.exp(), torch.sigmoid(logit_opacities), harmonics)
        arrays = tuple(float_array(t) for t in parameters)
        covariance = covariance_array(arrays[1], arrays[2])
        picture = draw(arrays[0], covariance, arrays[3], arrays[4], view, lens, width, height)
        drawn = torch.from_numpy(picture.order).long()
        records = torch.from_numpy(picture.records)
        means2d_leaf.data[drawn] = records[drawn][:, [MEAN_X, MEAN_Y]]
        radii[drawn] = records[drawn][:, [EXTENT_X, EXTENT_Y]].amax(-1)
        ctx.saved = (arrays, covariance, picture, frame)
        return (
            torch.from_numpy(picture.rgb),
            torch.from_numpy(picture.depth),
            1 - torch.from_numpy(picture.through),
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        arrays, covariance, picture, (view, lens, _, _, means2d, _) = ctx.saved
        upstream = tuple(float_array(grad) for grad in grad_outputs)
        grads = draw_backward(arrays, covariance, picture, view, lens, upstream)
        tensors = [torch.from_numpy(g) for g in grads]
        means2d.absgrad = tensors[5][:, 2:]
        return (*tensors[:5], tensors[5][:, :2].contiguous(), None)


class StaticLayer(NamedTuple):
    """The static part seen by one camera pose."""

    rgb: np.ndarray
    """[h, w, 3] over black."""
    depth: np.ndarray
    """[h, w]: weighted mean of what was hit (m)."""
    surface: np.ndarray
    """[h, w]: depth beyond which moving Gaussians are hidden (m); infinite where there is no surface."""
    open: np.ndarray
    """[h, w]: light that comes through."""
    picture: np.ndarray
    """uint8 [h, w, 3]: the finished picture without bodies."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(array.nbytes for array in self)


class _Prepared(NamedTuple):
    """Gaussians of a scene part as arrays that do not depend on camera or pose."""

    means: np.ndarray
    covariance: np.ndarray
    opacities: np.ndarray
    harmonics: np.ndarray


class NumbaRasterizer:
    """Draws posed scenes on the CPU (see ``interfaces.Rasterizer``).

    The static part is drawn once per camera pose and kept (least recently used pictures go first); bodies are blended
    Gaussian by Gaussian in front of it, or behind it as far as it lets light through. The same input gives the same
    bits, whatever the number of threads, the batch and the state of the cache.
    """

    def __init__(self, background: tuple[float, float, float] = (0.0, 0.0, 0.0), cache_bytes: int = 512 << 20) -> None:
        self.background = np.array(background, np.float32)
        self.cache_bytes = cache_bytes
        self._source: Scene | None = None
        self._static: _Prepared | None = None
        self._bodies: _Prepared | None = None
        self._body_first = np.zeros(1, np.int64)
        self._cache: OrderedDict[bytes, StaticLayer] = OrderedDict()

    @torch.no_grad()
    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment (see ``interfaces.Rasterizer``).

        Raises:
            SceneError: ``body_to_world`` or a camera does not fit the scene and the number of environments.
        """
        check_batch(scene, body_to_world, cameras)
        self._load(scene)
        poses = body_to_world.detach().cpu().double()
        return {name: self._camera(camera, poses, extras) for name, camera in cameras.items()}

    def _load(self, scene: Scene) -> None:
        if self._source is scene:
            return
        order = torch.argsort(scene.body, stable=True)
        body = scene.body[order].contiguous().cpu()
        self._body_first = torch.searchsorted(body, torch.arange(len(scene.names) + 1, dtype=torch.int16)).numpy()
        static, bodies = order[: self._body_first[0]], order[self._body_first[0] :]
        self._body_first = self._body_first - self._body_first[0]
        self._static = _prepare(scene.gaussians.select(static))
        self._bodies = _prepare(scene.gaussians.select(bodies))
        self._source = scene
        self._cache.clear()

    def _camera(self, camera: Camera, poses: Tensor, extras: bool) -> Frames:
        count = len(poses)
        cameras = [camera_arrays(camera.world_to_camera[i], camera.K[i]) for i in range(len(camera))]
        world_to_camera = camera.world_to_camera.detach().cpu().double()
        views = (world_to_camera[:, None] @ poses)[:, :, :3].contiguous().numpy()
        out = _Outputs.allocate(count, camera.width, camera.height, extras)
        shared = len(camera) == 1
        # Whole environments are handed out when there are enough of them; otherwise one after another on all cores.
        alone = count < num_threads()
        layers = self._layers(cameras, camera.width, camera.height)

        def draw_range(start: int, stop: int) -> None:
            for i in range(start, stop):
                which = 0 if shared else i
                self._environment(views[i], cameras[which][1], layers[which], out, i, alone)

        if alone:
            draw_range(0, count)
        else:
            run_chunks(draw_range, count, 1)
        return out.frames()

    def _environment(
        self, views: np.ndarray, lens: np.ndarray, layer: StaticLayer, out: _Outputs, i: int, alone: bool
    ) -> None:
        assert self._bodies is not None
        height, width = layer.open.shape
        records, tile_first, gaussian = project_bodies(*self._bodies, self._body_first, views, lens, width, height)
        lists = (records, tile_first, gaussian)

        def tiles(start: int, stop: int) -> None:
            composite_tiles(
                start, stop, *lists, layer.rgb, layer.surface, layer.open, layer.picture, self.background, out.rgb[i]
            )
            if out.depth is not None and out.alpha is not None and out.body is not None:
                layers = (layer.depth, layer.surface, layer.open)
                composite_extras(start, stop, *lists, *layers, out.depth[i], out.alpha[i], out.body[i])

        count = tile_first.size - 1
        if alone:
            run_chunks(tiles, count, TILE_CHUNK)
        else:
            tiles(0, count)

    def _layers(self, cameras: Sequence[tuple[np.ndarray, np.ndarray]], width: int, height: int) -> list[StaticLayer]:
        """The static part for each camera; only the calling thread touches the cache, so a fork finds no lock held."""
        size = f"{width}x{height}".encode()
        keys = [view.tobytes() + lens.tobytes() + size for view, lens in cameras]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._cache}.values())
        drawn: dict[bytes, StaticLayer] = {}

        def draw_range(start: int, stop: int) -> None:
            for i in missing[start:stop]:
                drawn[keys[i]] = self._draw_layer(*cameras[i], width, height)

        if len(missing) < num_threads():
            draw_range(0, len(missing))  # each on all cores
        else:
            run_chunks(draw_range, len(missing), 1)
        for key in dict.fromkeys(keys):
            layer = drawn.get(key) or self._cache.pop(key)
            self._cache[key] = drawn[key] = layer  # now the most recently used
        while sum(kept.nbytes for kept in self._cache.values()) > self.cache_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return [drawn[key] for key in keys]

    def _draw_layer(self, view: np.ndarray, lens: np.ndarray, width: int, height: int) -> StaticLayer:
        assert self._static is not None
        return _static_layer(draw(*self._static, view, lens, width, height), self.background)


class _Outputs(NamedTuple):
    rgb: np.ndarray
    depth: np.ndarray | None
    alpha: np.ndarray | None
    body: np.ndarray | None

    @staticmethod
    def allocate(count: int, width: int, height: int, extras: bool) -> _Outputs:
        shape = (count, height, width)
        rgb = np.empty((*shape, 3), np.uint8)
        if not extras:
            return _Outputs(rgb, None, None, None)
        return _Outputs(rgb, np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.int16))

    def frames(self) -> Frames:
        return Frames(*(None if array is None else torch.from_numpy(array) for array in self))  # pyright: ignore


def _prepare(gaussians: Gaussians) -> _Prepared:
    means, quats, log_scales, logit_opacities, harmonics = gaussians.tensors()
    quats_array, scales = float_array(quats), float_array(log_scales.exp())
    opacities = float_array(torch.sigmoid(logit_opacities))
    return _Prepared(float_array(means), covariance_array(quats_array, scales), opacities, float_array(harmonics))


def _static_layer(picture: Picture, background: np.ndarray) -> StaticLayer:
    alpha = 1 - picture.through
    depth = picture.depth / np.maximum(alpha, 1e-10)
    surface = np.where(alpha > SURFACE_ALPHA, depth + CONTACT_TOLERANCE, np.inf).astype(np.float32)
    finished = picture.rgb + picture.through[..., None] * background
    picture_bytes = (np.clip(finished, 0, 1) * 255 + 0.5).astype(np.uint8)
    return StaticLayer(picture.rgb, depth, surface, picture.through, picture_bytes)
