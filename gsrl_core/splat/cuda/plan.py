"""How one camera of a batch is drawn: the pictures, the sizes of scratch memory, and the addresses of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera
from gsrl_core.splat.cuda.library import CHUNK, CLASSES, LIVE, TILE, VIEW, WARPS
from gsrl_core.splat.frames import Frames

LAYER_BYTES = 27
"""Of one pixel of a kept picture of the static part."""
MAX_TILES = 160 * 1024 // 4
"""A block counts the entries of every tile in shared memory."""
MAX_ENTRIES = 1 << 30
"""Of all tiles' lists of one environment: 8 GiB."""


@dataclass(frozen=True)
class Layer:
    """The static part seen from C fixed poses."""

    color: Tensor
    """float32 [C, h, w, 4]: rgb over black, and the depth beyond which bodies are hidden (m)."""
    open: Tensor
    """float32 [C, h, w, 2]: light that it lets through, and its mean depth (m)."""
    picture: Tensor
    """uint8 [C, h, w, 3] without bodies."""


@dataclass(frozen=True)
class Found:
    """A camera on the device and, where it is kept, the static part that it sees."""

    camera: Camera
    layer: Layer | None = None
    rows: Tensor | None = None
    """int32 [B]: each environment's row of ``layer``; none if all have the first."""


@dataclass(frozen=True)
class Plan:
    """How one camera of a batch is drawn: its tensors on the device and the sizes of its scratch memory."""

    mode: int
    found: Found
    """Its layer is drawn over, or with mode STATIC_ONLY drawn."""
    out: Frames | None
    chunks: tuple[int, int]
    """First and number."""
    environments: int
    """In one pass."""
    room: int
    """Entries of all tiles' lists that there is room for in each environment."""
    state: Tensor
    """int32 [passes, STATE], to be read as unsigned; the first is the most entries that an environment had."""

    @property
    def camera(self) -> Camera:
        """On the device."""
        return self.found.camera

    @property
    def key(self) -> tuple[int, int, int]:
        """What the room is kept for."""
        return self.mode, self.camera.width, self.camera.height

    def most_entries(self) -> int:
        """Most entries that an environment had in the last call. Synchronises.

        Raises:
            SceneError: they are too many to make room for.
        """
        most = max((row[0] & 0xFFFFFFFF for row in self.state.tolist()), default=0)
        if most > MAX_ENTRIES:
            raise SceneError(
                f"a picture of {self.camera.width} x {self.camera.height} pixels has {most} entries of Gaussians in "
                f"tiles; the CUDA renderer draws at most {MAX_ENTRIES}; use a smaller picture, remove Gaussians that "
                "cover all of it, or use rasterizer=gsplat"
            )
        return most


def allocate_frames(count: int, camera: Camera, extras: bool, device: torch.device) -> Frames:
    """Unwritten pictures of ``count`` environments."""
    shape = (count, camera.height, camera.width)
    rgb = torch.empty(*shape, 3, dtype=torch.uint8, device=device)
    if not extras:
        return Frames(rgb)
    depth, alpha = (torch.empty(shape, device=device) for _ in range(2))
    return Frames(rgb, depth, alpha, torch.empty(shape, dtype=torch.int16, device=device))


def check_size(name: str, camera: Camera) -> None:
    """Refuse pictures with too many tiles.

    Raises:
        SceneError: the camera ``name`` has them.
    """
    if tile_count(camera) > MAX_TILES:
        raise SceneError(
            f"camera {name!r} is {camera.width} x {camera.height} pixels; the CUDA renderer draws at most "
            f"{MAX_TILES * TILE * TILE / 1e6:.0f} million; use a smaller picture or rasterizer=gsplat"
        )


def empty_layer(camera: Camera, device: torch.device) -> Layer:
    """An unwritten layer for every pose of ``camera``."""
    shape = (len(camera), camera.height, camera.width)
    color, opening = torch.empty(*shape, 4, device=device), torch.empty(*shape, 2, device=device)
    return Layer(color, opening, torch.empty(*shape, 3, dtype=torch.uint8, device=device))


def scratch_sizes(mode: int, camera: Camera, bodies: int, chunks: int, room: int) -> dict[str, int]:
    """Bytes for one environment of every scratch array of ``library.Args``."""
    tiles = tile_count(camera)
    lists = 2 if mode == LIVE else 1
    return {
        "keys": 8 * room,
        "records": 32 * chunks * CHUNK,
        "depths": 4 * chunks * CHUNK,
        "views": 4 * VIEW * (bodies + 2),
        "visible": 4 * chunks * WARPS,
        "counts": 4 * lists * tiles,
        "bases": 4 * chunks * tiles,
        "starts": 4 * lists * tiles,
        "queue": 4 * CLASSES * tiles,
    }


def tile_count(camera: Camera) -> int:
    """Tiles of one picture."""
    return -(-camera.width // TILE) * -(-camera.height // TILE)


def aligned(size: int) -> int:
    """The next multiple of 256 bytes."""
    return -(-size // 256) * 256


def address(tensor: Tensor, index: int) -> int:
    """Of ``tensor[index]``; the tensor is contiguous."""
    return tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()
