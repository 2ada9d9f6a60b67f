"""The robot package: one folder with everything that a robot computer needs, and its verification.

Layout (an openpi / Hugging Face checkpoint folder with more beside it):

    model.safetensors config.json tokenizer.model assets/<id>/norm_stats.json   the policy
    contract.json safety.yaml calib/camera.json                                 what it may see and do
    parity/ scene/                                                              how to check it without a robot
    README.md lineage.json latency.json requirements.lock MANIFEST.sha256       what it is and where it comes from
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsrl_core import __version__
from gsrl_core.artifacts import digest_folder, write_json
from gsrl_core.deploy import parity
from gsrl_core.deploy.camera import CameraCalibration
from gsrl_core.deploy.child import child_environment
from gsrl_core.deploy.contract import CameraContract, Contract
from gsrl_core.deploy.manifest import write_manifest
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import PackageError
from gsrl_core.geometry.camera import from_sapien
from gsrl_core.geometry.fr3 import START_QPOS
from gsrl_core.geometry.rotation import rigid_inverse
from gsrl_core.interfaces import Policy, Reporter
from gsrl_core.package_card import installed_requirements, machine_facts, model_card
from gsrl_core.sections import PipelineConfig, SimConfig
from gsrl_core.sim.task import EpisodeSpec, Task
from gsrl_core.sim.tasks import configured_task, told_instruction

CHECKPOINT_FILES = ("model.safetensors", "config.json", "tokenizer.model")
SECTIONS = ("sim", "policy", "evaluation", "release")
"""Sections of the configuration that decide a package."""
PARITY_VECTORS = 4
LATENCY_SAMPLES = 10
VERIFY_TIMEOUT = 900.0


def build_package(
    checkpoint: Path,
    scene: Path,
    evaluation: Path,
    out: Path,
    config: PipelineConfig,
    lineage: Mapping[str, Any],
) -> dict[str, Any]:
    """Build a package in ``out``, whole or not at all.

    Args:
        checkpoint: folder in openpi layout.
        scene: the Scene folder that it was trained and evaluated in.
        evaluation: folder with report.json.
        out: a folder that does not exist or is empty.
        config: of the run; ``sim``, ``policy`` and ``release`` decide contract and safety limits, ``evaluation`` the
            seeds of the parity vectors.
        lineage: run ids, commit and the like, stored as given.

    Returns:
        Facts: name, bytes, manifest_sha256, infer_ms (median), parity_vectors.

    Raises:
        PackageError: an input is missing, the configuration cannot be deployed, or ``out`` is not empty.
        CheckpointError, SceneError: an input is broken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackageError(f"{out} exists and is not an empty folder; choose another --out or remove it")
    report = _read_report(evaluation)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    building.mkdir()
    try:
        facts = _fill(building, checkpoint, scene, report, config)
        origin = {
            "lineage": dict(lineage),
            "version": __version__,
            "inputs": {
                "checkpoint": digest_folder(checkpoint),
                "scene": digest_folder(scene),
                "evaluation": digest_folder(evaluation),
            },
            # Only what decided this folder: the rest of the run's configuration is the lineage's to tell.
            "configuration": {name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        }
        write_json(building / "lineage.json", origin)
        (building / "README.md").write_text(model_card(config.release.name, facts, report, origin))
        manifest = write_manifest(building)
        if out.exists():
            out.rmdir()
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return {
        "name": config.release.name,
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "manifest_sha256": manifest,
        "infer_ms": facts["latency"]["infer_ms"]["p50"],
        "parity_vectors": PARITY_VECTORS,
    }


def verify_package(bundle: Path, robot: bool, reporter: Reporter, *, timeout: float = VERIFY_TIMEOUT) -> dict[str, Any]:
    """Check a package in fresh processes: digests, parity through the websocket, and an episode on the emulator.

    Args:
        bundle: the package.
        robot: also drive an episode through franky against the FR3 control-interface emulator.
        reporter: told the progress.
        timeout: of everything [s].

    Returns:
        What was found (see :mod:`gsrl_core.package_check`).

    Raises:
        PackageError: the first check that failed, with its numbers.
    """
    arguments = [
        sys.executable,
        "-m",
        "gsrl_core.package_check",
        str(bundle.absolute()),
        *(["--robot"] if robot else []),
    ]
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
    )
    expired = threading.Event()
    timer = threading.Timer(timeout, lambda: (expired.set(), process.kill()))
    timer.start()
    findings: dict[str, Any] | None = None
    try:
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise PackageError(message["error"])
            if "progress" in message:
                reporter.progress(message["progress"], message["message"])
            findings = message.get("findings", findings)
    finally:
        timer.cancel()
        # Its own children (server, emulator) end when it does: their standard input closes.
        process.kill()
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
    if findings is None:
        why = (
            f"took longer than {timeout:.0f} s" if expired.is_set() else f"ended with code {code}, see its output above"
        )
        raise PackageError(f"verification of {bundle} {why}")
    return findings


