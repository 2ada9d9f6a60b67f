"""The one family of errors that users see.

Every message says what was given, what is allowed, and what to do. The command line prints the message alone
(exit code 1); a traceback appears only with ``--debug``.
"""

from __future__ import annotations

from collections.abc import Sequence


class GsrlError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(GsrlError):
    """A preset, key or value of the configuration is wrong."""


class ArtifactError(GsrlError):
    """A stored artefact is missing, half-written or does not match its digest."""


class HubError(GsrlError):
    """A model or asset could not be fetched (unreachable, unknown revision, wrong digest)."""


class CaptureError(GsrlError):
    """Photos, cameras or markers cannot be used."""


class SceneError(GsrlError):
    """A splat file or assembled scene is broken."""


class CheckpointError(GsrlError):
    """Policy weights, their configuration or their normalisation statistics do not fit."""


class SimulationError(GsrlError):
    """The simulated environment cannot be built or its physics failed."""


class PlacementError(GsrlError):
    """A placement string asks for devices or processes that do not exist."""


class WorkerError(GsrlError):
    """A worker process died or raised; carries the cause."""


class TrainingError(GsrlError):
    """Training met non-finite numbers or inconsistent state."""


class PackageError(GsrlError):
    """A robot package is incomplete, tampered with or does not reproduce its parity vectors."""


class SafetyError(GsrlError):
    """A command or robot state lies outside the safety envelope, or a precondition for motion is not met."""


class GateError(GsrlError):
    """A quality gate between stages failed; the message carries the advice."""


def listed(names: Sequence[str], shown: int) -> str:
    """The first ``shown`` names for a message, and how many there are beside them."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
