"""The CUDA rasteriser: gsplat's batched kernels for the moving bodies, over a cached picture of the static part.

One batch axis carries the environments, so no Gaussian of one can enter another's picture. Nothing leaves the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import matrix_to_quat, quat_multiply
from gsrl_core.splat.constants import CONTACT_TOLERANCE, EPS2D, FAR_PLANE, NEAR_PLANE, SURFACE_ALPHA, TILE_SIZE
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import sh_colors
from gsrl_core.splat.scene import Scene


class Layer(NamedTuple):
    """Pictures drawn over black, [B or 1, h, w, ...]."""

    rgb: Tensor
    """Premultiplied colour [..., 3]."""
    alpha: Tensor
    depth: Tensor
    """Sum of weight times depth (m)."""


class GsplatRasterizer:
    """Draws posed scenes on one CUDA device (see ``interfaces.Rasterizer``); the background is black.

    The static part of each camera is drawn once and kept until the scene or the camera's values change.
    """

    def __init__(self, device: torch.device | str = "cuda", environments_per_pass: int = 64) -> None:
        _check_backend()
        self.device = torch.device(device)
        self.environments_per_pass = environments_per_pass
        self._source: Scene | None = None
        self._static: Gaussians | None = None
        self._bodies: Gaussians | None = None
        self._body: Tensor | None = None
        self._cache: dict[str, tuple[bytes, Layer]] = {}

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
        poses = body_to_world.to(self.device, torch.float32)
        return {name: self._camera(name, camera.to(self.device), poses, extras) for name, camera in cameras.items()}

    def _load(self, scene: Scene) -> None:
        if self._source is scene:
            return
        moving = scene.body >= 0
        self._source = scene
        self._static = scene.gaussians.select(~moving).to(self.device)
        self._bodies = scene.gaussians.select(moving).to(self.device)
        self._body = scene.body[moving].long().to(self.device)
        self._cache.clear()

    def _camera(self, name: str, camera: Camera, poses: Tensor, extras: bool) -> Frames:
        static = self._static_layer(name, camera)
        parts = []
        for start in range(0, len(poses), self.environments_per_pass):
            chosen = slice(start, start + self.environments_per_pass)
            shared = len(camera) == 1
            view = camera.select(slice(None) if shared else chosen)
            behind = static if static.rgb.shape[0] == 1 else Layer(*(tensor[chosen] for tensor in static))
            parts.append(self._pass(view, behind, poses[chosen], extras))
        if not extras:
            return Frames(torch.cat([part.rgb for part in parts]))
        return Frames(*(torch.cat([getattr(p, f) for p in parts]) for f in ("rgb", "depth", "alpha", "body_id")))

    def _static_layer(self, name: str, camera: Camera) -> Layer:
        values = torch.cat([camera.world_to_camera.flatten(), camera.K.flatten()]).cpu().numpy().tobytes()
        key = values + f"{camera.width}x{camera.height}".encode()
        if self._cache.get(name, (b"", None))[0] != key:
            gaussians = self._static
            assert gaussians is not None
            layers, size = [], (camera.width, camera.height)
            for start in range(0, len(camera), self.environments_per_pass):
                part = camera.select(slice(start, start + self.environments_per_pass))
                colors = sh_colors(gaussians.harmonics, gaussians.means - part.centers[:, None])
                means, quats = (tensor.expand(len(part), -1, -1) for tensor in (gaussians.means, gaussians.quats))
                view, K = part.world_to_camera, part.K
                layers.append(_draw(gaussians, means, quats, colors.expand_as(means), view, K, *size)[0])
            self._cache[name] = (key, Layer(*(torch.cat(column) for column in zip(*layers, strict=True))))
        return self._cache[name][1]

    def _pass(self, camera: Camera, static: Layer, poses: Tensor, extras: bool) -> Frames:
        bodies, body = self._bodies, self._body
        assert bodies is not None and body is not None
        count = len(poses)
        view = camera.world_to_camera.expand(count, 4, 4)
        K = camera.K.expand(count, 3, 3)
        means, quats, colors = posed(bodies, body, poses, view)
        features = torch.nn.functional.one_hot(body, poses.shape[1]).float() if extras else None
        moving, weights = _draw(bodies, means, quats, colors, view, K, camera.width, camera.height, features)
        return composite(static, moving, weights)


def posed(bodies: Gaussians, body: Tensor, poses: Tensor, world_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """World means [B, N, 3], quats [B, N, 4] and colours [B, N, 3] of bodies' Gaussians at ``poses`` [B, M, 4, 4].

    The harmonics stay in each body's frame: the eye is moved into it instead.

    Args:
        bodies: N Gaussians in their bodies' frames.
        body: int64 [N] in 0 .. M - 1.
        poses: body_to_world.
        world_to_camera: [B, 4, 4].
    """
    rotation, translation = poses[..., :3, :3], poses[..., :3, 3]
    means = torch.einsum("bnij,nj->bni", rotation[:, body], bodies.means) + translation[:, body]
    quats = quat_multiply(matrix_to_quat(rotation)[:, body], bodies.quats.expand(len(poses), -1, -1))
    eye = -(world_to_camera[:, :3, :3].mT @ world_to_camera[:, :3, 3:])
    eye_in_body = (rotation.mT @ (eye[:, None] - translation[..., None])).squeeze(-1)
    colors = sh_colors(bodies.harmonics, bodies.means - eye_in_body[:, body])
    return means, quats, colors.expand(len(poses), -1, -1)


def composite(static: Layer, moving: Layer, body_weights: Tensor | None) -> Frames:
    """Moving bodies before or behind the static surface, decided for each pixel by the mean depth of the bodies.

    Args:
        static: [B or 1, h, w, ...].
        moving: [B, h, w, ...].
        body_weights: [B, h, w, M] each body's share of ``moving.alpha``; none leaves all but rgb out.
    """
    seen = static.depth / static.alpha.clamp_min(1e-10) + CONTACT_TOLERANCE
    surface = torch.where(static.alpha > SURFACE_ALPHA, seen, torch.inf)
    hidden = moving.depth / moving.alpha.clamp_min(1e-10) > surface
    one = torch.ones_like(moving.alpha)
    of_moving = torch.where(hidden, 1 - static.alpha, one)
    of_static = torch.where(hidden, one, 1 - moving.alpha)
    rgb = of_moving[..., None] * moving.rgb + of_static[..., None] * static.rgb
    picture = (rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    if body_weights is None:
        return Frames(picture)
    alpha = of_moving * moving.alpha + of_static * static.alpha
    depth = (of_moving * moving.depth + of_static * static.depth) / alpha.clamp_min(1e-10)
    shares = torch.cat([(of_static * static.alpha)[..., None], of_moving[..., None] * body_weights], dim=-1)
    owner = torch.where(alpha >= SURFACE_ALPHA, shares.argmax(-1) - 1, -1)
    return Frames(picture, depth, alpha, owner.to(torch.int16))


def check_batch(scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera]) -> None:
    """Refuse poses and cameras that do not fit.

    Raises:
        SceneError: wrong shape of ``body_to_world``, or a camera whose leading size is neither 1 nor B.
    """
    bodies = len(scene.names)
    if body_to_world.ndim != 4 or body_to_world.shape[1:] != (bodies, 4, 4):
        raise SceneError(f"render: body_to_world is {tuple(body_to_world.shape)}, must be [B, {bodies}, 4, 4]")
    for name, camera in cameras.items():
        if len(camera) not in (1, len(body_to_world)):
            raise SceneError(
                f"render: camera {name!r} has {len(camera)} poses; give 1 for all environments or {len(body_to_world)}"
            )


def _draw(
    gaussians: Gaussians,
    means: Tensor,
    quats: Tensor,
    colors: Tensor,
    world_to_camera: Tensor,
    K: Tensor,
    width: int,
    height: int,
    features: Tensor | None = None,
) -> tuple[Layer, Tensor | None]:
    """B pictures of B sets of Gaussians, and the weights [B, h, w, F] of ``features`` [N, F] if given."""
    from gsplat import rasterization

    batch, count = means.shape[:2]
    if not count:
        empty = means.new_zeros(batch, height, width, 4)
        weights = None if features is None else means.new_zeros(batch, height, width, features.shape[1])
        return Layer(empty[..., :3], empty[..., 3], empty[..., 3]), weights
    channels = colors if features is None else torch.cat([colors, features.expand(batch, -1, -1)], dim=-1)
    drawn, alpha, _ = rasterization(
        means,
        quats,
        gaussians.log_scales.exp().expand(batch, -1, -1),
        torch.sigmoid(gaussians.logit_opacities).expand(batch, -1),
        channels,
        world_to_camera[:, None],
        K[:, None],
        width,
        height,
        near_plane=NEAR_PLANE,
        far_plane=FAR_PLANE,
        eps2d=EPS2D,
        packed=False,
        tile_size=TILE_SIZE,
        render_mode="RGB+D",
    )
    drawn, alpha = drawn[:, 0], alpha[:, 0, ..., 0]
    return Layer(drawn[..., :3], alpha, drawn[..., -1]), None if features is None else drawn[..., 3:-1]


def _check_backend() -> None:
    try:
        from gsplat.cuda._backend import _C  # pyright: ignore[reportAttributeAccessIssue]
    except (ImportError, OSError, RuntimeError, IndexError) as error:  # it compiles its kernels when first imported
        raise SceneError(
            f"gsplat's CUDA kernels could not be built or loaded ({type(error).__name__}: {error}); check that nvcc "
            "matches PyTorch's CUDA version, or use rasterizer=numba"
        ) from error
    if _C is None:
        raise SceneError(
            "gsplat's CUDA kernels are not built and there is no CUDA compiler to build them; install the CUDA toolkit "
            "(nvcc of PyTorch's CUDA version), or use rasterizer=numba"
        )
