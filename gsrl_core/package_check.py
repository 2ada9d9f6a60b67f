"""Verification of a package, run as a process of its own by :func:`gsrl_core.package.verify_package`.

    python -m gsrl_core.package_check BUNDLE [--robot]

prints one JSON object a line: progress, then either ``findings`` or ``error``. The policy runs in a third process that
starts from nothing but the package, and everything is asked through its websocket, as a robot would.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsrl_core.deploy import parity
from gsrl_core.deploy.camera import SimulatedCamera
from gsrl_core.deploy.child import end_with_parent
from gsrl_core.deploy.client import PolicyClient
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.emulator import running_emulator
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.kinematics import pose_error, tcp_pose
from gsrl_core.deploy.limits import SAFE_Q_MAX, SAFE_Q_MIN, SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.manifest import check_manifest
from gsrl_core.deploy.robot import FrankyRobot
from gsrl_core.errors import GsrlError, PackageError
from gsrl_core.package_run import serving

EPISODE_SECONDS = 3.0
REQUEST_TIMEOUT = 120.0
# The emulator shares the processor with everything else here and falls behind real time, which shows as lag.
_EMULATED_STATE_AGE = 1.0
_EMULATED_LAG = 2.0


def check_package(bundle: Path, robot: bool) -> dict[str, Any]:
    """Run all checks; returns flat findings. Raises PackageError (or another GsrlError) at the first failure."""
    started = time.perf_counter()
    _progress(0.0, "digests")
    findings: dict[str, Any] = {"manifest_sha256": check_manifest(bundle)}
    contract = Contract.load(bundle / "contract.json")
    limits = SafetyLimits.load(bundle / "safety.yaml")
    vectors = parity.load_vectors(bundle / "parity", contract)
    _progress(0.1, "loading the policy in a fresh process")
    with serving(bundle) as (host, port), PolicyClient(host, port, timeout=REQUEST_TIMEOUT) as client:
        client.check(contract)
        if client.metadata["manifest_sha256"] != findings["manifest_sha256"]:
            raise PackageError("the server loaded another package; run the verification again")
        _progress(0.4, "parity vectors")
        agreement = parity.check_vectors(client.infer, vectors, contract)
        findings["parity_vectors"] = len(vectors.seeds)
        findings["parity_max_difference"] = agreement["max_difference"]
        findings["parity_tolerance"] = agreement["tolerance"]
        swapped = parity.color_sensitivity(client.infer, vectors, contract)
        findings["color_swap_difference"] = swapped
        findings["color_swap_detected"] = swapped > agreement["tolerance"]
        findings["request_ms"] = _request_ms(client, vectors, contract)
        findings["robot_checked"] = robot
        if robot:
            _progress(0.6, "one episode on the FR3 emulator")
            findings |= _episode(bundle, contract, limits, client)
    findings["seconds"] = time.perf_counter() - started
    _progress(1.0, "verified")
    return findings


def check_steps(steps: Sequence[dict[str, Any]], limits: SafetyLimits, contract: Contract) -> dict[str, float]:
    """Judge a recorded episode without the envelope's code: step lengths, workspace, joints, reported TCP.

    Returns:
        The largest values met.

    Raises:
        PackageError: one is beyond its limit; names step and numbers.
    """
    targets = np.array([step["target"] for step in steps])
    measured = np.array([step["measured"] for step in steps])
    q = np.array([step["q"] for step in steps])
    lengths = np.linalg.norm(np.diff(targets[:, :3, 3], axis=0), axis=1)
    turns = np.diff(targets[:, :3, :3], axis=0)
    # |A - B|_F of two rotations is 2 sqrt(2) sin(angle / 2).
    angles = 2.0 * np.arcsin(np.clip(np.linalg.norm(turns, axis=(1, 2)) / np.sqrt(8.0), 0.0, 1.0))
    outside = np.maximum(limits.workspace_min - targets[:, :3, 3], targets[:, :3, 3] - limits.workspace_max)
    beyond = np.maximum(SAFE_Q_MIN - q, q - SAFE_Q_MAX)
    flange_from_tcp = contract.flange_from_tcp_array
    kinematic = [
        np.linalg.norm(pose_error(tcp_pose(joints, flange_from_tcp), pose))
        for joints, pose in zip(q, measured, strict=True)
    ]
    judged = {
        "step of the target [m]": (lengths.max(initial=0.0), limits.max_step_translation),
        "turn of the target [rad]": (angles.max(initial=0.0), limits.max_step_rotation),
        "distance outside the workspace [m]": (outside.max(), 0.0),
        "joint beyond its range [rad]": (beyond.max(), 0.0),
        "difference of reported and computed TCP": (max(kinematic), 5e-3),
    }
    for name, (value, limit) in judged.items():
        if not value <= limit + 1e-6:
            raise PackageError(f"robot episode: {name} reached {value:.4f}, the limit is {limit:g}")
    return {"step_m": float(judged["step of the target [m]"][0]), "turn_rad": float(angles.max(initial=0.0))}


def _episode(bundle: Path, contract: Contract, limits: SafetyLimits, client: PolicyClient) -> dict[str, Any]:
    from gsrl_core.splat.raster import make_rasterizer
    from gsrl_core.splat.scene import load_scene

    scene, rasterizer = load_scene(bundle / "scene"), make_rasterizer("auto")
    relaxed = limits.model_copy(
        update={
            "max_state_age": _EMULATED_STATE_AGE,
            "max_tracking_error": _EMULATED_LAG * limits.max_tracking_error,
            "max_tracking_turn": _EMULATED_LAG * limits.max_tracking_turn,
        }
    )
    log = EpisodeLog()
    with (
        running_emulator(contract.start_q) as host,
        FrankyRobot(host, relaxed, realtime=False) as robot,
    ):
        camera = SimulatedCamera(scene, rasterizer, contract.camera, robot.read)
        camera.read()  # the rasteriser compiles on its first picture
        envelope = Envelope(relaxed, contract, robot.q_range)
        steps = round(EPISODE_SECONDS * contract.control_hz)
        try:
            run_episode(robot, client, envelope, camera, contract, log=log, max_steps=steps)
        except GsrlError as error:
            raise PackageError(f"robot episode stopped after {len(log.steps)} of {steps} steps: {error}") from error
    judged = check_steps(log.steps, limits, contract)
    summary = log.summary()
    travelled = np.diff([np.array(step["measured"])[:3, 3] for step in log.steps], axis=0)
    return {
        "robot_outcome": summary["outcome"],
        "robot_steps": summary["steps"],
        "robot_clamps": sum(summary["events"].values()),
        "robot_events": summary["events"],
        "robot_travel_m": float(np.linalg.norm(travelled, axis=1).sum()),
        "robot_max_step_m": judged["step_m"],
        "robot_max_turn_rad": judged["turn_rad"],
        "robot_tracking_mm_p95": summary["tracking_mm"]["p95"],
        "robot_tracking_mm_max": summary["tracking_mm"]["max"],
        "robot_chunk_ms_p50": summary["infer_ms"]["p50"],
        "robot_chunk_ms_max": summary["infer_ms"]["max"],
        "robot_stream_late_ms_p95": summary["late_ms"]["p95"],
        "robot_state_age_limit_s": relaxed.max_state_age,
        "robot_tracking_limit_mm": 1000.0 * relaxed.max_tracking_error,
    }


def _request_ms(client: PolicyClient, vectors: parity.Vectors, contract: Contract) -> float:
    times = []
    for i in range(len(vectors.seeds)):
        started = time.perf_counter()
        client.infer(vectors.request(i, contract))
        times.append(1000.0 * (time.perf_counter() - started))
    return float(np.median(times))


def _progress(fraction: float, message: str) -> None:
    _print({"progress": fraction, "message": message})


def _print(values: dict[str, Any]) -> None:
    with os.fdopen(os.dup(_OUTPUT), "w") as stream:
        stream.write(json.dumps(values) + "\n")


_OUTPUT = 1


def main() -> int:
    """Entry point of the process."""
    global _OUTPUT
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--robot", action="store_true")
    options = parser.parse_args()
    # What libraries print must not get between the JSON lines.
    _OUTPUT = os.dup(1)
    os.dup2(2, 1)
    end_with_parent()
    try:
        _print({"findings": check_package(options.bundle, options.robot)})
    except GsrlError as error:
        _print({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