def check_packageable(sim: SimConfig) -> None:
    """Raise PackageError for what version 1 of the contract cannot express."""
    if len(sim.cameras) != 1 or sim.cameras[0].link is not None:
        raise PackageError(
            f"sim.cameras has {len(sim.cameras)} cameras; packages support exactly one camera fixed in the base "
            "frame (link: null)"
        )
    if any(sim.cameras[0].distortion or ()):
        raise PackageError(
            "sim.cameras[0] has a distortion, and packages describe pinhole cameras only; train on undistorted "
            "pictures (distortion: null) and undistort the real camera's"
        )
    if sim.control_mode != "pd_ee_target_delta_pose":
        raise PackageError(
            f"sim.control_mode is {sim.control_mode!r}; packages support pd_ee_target_delta_pose, whose actions "
            "the robot client integrates on its last target"
        )


def contract_of(config: PipelineConfig, policy: Policy) -> Contract:
    """The contract of a policy trained under ``config``. Raises PackageError for what version 1 cannot express."""
    check_packageable(config.sim)
    if policy.action_dim != 7:
        raise PackageError(
            f"the policy has {policy.action_dim} action values; packages need 7 (xyz, Euler XYZ, gripper)"
        )
    task = configured_task(config.sim)
    given = config.sim.cameras[0]
    camera = from_sapien(
        given.position, given.rotation, given.fx, given.fy, given.cx, given.cy, given.width, given.height
    ).scaled(1.0 / config.sim.render_downscale)
    return Contract(
        task=task.name,
        instruction=told_instruction(config.sim, task),
        camera=CameraContract(
            name=given.name,
            width=camera.width,
            height=camera.height,
            K=camera.K[0].tolist(),
            base_from_camera=rigid_inverse(camera.world_to_camera[0].double()).tolist(),
        ),
        control_hz=config.sim.control_hz,
        horizon=policy.horizon,
        action_chunk=policy.horizon,
        max_episode_steps=config.sim.max_episode_steps,
        start_q=START_QPOS[:7],
        precision=config.policy.precision,
        denoise_steps=config.policy.denoise_steps,
    )


def _fill(
    out: Path, checkpoint: Path, scene: Path, report: Mapping[str, Any], config: PipelineConfig
) -> dict[str, Any]:
    from gsrl_core.package_run import load_served_policy
    from gsrl_core.splat.raster import make_rasterizer
    from gsrl_core.splat.scene import load_scene

    _copy_checkpoint(checkpoint, out)
    shutil.copytree(scene, out / "scene")
    policy = load_served_policy(out, config.policy.denoise_steps, config.policy.action_chunk, config.policy.precision)
    contract = contract_of(config, policy)
    contract.save(out / "contract.json")
    config.release.safety.save(out / "safety.yaml")
    (out / "calib").mkdir()
    CameraCalibration.of(contract.camera).save(out / "calib" / "camera.json")
    service = PolicyService(policy, contract)
    vectors = parity.make_vectors(
        service,
        contract,
        load_scene(out / "scene"),
        make_rasterizer(config.sim.rasterizer),
        _placements(configured_task(config.sim), config.evaluation.seed),
    )
    parity.save_vectors(out / "parity", vectors)
    latency = parity.measure_latency(service, vectors, contract, LATENCY_SAMPLES) | {"machine": machine_facts()}
    write_json(out / "latency.json", latency)
    (out / "requirements.lock").write_text(installed_requirements("real2sim2real"))
    return {"contract": contract, "latency": latency, "safety": config.release.safety, "report": report}


def _copy_checkpoint(checkpoint: Path, out: Path) -> None:
    stats = sorted(checkpoint.glob("assets/*/**/norm_stats.json"))  # an id may be nested: someone/droid
    missing = [name for name in CHECKPOINT_FILES if not (checkpoint / name).is_file()]
    if missing or len(stats) != 1:
        problem = (
            f"lacks {', '.join(missing)}" if missing else f"has {len(stats)} assets/<id>/norm_stats.json, needs one"
        )
        raise PackageError(f"checkpoint {checkpoint} {problem}; package a folder that finetune or sft wrote")
    for name in CHECKPOINT_FILES:
        shutil.copyfile(checkpoint / name, out / name)
    target = out / stats[0].relative_to(checkpoint)
    target.parent.mkdir(parents=True)
    shutil.copyfile(stats[0], target)


def _placements(task: Task, seed: int) -> list[parity.Placement]:
    starts = [task.start(EpisodeSpec(seed + i)) for i in range(PARITY_VECTORS)]
    return [
        parity.Placement(
            q=start.qpos[:7],
            fingers=(float(start.qpos[7]), float(start.qpos[8])),
            objects={name: parity.transform(pose) for name, pose in start.objects.items()},
            seed=seed + i,
        )
        for i, start in enumerate(starts)
    ]


def _read_report(evaluation: Path) -> dict[str, Any]:
    path = evaluation / "report.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PackageError(f"{path}: no readable evaluation report ({error}); evaluate the checkpoint first") from error
    if not isinstance(report, dict) or not report.get("cells"):
        raise PackageError(f"{path} has no cells; evaluate the checkpoint again")
    return report
