"""Refusals before anything moves: TCP, camera and calibration must be what the package was made for."""

from __future__ import annotations

import numpy as np

from gsrl_core.deploy.camera import CameraCalibration
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.kinematics import pose_error
from gsrl_core.deploy.limits import Array
from gsrl_core.errors import SafetyError

TCP_TOLERANCE = (1e-3, 5e-3)
"""m, rad."""
CAMERA_TOLERANCE = (0.005, np.deg2rad(0.5))
"""m, rad."""
INTRINSICS_TOLERANCE = 0.01
"""Share of the focal length."""


def check_tcp(contract: Contract, flange_from_tcp: Array) -> None:
    """Compare the robot's F_T_EE [4, 4] with the contract. Raises SafetyError when they differ."""
    error = pose_error(contract.flange_from_tcp_array, flange_from_tcp)
    distance, angle = float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))
    if distance > TCP_TOLERANCE[0] or angle > TCP_TOLERANCE[1]:
        raise SafetyError(
            f"the robot's TCP (F_T_EE) differs from the package's by {1000 * distance:.1f} mm and "
            f"{np.rad2deg(angle):.2f} deg; set the end effector in Desk to the Franka Hand (z = "
            f"{contract.flange_from_tcp[2][3]} m, -45 deg about z)"
        )


def check_camera(contract: Contract, calibration: CameraCalibration) -> None:
    """Compare a measured camera with the contract. Raises SafetyError that names what differs."""
    wanted = CameraCalibration.of(contract.camera)
    if (calibration.width, calibration.height) != (wanted.width, wanted.height):
        raise SafetyError(
            f"the camera delivers {calibration.width} x {calibration.height}, the package needs "
            f"{wanted.width} x {wanted.height}; change the camera's mode"
        )
    deviation = float(np.abs(calibration.K - wanted.K).max() / wanted.K[0, 0])
    if not deviation <= INTRINSICS_TOLERANCE:
        raise SafetyError(
            f"the camera's intrinsics differ from the package's by {100 * deviation:.1f} % of the focal length (limit "
            f"{100 * INTRINSICS_TOLERANCE:.0f} %); use the same camera, or rebuild the scene with this one"
        )
    error = pose_error(wanted.base_from_camera, calibration.base_from_camera)
    distance, angle = float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))
    if not (distance <= CAMERA_TOLERANCE[0] and angle <= CAMERA_TOLERANCE[1]):
        raise SafetyError(
            f"the camera stands {1000 * distance:.1f} mm and {np.rad2deg(angle):.2f} deg away from where the package "
            f"was trained (limits {1000 * CAMERA_TOLERANCE[0]:.0f} mm, {np.rad2deg(CAMERA_TOLERANCE[1]):.1f} deg); "
            "move it back or calibrate again"
        )
