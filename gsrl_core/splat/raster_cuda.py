"""The fast CUDA rasteriser: many environments of one posed scene, drawn by our own kernels.

No Gaussian is moved or copied: each body is seen by a camera of its own, ``world_to_camera @ body_to_world``, and its
harmonics stay in its frame. Bodies are blended Gaussian by Gaussian in front of the static part, or behind it as far as
it lets light through, exactly as ``raster_numba.NumbaRasterizer`` does it. Pictures become uint8 on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.cuda import library
from gsrl_core.splat.cuda.library import CHUNK, LIVE, OVER_LAYER, STATE, STATIC_ONLY
from gsrl_core.splat.cuda.packing import Packed, pack
from gsrl_core.splat.cuda.plan import (
    LAYER_BYTES,
    Found,
    Layer,
    Plan,
    address,
    aligned,
    allocate_frames,
    check_size,
    empty_layer,
    scratch_sizes,
)
from gsrl_core.splat.cuda.seen import Seen
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_gsplat import check_batch
from gsrl_core.splat.scene import Scene

GROWTH = 1.25
"""Room for entries is made this much larger than what did not fit."""


@dataclass
class _Known:
    """A camera of earlier calls."""

    seen: Seen = field(default_factory=Seen)
    camera: Camera | None = None
    """The poses that ``seen`` remembers, on the device."""
    layer: Layer | None = None
    """The static part from those poses."""


class CudaRasterizer:
    """Draws posed scenes on one CUDA device (see ``interfaces.Rasterizer``). The same input gives the same bits.

    The picture of the static part is kept for a camera that all environments share, and for poses that a camera had in
    an earlier call, all or some of them; for a camera that moves it is drawn anew together with the bodies. Give
    cameras on the CPU: many poses on the device count as moving unless the same object is given again, because
    comparing them would wait for the device. Body poses must be rigid. Scratch memory is shared by all calls: make them
    on one stream. Threads take turns.
    """

    def __init__(
        self,
        device: torch.device | str = "cuda",
        background: tuple[float, float, float] = (0.0, 0.0, 0.0),
        environments_per_pass: int = 64,
        scratch_bytes: int = 1 << 30,
        cache_bytes: int = 1 << 30,
    ) -> None:
        """Load or compile the kernels.

        Args:
            device: a CUDA device.
            background: colour where nothing is.
            environments_per_pass: how many are drawn at once at most.
            scratch_bytes: fewer are drawn at once if they would need more memory than this.
            cache_bytes: for a camera with a pose for each environment, no more than this is kept of the static part;
                at 27 bytes a pixel the default holds 129 environments at 640 x 480. Of more (256 would take 2.1 GB)
                the static part is drawn in every frame.

        Raises:
            SceneError: the kernels can be neither found nor compiled.
        """
        self.device = torch.device(device)
        if self.device == torch.device("cuda"):  # whichever is current now, for good
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.background = background
        self.environments_per_pass = environments_per_pass
        self.scratch_bytes = scratch_bytes
        self.cache_bytes = cache_bytes
        self._kernels = library.load(self.device)
        self._source: Scene | None = None
        self._packed: Packed | None = None
        self._known: dict[str, _Known] = {}
        self._room: dict[tuple[int, int, int], int] = {}
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.turn = threading.Lock()
        """Held while anything is drawn that uses the scratch memory."""

    @torch.no_grad()
    def render(
        self, scene: Scene, body_to_world: Tensor, cameras: Mapping[str, Camera], *, extras: bool = False
    ) -> dict[str, Frames]:
        """Draw every camera of every environment (see ``interfaces.Rasterizer``).

        Raises:
            SceneError: ``body_to_world`` or a camera does not fit the scene and the number of environments.
        """
        check_batch(scene, body_to_world, cameras)
        poses = body_to_world.to(self.device, torch.float32).contiguous()
        with self.turn:
            plans = self.draw_fitting(self.plan(scene, len(poses), cameras, extras), poses)
        return {name: plan.out for name, plan in plans.items() if plan.out is not None}

    def plan(
        self,
        scene: Scene,
        count: int,
        cameras: Mapping[str, Camera],
        extras: bool,
        *,
        moving: Collection[str] | None = None,
    ) -> dict[str, Plan]:
        """Output and scratch memory for ``count`` environments; draws static parts that are to be kept.

        Args:
            scene: what to draw.
            count: number of environments.
            cameras: as for :meth:`render`.
            extras: as for :meth:`render`.
            moving: names of the cameras that will move; the others stand still. By default that is found out.

        Raises:
            SceneError: a picture is too large.
        """
        packed = self._load(scene)
        plans = {}
        for name, camera in cameras.items():
            check_size(name, camera)
            if moving is not None and name in moving:
                found = Found(self._on_device(camera))
            else:
                found = self._look_up(name, camera, count, stands=moving is not None)
            out = allocate_frames(count, camera, extras, self.device)
            first = packed.static_chunks if found.layer else 0
            mode = OVER_LAYER if found.layer else LIVE
            plans[name] = self._plan(mode, found, out, (first, len(packed.chunks) - first), count)
        return plans

    def draw_fitting(self, plans: dict[str, Plan], poses: Tensor) -> dict[str, Plan]:
        """As :meth:`draw`, again with more room until there was enough; the plans that had it. Synchronises."""
        self.draw(plans, poses)
        while self.grow(plans):
            plans = {
                name: self._plan(plan.mode, plan.found, plan.out, plan.chunks, len(poses))
                for name, plan in plans.items()
            }
            self.draw(plans, poses)
        return plans

    def draw(self, plans: Mapping[str, Plan], poses: Tensor) -> None:
        """Enqueue all passes on the current stream; nothing is allocated that was allocated before.

        Args:
            plans: from :meth:`plan`.
            poses: body_to_world on the device, float32 [B, M, 4, 4], contiguous.
        """
        with torch.cuda.device(self.device):
            for plan in plans.values():
                for number in range(len(plan.state)):
                    start = number * plan.environments
                    self._pass(plan, poses, start, min(plan.environments, len(poses) - start), number)

    def grow(self, plans: Mapping[str, Plan]) -> bool:
        """Whether any environment had more entries than room; the next plan gets more. Synchronises.

        Raises:
            SceneError: so many that no room can be made for them.
        """
        short = False
        for plan in plans.values():
            most = plan.most_entries()
            if most > plan.room:
                short = True
                self._room[plan.key] = max(self._room.get(plan.key, 0), int(most * GROWTH) + 1)
        return short

    def held(self) -> tuple[object, ...]:
        """What enqueued work reads by its address, to be kept while it may run again."""
        return self._arena, self._packed

    def _load(self, scene: Scene) -> Packed:
        if self._source is not scene or self._packed is None:
            self._packed = pack(scene, self.device)
            self._source = scene
            self._known.clear()
            self._room.clear()
        return self._packed

    def _on_device(self, camera: Camera) -> Camera:
        """A copy that no caller can write to."""
        tensors = (camera.world_to_camera, camera.K)
        view, K = (t.to(self.device, torch.float32, copy=True, memory_format=torch.contiguous_format) for t in tensors)
        return Camera(view, K, camera.width, camera.height)

    def _look_up(self, name: str, camera: Camera, count: int, *, stands: bool) -> Found:
        """What is known of a camera; the static part is drawn if it is worth keeping.

        Args:
            name: of the camera.
            camera: as for :meth:`render`.
            count: number of environments.
            stands: the camera will not move.
        """
        known = self._known.setdefault(name, _Known())
        rows = known.seen.look(camera)
        if rows is None:
            known.camera, known.layer = self._on_device(camera), None
        assert known.camera is not None
        every = list(range(len(known.camera)))
        moved = known.camera if rows in (None, every) else self._on_device(camera)
        if known.layer is None and self._worth_keeping(known.camera, count, stands or rows is not None):
            known.layer = self._draw_layer(known.camera)
        if known.layer is None or len(known.camera) == 1:
            return Found(moved, known.layer)
        each = every if rows is None else rows
        each = each * count if len(each) == 1 else each
        return Found(moved, known.layer, torch.tensor(each, dtype=torch.int32, device=self.device))

    def _worth_keeping(self, camera: Camera, count: int, stands: bool) -> bool:
        """Whether to keep the static part from poses that ``count`` environments share, or that seem to stand still."""
        small = LAYER_BYTES * len(camera) * camera.width * camera.height <= self.cache_bytes
        return (len(camera) == 1 and count > 1) or (stands and small)

    def _draw_layer(self, camera: Camera) -> Layer:
        packed, layer = self._packed, empty_layer(camera, self.device)
        assert packed is not None
        nowhere = torch.zeros(len(camera), packed.bodies, 4, 4, device=self.device)
        plan = self._plan(STATIC_ONLY, Found(camera, layer), None, (0, packed.static_chunks), len(camera))
        self.draw_fitting({"": plan}, nowhere)
        return layer

    def _plan(self, mode: int, found: Found, out: Frames | None, chunks: tuple[int, int], count: int) -> Plan:
        assert self._packed is not None
        # A first guess; the true number is checked after every draw.
        room = self._room.setdefault((mode, found.camera.width, found.camera.height), chunks[1] * CHUNK + 4096)
        sizes = scratch_sizes(mode, found.camera, self._packed.bodies, chunks[1], room)
        each = sum(sizes.values())
        together = max(1, min(count, self.environments_per_pass, self.scratch_bytes // each))
        passes = -(-count // together)
        together = -(-count // max(passes, 1))  # of equal size
        needed = sum(aligned(size * together) for size in sizes.values())
        if self._arena.numel() < needed:
            self._arena = torch.empty(needed, dtype=torch.uint8, device=self.device)
        state = torch.empty(passes, STATE, dtype=torch.int32, device=self.device)
        return Plan(mode, found, out, chunks, together, room, state)

    def _pass(self, plan: Plan, poses: Tensor, start: int, count: int, number: int) -> None:
        packed, camera, layer = self._packed, plan.camera, plan.found.layer
        assert packed is not None
        stride = 0 if len(camera) == 1 else 1
        args = library.Args(
            mean_reach=packed.mean_reach.data_ptr(),
            covariance_a=packed.covariance_a.data_ptr(),
            covariance_b=packed.covariance_b.data_ptr(),
            harmonics=packed.harmonics.data_ptr(),
            chunks=packed.chunks.data_ptr(),
            runs=packed.runs.data_ptr(),
            poses=address(poses, start),
            world_to_camera=address(camera.world_to_camera, start * stride),
            K=address(camera.K, start * stride),
            state=address(plan.state, number),
            room=plan.room,
            background=self.background,
            environments=count,
            bodies=packed.bodies,
            camera_stride=stride,
            width=camera.width,
            height=camera.height,
            first_chunk=plan.chunks[0],
            chunk_count=plan.chunks[1],
            coefficients=packed.coefficients,
            mode=plan.mode,
        )
        if layer is not None:
            first = start if plan.mode == STATIC_ONLY else 0
            args.layer_color = address(layer.color, first)
            args.layer_open = address(layer.open, first)
            args.layer_picture = address(layer.picture, first)
        if plan.found.rows is not None:
            args.layer_rows = address(plan.found.rows, start)
        if plan.out is not None:
            args.rgb = address(plan.out.rgb, start)
            if plan.out.depth is not None and plan.out.alpha is not None and plan.out.body_id is not None:
                args.extras = 1
                args.depth, args.alpha = address(plan.out.depth, start), address(plan.out.alpha, start)
                args.body = address(plan.out.body_id, start)
        at = self._arena.data_ptr()
        sizes = scratch_sizes(plan.mode, camera, packed.bodies, plan.chunks[1], plan.room)
        for name, size in sizes.items():
            setattr(args, name, at)
            at += aligned(size * plan.environments)
        self._kernels.render(args, torch.cuda.current_stream(self.device).cuda_stream)
