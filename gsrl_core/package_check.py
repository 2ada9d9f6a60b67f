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
from gsrl_core.deploy.emulator import (
    ASKED_TRAVEL,
    FINAL_FOLLOWING,
    FINAL_TURN,
    MEAN_FOLLOWING,
    TRAVEL_SHARE,
    relaxed,
    running_emulator,
)
from gsrl_core.deploy.envelope import Envelope
from gsrl_core.deploy.franky_robot import FrankyRobot
from gsrl_core.deploy.kinematics import link_poses, pose_error, tcp_pose
from gsrl_core.deploy.limits import SAFE_Q_MAX, SAFE_Q_MIN, SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog, run_episode
from gsrl_core.deploy.manifest import check_manifest
from gsrl_core.errors import GsrlError, PackageError
from gsrl_core.package_run import serving

REQUEST_TIMEOUT = 120.0
# The tip of the rubber on a finger, in the finger's frame (m).
_FINGER_TIPS = np.array([[x, y, 0.0545, 1.0] for x in (-0.00875, 0.00875) for y in (0.0, 0.01518)])


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
        if not swapped > agreement["tolerance"]:
            raise PackageError(
                f"the policy's actions change by {swapped:.1e} when red and blue are swapped, within the tolerance of "
                f"parity ({agreement['tolerance']:.0e}): a camera with swapped colours would go unnoticed, and the "
                "policy hardly looks at its picture; train it longer"
            )
        findings["color_swap_difference"] = swapped
        findings["color_swap_detected"] = True
        findings["request_ms"] = _request_ms(client, vectors, contract)
        findings["robot_checked"] = robot
        if robot:
            findings |= _robot_findings(bundle, contract, limits, client)
    findings["seconds"] = time.perf_counter() - started
    _progress(1.0, "verified")
    return findings


