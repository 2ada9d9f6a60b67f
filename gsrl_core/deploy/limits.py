"""What the FR3 may do (Franka's tables) and what an operator lets it do (:class:`SafetyLimits`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsrl_core.errors import SafetyError

Array = NDArray[np.float64]

# Franka FCI documentation, "Robot and interface specifications", FR3 (rad, rad/s, rad/s^2, rad/s^3).
Q_MAX = np.array([2.9007, 1.8361, 2.9007, -0.1169, 2.8763, 4.6216, 3.0508])
Q_MIN = np.array([-2.9007, -1.8361, -2.9007, -3.0770, -2.8763, 0.4398, -3.0508])
Q_OFFSET = np.array([0.6599, 0.2517, 0.2000, 0.3533, 0.5757, 0.4878, 0.4628])
BRAKING = np.array([6.0, 2.585, 3.5, 4.0, 17.0, 5.5, 17.0])
DQ_MAX = np.array([2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26])
DDQ_MAX = np.full(7, 10.0)
DDDQ_MAX = np.full(7, 5000.0)

# The rectangular set that the same page suggests: inside it a constant joint speed limit is always legal.
RECTANGULAR_Q_MAX = np.array([2.3476, 1.5454, 2.4937, -0.4226, 2.5100, 4.2841, 2.7045])
RECTANGULAR_Q_MIN = np.array([-2.3476, -1.5454, -2.4937, -2.7714, -2.5100, 0.7773, -2.7045])
RECTANGULAR_DQ_MAX = np.array([2.0, 1.0, 1.5, 1.25, 3.0, 1.5, 3.0])

# Two more tables of mechanical limits circulate and disagree by up to 0.16 rad; only what all of them allow is used.
_OTHER_TABLES = {
    "franka_description 1.0.1": (
        [-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159],
        [2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159],
    ),
    "libfranka (deprecated constants)": (
        [-2.7501, -1.7918, -2.9065, -3.0481, -2.8101, 0.54092, -3.0196],
        [2.7501, 1.7918, 2.9065, -0.1458, 2.8101, 4.5205, 3.0196],
    ),
}
SAFE_Q_MIN = np.max([Q_MIN, RECTANGULAR_Q_MIN, *(low for low, _ in _OTHER_TABLES.values())], axis=0)
SAFE_Q_MAX = np.min([Q_MAX, RECTANGULAR_Q_MAX, *(high for _, high in _OTHER_TABLES.values())], axis=0)

# Cartesian limits of the arm (m/s, m/s^2, m/s^3; rad likewise).
TRANSLATION_MAX = (3.0, 9.0, 4500.0)
ROTATION_MAX = (2.5, 17.0, 8500.0)
HAND_MAX_WIDTH = 0.08


def velocity_bounds(q: Array) -> tuple[Array, Array]:
    """Lowest and highest legal joint velocity [7] (rad/s) at joint positions ``q`` [7] (rad).

    FCI documentation, position-based velocity limits: upper = min(dq_max, max(0, -offset + sqrt(max(0, 2 * braking *
    (q_max - q))))), the lower bound mirrored; further limited by the rectangular set.
    """
    upper = -Q_OFFSET + np.sqrt(np.maximum(0.0, 2.0 * BRAKING * (Q_MAX - q)))
    lower = Q_OFFSET - np.sqrt(np.maximum(0.0, 2.0 * BRAKING * (q - Q_MIN)))
    ceiling = np.minimum(DQ_MAX, RECTANGULAR_DQ_MAX)
    return np.maximum(-ceiling, np.minimum(0.0, lower)), np.minimum(ceiling, np.maximum(0.0, upper))


Vector3 = tuple[float, float, float]


class SafetyLimits(BaseModel):
    """The envelope's numbers: start values to tune on hardware, bounded by what the arm can do.

    The software is not a certified safety function; emergency stop and Desk's safety configuration remain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_step_translation: float = Field(0.020, gt=0, le=0.1)
    """Longest move of the target in one control step [m]."""
    max_step_rotation: float = Field(0.10, gt=0, le=0.5)
    """Largest turn of the target in one control step [rad]."""
    max_speed: float = Field(0.35, gt=0, le=1.0)
    """Speed of the streamed TCP target [m/s]; each axis gets 1/sqrt(3) of it."""
    max_acceleration: float = Field(5.0, gt=0, le=9.0)
    """[m/s^2], shared by the axes in the same way."""
    max_jerk: float = Field(150.0, gt=0, le=4500.0)
    """[m/s^3], likewise."""
    max_turn_rate: float = Field(1.75, gt=0, le=2.5)
    """Angular speed of the streamed target [rad/s]."""
    max_turn_acceleration: float = Field(15.0, gt=0, le=17.0)
    """[rad/s^2]."""
    max_turn_jerk: float = Field(600.0, gt=0, le=8500.0)
    """[rad/s^3]."""
    workspace_min: Vector3 = (0.25, -0.35, 0.005)
    """Lowest position in the base frame [m]: of the TCP in x and y, of the lowest point of hand and fingers in z.

    The fingers reach 9.5 mm beyond the TCP, and a tilted hand reaches lower on one side."""
    workspace_max: Vector3 = (0.70, 0.35, 0.55)
    """Highest TCP position in the base frame [m]."""
    joint_margin: float = Field(0.02, ge=0, le=0.3)
    """Kept from the rectangular joint limits [rad]."""
    stream_hz: int = Field(100, ge=50, le=1000)
    """Rate at which targets reach the impedance controller [Hz]."""
    max_chunk_age: float = Field(1.0, gt=0, le=5.0)
    """A chunk whose picture is older than this when it would start is dropped [s]."""
    watchdog: float = Field(2.0, gt=0, le=30.0)
    """Without a usable chunk the arm holds; after this long it stops [s]."""
    max_force: float = Field(30.0, gt=0, le=100.0)
    """Norm of the external force that stops the arm [N]."""
    force_samples: int = Field(4, ge=3, le=5)
    """Consecutive samples above a monitor's threshold before it trips; one alone may be noise."""
    max_state_age: float = Field(0.1, gt=0, le=1.0)
    """Age of the robot state that stops the arm [s]."""
    max_tracking_error: float = Field(0.06, gt=0, le=0.2)
    """Distance between streamed and measured TCP that stops the arm [m]; a monitor, the clip below bounds forces."""
    max_tracking_turn: float = Field(0.35, gt=0, le=1.0)
    """The same for orientation [rad]."""
    error_clip_translation: float = Field(0.06, gt=0, le=0.1)
    """Largest position error that the impedance controller acts on [m]; times stiffness it is the largest push."""
    error_clip_rotation: float = Field(0.35, gt=0, le=0.5)
    """The same for orientation [rad]."""
    stream_timeout: float = Field(0.25, ge=0.05, le=2.0)
    """Without a setpoint for this long the stream watchdog stops the arm, whatever the control loop does [s].

    On the way to the start pose: without a check of monitors and dead-man switch."""
    min_success_rate: float = Field(0.8, ge=0, le=1)
    """Share of control packets that must arrive while in motion."""
    translational_stiffness: float = Field(800.0, ge=10, le=3000)
    """[N/m]."""
    rotational_stiffness: float = Field(60.0, ge=1, le=300)
    """[N m/rad]."""
    grasp_force: float = Field(20.0, gt=0, le=70.0)
    """[N]."""
    gripper_speed: float = Field(0.05, gt=0, le=0.1)
    """[m/s]."""

    @model_validator(mode="after")
    def _consistent(self) -> SafetyLimits:
        if not all(low < high for low, high in zip(self.workspace_min, self.workspace_max, strict=True)):
            raise ValueError(f"workspace_min {self.workspace_min} must lie below workspace_max {self.workspace_max}")
        reach = 0.855 + 0.107 + 0.1034
        if max(map(abs, (*self.workspace_min, *self.workspace_max))) > reach:
            raise ValueError(f"the workspace must lie within the arm's reach of {reach:.2f} m")
        return self

    def save(self, path: Path) -> None:
        """Write safety.yaml."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @staticmethod
    def load(path: Path) -> SafetyLimits:
        """Read safety.yaml.

        Raises:
            SafetyError: unreadable, unknown key or a value outside its bounds.
        """
        try:
            return SafetyLimits.model_validate(yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, ValidationError) as error:
            raise SafetyError(f"{path}: {error}; compare with the bounds in gsrl_core/deploy/limits.py") from error


def check_joint_tables(q_min: Array, q_max: Array) -> tuple[Array, Array]:
    """The joint range [7], [7] (rad) that both the robot's own model and this project's tables allow.

    Raises:
        SafetyError: the ranges do not overlap, or the robot's range is so different that it is another arm.
    """
    low, high = SAFE_Q_MIN, SAFE_Q_MIN
    if q_min.shape == q_max.shape == (7,):
        low, high = np.maximum(SAFE_Q_MIN, q_min), np.minimum(SAFE_Q_MAX, q_max)
    # Negated, so that numbers that are not finite are refused too.
    if not (high - low >= 0.5 * (SAFE_Q_MAX - SAFE_Q_MIN)).all():
        raise SafetyError(
            f"the robot reports joint limits {np.round(q_min, 3).tolist()} .. {np.round(q_max, 3).tolist()}, which "
            "are not an FR3's; connect the arm that the package was made for"
        )
    return low, high
