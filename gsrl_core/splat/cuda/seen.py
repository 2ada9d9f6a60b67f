"""Whether a camera is where it was, found out without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsrl_core.geometry.camera import Camera


@dataclass(frozen=True)
class Seen:
    """A camera as it was in the last call."""

    camera: Camera
    versions: tuple[int, int]
    values: bytes

    @staticmethod
    def of(camera: Camera) -> Seen:
        """What to remember of ``camera``."""
        return Seen(camera, _versions(camera), _values(camera) if _cheap(camera) else b"")

    def same(self, camera: Camera) -> bool:
        """Whether ``camera`` is certainly unchanged; False may also mean that finding out would wait for the device."""
        if self.camera is camera and self.versions == _versions(camera):
            return True
        return _cheap(camera) and self.values == _values(camera)


def _cheap(camera: Camera) -> bool:
    """Whether a camera's values may be read each time."""
    return len(camera) == 1 or not camera.world_to_camera.is_cuda


def _versions(camera: Camera) -> tuple[int, int]:
    return camera.world_to_camera._version, camera.K._version


def _values(camera: Camera) -> bytes:
    numbers = torch.cat([camera.world_to_camera.flatten(), camera.K.flatten()]).float().cpu().numpy().tobytes()
    return numbers + f"{camera.width}x{camera.height}".encode()