def check_steps(steps: Sequence[dict[str, Any]], limits: SafetyLimits, contract: Contract) -> dict[str, float]:
    """Judge a recorded episode without the envelope's code: step lengths, workspace, fingers, joints, reported TCP.

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
    below = [limits.workspace_min[2] - _lowest_tip(target, contract) for target in targets]
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
        "finger tip below the workspace [m]": (max(below), 0.0),
        "joint beyond its range [rad]": (beyond.max(), 0.0),
        "difference of reported and computed TCP": (max(kinematic), 5e-3),
    }
    for name, (value, limit) in judged.items():
        if not value <= limit + 1e-6:
            raise PackageError(f"robot episode: {name} reached {value:.4f}, the limit is {limit:g}")
    return {"step_m": float(judged["step of the target [m]"][0]), "turn_rad": float(angles.max(initial=0.0))}


def _lowest_tip(base_from_tcp: np.ndarray, contract: Contract) -> float:
    # Height (m) of the lowest corner of two open fingers. Forward kinematics gives the finger frames of a reference.
    q = np.array(contract.start_q)
    reference = link_poses(q, (0.04, 0.04))
    moved = base_from_tcp @ np.linalg.inv(tcp_pose(q, contract.flange_from_tcp_array))
    tips = [moved @ reference[name] @ _FINGER_TIPS.T for name in ("fr3_leftfinger", "fr3_rightfinger")]
    return float(min(corners[2].min() for corners in tips))


def check_following(log: EpisodeLog) -> dict[str, float]:
    """Judge whether the arm did what the targets asked: lag on the way, where it ended, how far it came.

    Returns:
        mean_mm, final_mm, final_rad, asked_mm (farthest target from the start) and travelled_mm (farthest TCP).

    Raises:
        PackageError: one is beyond its limit (the constants of :mod:`gsrl_core.deploy.emulator`).
    """
    if log.final is None or not log.tracking_mm:
        raise PackageError("robot episode: nothing was streamed, so nothing can be judged")
    error = pose_error(np.array(log.final["target"]), np.array(log.final["measured"]))
    targets = np.array([step["target"] for step in log.steps])[:, :3, 3]
    measured = np.array([step["measured"] for step in log.steps] + [log.final["measured"]])[:, :3, 3]
    start = np.array(log.start)[:3, 3]
    asked = float(np.linalg.norm(targets - start, axis=1).max())
    travelled = float(np.linalg.norm(measured - start, axis=1).max())
    judged = {
        "mean distance of streamed and measured TCP [m]": (float(np.mean(log.tracking_mm)) / 1000.0, MEAN_FOLLOWING),
        "final distance from the target [m]": (float(np.linalg.norm(error[:3])), FINAL_FOLLOWING),
        "final turn from the target [rad]": (float(np.linalg.norm(error[3:])), FINAL_TURN),
    }
    for name, (value, limit) in judged.items():
        if not value <= limit:
            raise PackageError(f"robot episode: {name} was {value:.4f}, the limit is {limit:g}; the arm did not follow")
    if asked > ASKED_TRAVEL and not travelled >= TRAVEL_SHARE * asked:
        raise PackageError(
            f"robot episode: the targets went {1000 * asked:.1f} mm away from the start, the arm only "
            f"{1000 * travelled:.1f} mm; it did not follow"
        )
    mean, final, turn = (value for value, _ in judged.values())
    return {
        "mean_mm": 1000.0 * mean, "final_mm": 1000.0 * final, "final_rad": turn,
        "asked_mm": 1000.0 * asked, "travelled_mm": 1000.0 * travelled,
    }  # fmt: skip


def _robot_findings(bundle: Path, contract: Contract, limits: SafetyLimits, client: PolicyClient) -> dict[str, Any]:
    # The episode runs in real time, and on a machine that is busy for a moment the emulated arm falls behind.
    _progress(0.6, "one episode on the FR3 emulator")
    try:
        return _episode(bundle, contract, limits, client) | {"robot_attempts": 1}
    except GsrlError as error:
        _progress(0.6, f"{error}; trying once more")
    return _episode(bundle, contract, limits, client) | {"robot_attempts": 2}


def _episode(bundle: Path, contract: Contract, limits: SafetyLimits, client: PolicyClient) -> dict[str, Any]:
    from gsrl_core.splat.raster import make_rasterizer
    from gsrl_core.splat.scene import load_scene

    scene, rasterizer = load_scene(bundle / "scene"), make_rasterizer("auto")
    wide = relaxed(limits)
    log = EpisodeLog()
    with (
        running_emulator(contract.start_q) as host,
        FrankyRobot(host, wide, realtime=False) as robot,
    ):
        camera = SimulatedCamera(scene, rasterizer, contract.camera, robot.read)
        camera.read()  # the rasteriser compiles on its first picture
        envelope = Envelope(wide, contract, robot.q_range)
        steps = contract.max_episode_steps
        try:
            run_episode(robot, client, envelope, camera, contract, log=log, permit=lambda: True)
        except GsrlError as error:
            raise PackageError(f"robot episode stopped after {len(log.steps)} of {steps} steps: {error}") from error
    judged, followed = check_steps(log.steps, limits, contract), check_following(log)
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
        "robot_tracking_mm_mean": followed["mean_mm"],
        "robot_final_mm": followed["final_mm"],
        "robot_final_rad": followed["final_rad"],
        "robot_asked_mm": followed["asked_mm"],
        "robot_reached_mm": followed["travelled_mm"],
        "robot_chunk_ms_p50": summary["infer_ms"]["p50"],
        "robot_chunk_ms_max": summary["infer_ms"]["max"],
        "robot_stream_late_ms_p95": summary["late_ms"]["p95"],
        **_relaxed_findings(limits, wide),
    }


def _relaxed_findings(limits: SafetyLimits, wide: SafetyLimits) -> dict[str, float]:
    # Every limit of the emulated episode that is not the package's own: what it was, and what counted instead.
    package, used = limits.model_dump(), wide.model_dump()
    changed = [name for name in package if package[name] != used[name]]
    return {f"emulator_{name}": used[name] for name in changed} | {f"package_{name}": package[name] for name in changed}


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
