"""Serving a package and driving an arm with it."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gsrl_core.deploy.camera import CameraCalibration, RobotCamera, SimulatedCamera, VideoCamera
from gsrl_core.deploy.child import announce, end_with_parent, running_child
from gsrl_core.deploy.client import PolicyClient
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.franky_robot import FrankyRobot
from gsrl_core.deploy.limits import HAND_MAX_WIDTH, SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.manifest import check_manifest
from gsrl_core.deploy.preflight import check_camera, check_tcp
from gsrl_core.deploy.robot import RobotState
from gsrl_core.deploy.server import PolicyServer, is_loopback
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import SafetyError
from gsrl_core.interfaces import Policy

API_KEY_VARIABLE = "GSRL_API_KEY"
LOAD_TIMEOUT = 600.0
SCENE_CAMERA = "scene"
"""Name of the camera that renders the package's scene instead of reading a device."""


def load_served_policy(folder: Path, denoise_steps: int, action_chunk: int, precision: str) -> Policy:
    """The policy of a checkpoint folder on the first GPU, else the CPU. Raises CheckpointError."""
    import torch

    from gsrl_core.policy.checkpoint import load_policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_policy(
        folder,
        denoise_steps=denoise_steps,
        action_chunk=action_chunk,
        precision=precision,
        compile="auto",
        device=device,
    )


def open_server(bundle: Path, host: str = "127.0.0.1", port: int = 8000) -> PolicyServer:
    """Check a package, load and warm up its policy and open the port (0: a free one); the caller serves and closes.

    Raises:
        PackageError: altered package, port taken, or reachable from outside without ``$GSRL_API_KEY``.
        CheckpointError: broken weights.
    """
    manifest = check_manifest(bundle)
    contract = Contract.load(bundle / "contract.json")
    policy = load_served_policy(bundle, contract.denoise_steps, contract.action_chunk, contract.precision)
    metadata = {"contract": contract.model_dump(mode="json"), "manifest_sha256": manifest}
    return PolicyServer(PolicyService(policy, contract), metadata, host, port, os.environ.get(API_KEY_VARIABLE))


def serve_package(
    bundle: Path, host: str = "127.0.0.1", port: int = 8000, *, ready: Callable[[str], None] = lambda address: None
) -> None:
    """Serve until interrupted; ``ready`` is told the address once requests are accepted. Raises as open_server."""
    with_server = open_server(bundle, host, port)
    ready(f"ws://{with_server.host}:{with_server.port}")
    try:
        with_server.serve_forever()
    finally:
        with_server.shutdown()


@contextmanager
def serving(bundle: Path) -> Iterator[tuple[str, int]]:
    """A server of ``bundle`` in a process of its own on a free loopback port; yields (host, port).

    Raises:
        WorkerError: it did not come up; carries its error.
    """
    with running_child("gsrl_core.package_run", [str(bundle.absolute())], timeout=LOAD_TIMEOUT) as announced:
        yield "127.0.0.1", int(announced["port"])


