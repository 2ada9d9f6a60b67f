"""Cameras of the control loop: a video device of the robot PC, and the scene rendered at the arm's joint state."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gsrl_core.deploy.contract import CameraContract
from gsrl_core.deploy.kinematics import link_poses
from gsrl_core.deploy.limits import Array
from gsrl_core.deploy.robot import RobotState
from gsrl_core.errors import SafetyError
from gsrl_core.geometry.camera import Camera
from gsrl_core.interfaces import Rasterizer
from gsrl_core.splat.scene import Scene

_FIRST_PICTURE = 5.0
_SILENCE = 1.0
_DRAINED = 8
_PAUSE = 0.002
_PLAUSIBLE_AGE = 5.0


@dataclass(frozen=True)
class Picture:
    """One frame."""

    rgb: NDArray[np.uint8]
    """[h, w, 3], RGB."""
    stamp: float
    """``time.monotonic()`` when it was taken."""


@dataclass(frozen=True)
class CameraCalibration:
    """What was measured of a camera on the robot PC."""

    width: int
    height: int
    K: Array
    """[3, 3] px."""
    base_from_camera: Array
    """[4, 4], OpenCV camera axes in the robot base frame."""

    @staticmethod
    def of(contract: CameraContract) -> CameraCalibration:
        """The calibration that the package was trained with."""
        return CameraCalibration(
            contract.width, contract.height, np.array(contract.K), np.array(contract.base_from_camera)
        )

    def resized(self, width: int, height: int) -> CameraCalibration:
        """The calibration of the same pictures reduced to ``width`` x ``height``; SafetyError if the shape changes."""
        factors = (width / self.width, height / self.height)
        if max(factors) > 1.0 or abs(factors[0] - factors[1]) > 0.01 * factors[0]:
            raise SafetyError(
                f"pictures of {self.width} x {self.height} cannot be reduced to {width} x {height} without changing "
                "their shape; choose a camera mode with the same aspect ratio"
            )
        K = self.K * np.array([[factors[0]], [factors[1]], [1.0]])
        return CameraCalibration(width, height, K, self.base_from_camera)

    def save(self, path: Path) -> None:
        """Write a calibration file (JSON: width, height, K, base_from_camera)."""
        values = {
            "width": self.width,
            "height": self.height,
            "K": self.K.tolist(),
            "base_from_camera": self.base_from_camera.tolist(),
        }
        path.write_text(json.dumps(values, indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> CameraCalibration:
        """Read a calibration file. Raises SafetyError when it is missing or incomplete."""
        try:
            values = json.loads(path.read_text())
            K = np.array(values["K"], float).reshape(3, 3)
            base_from_camera = np.array(values["base_from_camera"], float).reshape(4, 4)
            return CameraCalibration(int(values["width"]), int(values["height"]), K, base_from_camera)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SafetyError(
                f"{path} is not a camera calibration ({error}); it needs width, height, K and base_from_camera"
            ) from error


class RobotCamera(Protocol):
    """A calibrated camera."""

    calibration: CameraCalibration

    def read(self) -> Picture:
        """The newest picture. Raises SafetyError when there is none."""
        ...


class VideoCamera:
    """A V4L2 / UVC device through OpenCV, reduced to the size that the policy was trained on.

    A driver hands out its oldest buffer first, so a picture that is fetched when it is needed is several periods old.
    A thread fetches all the time instead and keeps the newest, with the time at which it was taken: the driver's own
    stamp where there is one (V4L2), else the time at which the driver handed the picture out. What may have waited in
    the driver's queue while the device was opened is thrown away.
    """

    def __init__(
        self,
        device: int | str,
        measured: CameraCalibration | None,
        contract: CameraContract,
        *,
        open_capture: Callable[[int | str], Any] | None = None,
    ) -> None:
        """Open the device and wait for its first picture.

        Args:
            device: index or path.
            measured: calibration at the size that the device shall deliver. None: any size of the contract's shape is
                taken, and the contract's own calibration is assumed.
            contract: the camera of the package.
            open_capture: instead of ``cv2.VideoCapture``.

        Raises:
            SafetyError: no picture, or one of another size.
        """
        import cv2

        self._cv2 = cv2
        self._device = device
        self.calibration = CameraCalibration.of(contract)
        if measured is not None:
            self.calibration = measured.resized(contract.width, contract.height)
        self._lock = threading.Condition()
        self._newest: tuple[NDArray[np.uint8], float] | None = None
        self._problem: str | None = None
        self._cause: Exception | None = None
        self._closing = threading.Event()
        self._capture: Any = (open_capture or cv2.VideoCapture)(device)
        if measured is not None:
            self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, measured.width)
            self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, measured.height)
        self._thread = threading.Thread(target=self._grab, name=f"camera {device}", daemon=True)
        self._thread.start()
        try:
            bgr, _ = self._wait(_FIRST_PICTURE)
            delivered = (bgr.shape[1], bgr.shape[0])
            wanted = delivered if measured is None else (measured.width, measured.height)
            if delivered != wanted:
                raise SafetyError(
                    f"camera {device}: got {delivered}, the calibration is for {wanted}; check device and mode"
                )
            if measured is None:
                CameraCalibration(*delivered, np.eye(3), np.eye(4)).resized(contract.width, contract.height)
            self._size = bgr.shape
        except BaseException:
            self.close()
            raise

    def read(self) -> Picture:
        """The newest picture, converted from OpenCV's BGR; its stamp tells how old it is.

        Raises:
            SafetyError: the device failed, changed its mode, or gave nothing new for a second.
        """
        bgr, stamp = self._wait(0.0)
        if bgr.shape != self._size:
            raise SafetyError(f"camera {self._device}: got {bgr.shape} instead of {self._size}; check its mode")
        size = (self.calibration.width, self.calibration.height)
        reduced = self._cv2.resize(bgr, size, interpolation=self._cv2.INTER_AREA)
        return Picture(self._cv2.cvtColor(reduced, self._cv2.COLOR_BGR2RGB), stamp)

    def close(self) -> None:
        """Release the device."""
        self._closing.set()
        self._thread.join(_SILENCE)
        # Releasing a device under a read that hangs can crash; it then goes with the process.
        if not self._thread.is_alive():
            self._capture.release()

    def _wait(self, seconds: float) -> tuple[NDArray[np.uint8], float]:
        with self._lock:
            self._lock.wait_for(lambda: self._newest is not None or self._problem is not None, seconds)
            if self._problem is not None:
                raise SafetyError(
                    f"camera {self._device}: {self._problem}; check device and cable, or dry-run with --camera scene"
                ) from self._cause
            if self._newest is None:
                raise SafetyError(f"camera {self._device}: got no picture within {seconds:g} s; check device and mode")
            age = time.monotonic() - self._newest[1]
            if age > _SILENCE:
                raise SafetyError(f"camera {self._device}: no new picture for {age:.1f} s; check device and cable")
            return self._newest

    def _grab(self) -> None:
        try:
            queued = _DRAINED
            # The pause bounds the load of a backend that never waits; a picture that comes meanwhile is queued.
            while not self._closing.wait(_PAUSE):
                fetched = self._fetched()
                if queued > 0:
                    queued -= 1
                    continue
                with self._lock:
                    self._newest = fetched
                    self._lock.notify_all()
        except Exception as error:  # whatever it is: the reader must learn why there are no more pictures
            with self._lock:
                self._problem, self._cause = str(error) or type(error).__name__, error
                self._lock.notify_all()

    def _fetched(self) -> tuple[NDArray[np.uint8], float]:
        delivered = self._capture.grab()
        # Before the picture is decoded, which takes milliseconds.
        grabbed = time.monotonic()
        if not delivered:
            raise SafetyError("got no picture")
        stamp = self._taken_at(grabbed)
        delivered, bgr = self._capture.retrieve()
        if not delivered:
            raise SafetyError("got a picture that could not be decoded")
        return bgr, grabbed if stamp is None else stamp

    def _taken_at(self, now: float) -> float | None:
        # V4L2 drivers stamp their buffers with the monotonic clock; other backends give something else or nothing.
        stamp = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000.0
        return stamp if now - _PLAUSIBLE_AGE < stamp <= now else None


class SimulatedCamera:
    """The scene's splats with the arm where ``read_state`` says it is."""

    def __init__(
        self,
        scene: Scene,
        rasterizer: Rasterizer,
        contract: CameraContract,
        read_state: Callable[[], RobotState],
        objects: Mapping[str, Array] | None = None,
    ) -> None:
        """``objects``: base_from_body [4, 4] of bodies that are not links; others stay where they were captured."""
        self.calibration = CameraCalibration.of(contract)
        self._scene = scene
        self._rasterizer = rasterizer
        self._name = contract.name
        self._camera = camera_of(contract)
        self._read_state = read_state
        self._objects = dict(objects or {})

    def read(self) -> Picture:
        """Render now."""
        state = self._read_state()
        stamp = time.monotonic()
        poses = body_to_world(self._scene, state.q, state.fingers, self._objects)
        frames = self._rasterizer.render(self._scene, poses[None], {self._name: self._camera})
        return Picture(frames[self._name].rgb[0].cpu().numpy(), stamp)


def camera_of(contract: CameraContract) -> Camera:
    """The contract's camera as a pinhole Camera (C = 1)."""
    world_to_camera = np.linalg.inv(np.array(contract.base_from_camera))
    return Camera(
        torch.tensor(world_to_camera, dtype=torch.float32)[None],
        torch.tensor(contract.K, dtype=torch.float32)[None],
        contract.width,
        contract.height,
    )


def body_to_world(scene: Scene, q: Array, fingers: tuple[float, float], objects: Mapping[str, Array]) -> torch.Tensor:
    """Poses float32 [M, 4, 4] of the scene's bodies: links from ``q`` [7] (rad) and fingers (m), others as given."""
    poses = scene.rest_to_world.clone()
    known = {**link_poses(q, fingers), **objects}
    for i, name in enumerate(scene.names):
        if name in known:
            poses[i] = torch.tensor(known[name], dtype=torch.float32)
    return poses
