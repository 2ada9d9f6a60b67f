"""What a package promises at its edges: observation, action, rate, frames, gripper, TCP and camera."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gsrl_core.deploy.kinematics import FLANGE_FROM_TCP
from gsrl_core.deploy.limits import HAND_MAX_WIDTH, Array
from gsrl_core.errors import PackageError

CONTRACT_VERSION = 1

Row = tuple[float, float, float]
Matrix3 = tuple[Row, Row, Row]
Pose = tuple[tuple[float, float, float, float], ...]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CameraContract(_Closed):
    """The camera whose pictures the policy was trained on."""

    key: str = "observation/image"
    """Name of the picture in a request."""
    name: str
    """Name of the camera in ``Observation.rgb``."""
    width: int = Field(ge=16)
    height: int = Field(ge=16)
    color_order: Literal["RGB"] = "RGB"
    dtype: Literal["uint8"] = "uint8"
    K: Matrix3
    """Intrinsics [px]."""
    base_from_camera: Pose
    """Row-major 4x4, OpenCV camera axes in the robot base frame."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the picture."""
        return (self.height, self.width, 3)


class ActionContract(_Closed):
    """Seven numbers per step: translation (3), rotation (3), gripper (1)."""

    dim: Literal[7] = 7
    translation: Literal["delta of the target, metres, robot base frame"] = (
        "delta of the target, metres, robot base frame"
    )
    rotation: Literal["delta of the target, intrinsic XYZ Euler angles in radians, left-multiplied (base axes)"] = (
        "delta of the target, intrinsic XYZ Euler angles in radians, left-multiplied (base axes)"
    )
    integrates_on: Literal["last target"] = "last target"
    bound: float = Field(0.1, gt=0, le=1)
    """Values beyond this (m, rad) never occur in training."""
    gripper_closed: float = -0.01
    """Finger position [m] that gripper = -1 stands for."""
    gripper_open: float = 0.04
    """Finger position [m] that gripper = +1 stands for."""

    def width(self, gripper: float) -> float:
        """Opening of the hand [m] for a gripper action in [-1, 1] (values outside are clipped)."""
        share = (float(np.clip(gripper, -1.0, 1.0)) + 1.0) / 2.0
        finger = self.gripper_closed + share * (self.gripper_open - self.gripper_closed)
        return float(np.clip(2.0 * finger, 0.0, HAND_MAX_WIDTH))


class Contract(_Closed):
    """contract.json of a package."""

    version: Literal[1] = CONTRACT_VERSION
    robot: Literal["FR3 with Franka Hand"] = "FR3 with Franka Hand"
    task: str
    instruction: str
    camera: CameraContract
    state_key: str = "observation/state"
    state_dim: int = Field(9, ge=1)
    state_meaning: str = "joint positions 1..7 [rad], left and right finger position [m]"
    prompt_key: str = "prompt"
    action: ActionContract = ActionContract()
    control_hz: float = Field(gt=0, le=100)
    horizon: int = Field(ge=1)
    """Actions in a chunk."""
    action_chunk: int = Field(ge=1)
    """Of which so many are executed before the next picture is taken."""
    max_episode_steps: int = Field(ge=1)
    start_q: tuple[float, float, float, float, float, float, float] = (0.0, 0.259, 0.0, -2.289, 0.0, 2.515, 0.7855)
    """Joint positions at which an episode begins [rad]."""
    flange_from_tcp: Pose = tuple(map(tuple, FLANGE_FROM_TCP.tolist()))
    """F_T_EE, row-major 4x4."""
    precision: Literal["float32", "bfloat16"] = "float32"
    denoise_steps: int = Field(ge=1)
    """Integration steps of the flow when an action is sampled."""

    @property
    def flange_from_tcp_array(self) -> Array:
        """F_T_EE as [4, 4]."""
        return np.array(self.flange_from_tcp)

    def save(self, path: Path) -> None:
        """Write contract.json."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Contract:
        """Read contract.json. Raises PackageError when it is missing, broken or of another version."""
        try:
            return Contract.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise PackageError(
                f"{path}: not a contract of version {CONTRACT_VERSION} ({error}); package again"
            ) from error