def deploy_package(
    bundle: Path,
    robot_host: str,
    *,
    camera: int | str | RobotCamera = 0,
    calibration: Path | None = None,
    server: tuple[str, int] | None = None,
    dry_run: bool = False,
    max_steps: int | None = None,
    realtime: bool = True,
    permit: Callable[[], bool] | None = None,
    before_motion: Callable[[], None] = lambda: None,
    log_path: Path | None = None,
) -> dict[str, Any]:
    """Drive one episode on an arm, after a slow move to the start pose with the hand open.

    Args:
        bundle: the package.
        robot_host: address of the robot's control interface.
        camera: video device, ``"scene"`` for pictures rendered from the package (dry run or loopback only), or a camera
            object.
        calibration: what was measured of the video device on this bench. Required for a device unless ``dry_run``,
            where the package's own is assumed, and the summary says so.
        server: (host, port) of a running ``serve`` of the same package; none starts one here.
        dry_run: compute and log everything, move nothing.
        max_steps: control steps (default: the contract's).
        realtime: demand a real-time kernel.
        permit: dead-man switch, asked before every setpoint and on the way to the start pose. Required unless
            ``dry_run`` or the robot is an emulator on loopback.
        before_motion: called once before the arm moves, when all checks have passed.
        log_path: where the episode is written as JSON, also when it was stopped.

    Returns:
        The summary of the episode, and which ``calibration`` was used: given, measured, assumed or rendered.

    Raises:
        PackageError: package altered, or the server has another one.
        SafetyError: no dead-man switch, TCP, camera or calibration differ from the package, or the envelope stopped
            the arm.
        WorkerError: the policy server failed.
    """
    manifest = check_manifest(bundle)
    contract, limits = Contract.load(bundle / "contract.json"), SafetyLimits.load(bundle / "safety.yaml")
    permit = _checked_permit(permit, robot_host, dry_run)
    opened, source = _opened_camera(camera, calibration, contract, harmless=dry_run or is_loopback(robot_host))
    log = EpisodeLog()
    try:
        with _server(bundle, server) as (host, port):
            key = os.environ.get(API_KEY_VARIABLE)
            with (
                PolicyClient(host, port, api_key=key, timeout=limits.watchdog) as client,
                FrankyRobot(robot_host, limits, realtime) as robot,
            ):
                client.check(contract, manifest)
                check_tcp(contract, robot.flange_from_tcp)
                eye = _scene_camera(bundle, contract, robot) if opened is None else opened
                check_camera(contract, eye.calibration)
                envelope = Envelope(limits, contract, robot.q_range)
                if not dry_run:
                    before_motion()
                    _to_start(robot, envelope, contract, permit)
                run_episode(
                    robot, client, envelope, eye, contract,
                    log=log, max_steps=max_steps, dry_run=dry_run, permit=permit,
                )  # fmt: skip
    finally:
        if log_path is not None:
            values = {"summary": log.summary(), "calibration": source, "steps": log.steps}
            log_path.write_text(json.dumps(values, indent=1) + "\n")
        if isinstance(opened, VideoCamera):
            opened.close()
    return log.summary() | {"calibration": source}


def _checked_permit(permit: Callable[[], bool] | None, robot_host: str, dry_run: bool) -> Callable[[], bool]:
    if permit is not None:
        return permit
    if not (dry_run or is_loopback(robot_host)):
        raise SafetyError(
            f"the arm at {robot_host} needs a dead-man switch (`real2sim2real deploy` uses a held key); without one "
            "only --dry-run and an emulator on loopback are allowed"
        )
    return lambda: True


def _opened_camera(
    camera: int | str | RobotCamera, calibration: Path | None, contract: Contract, *, harmless: bool
) -> tuple[RobotCamera | None, str]:
    # The camera (none: to be rendered once the arm is known) and where its calibration comes from.
    if camera == SCENE_CAMERA:
        if not harmless:
            raise SafetyError("a rendered picture does not show the bench: --camera scene needs --dry-run or loopback")
        return None, "rendered"
    if not isinstance(camera, int | str):
        return camera, "given"
    if calibration is not None:
        return VideoCamera(camera, CameraCalibration.load(calibration), contract.camera), "measured"
    if not harmless:
        raise SafetyError(
            "a camera calibration of this bench is needed (--calibration FILE, in the form of the package's "
            "calib/camera.json): without it nobody knows whether the camera stands where the policy expects it"
        )
    return VideoCamera(camera, None, contract.camera), "assumed"


def _scene_camera(bundle: Path, contract: Contract, robot: FrankyRobot) -> SimulatedCamera:
    from gsrl_core.splat.raster import make_rasterizer
    from gsrl_core.splat.scene import load_scene

    camera = SimulatedCamera(load_scene(bundle / "scene"), make_rasterizer("auto"), contract.camera, robot.read)
    camera.read()  # the rasteriser compiles on its first picture
    return camera


def _to_start(robot: FrankyRobot, envelope: Envelope, contract: Contract, permit: Callable[[], bool]) -> None:
    def check(state: RobotState) -> None:
        envelope.monitor(state, None, time.monotonic())
        if not permit():
            raise SafetyError("the dead-man switch is not held; the arm was stopped on its way to the start pose")

    robot.move_to(np.array(contract.start_q), check=check)
    robot.grip(HAND_MAX_WIDTH)


@contextmanager
def _server(bundle: Path, server: tuple[str, int] | None) -> Iterator[tuple[str, int]]:
    if server is not None:
        yield server
        return
    with serving(bundle) as address:
        yield address


def main() -> None:
    """Entry point of the server process that :func:`serving` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    end_with_parent()
    server = open_server(options.bundle, port=0)
    announce({"port": server.port})
    server.serve_forever()


if __name__ == "__main__":
    main()
