import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from package_examples import make_bundle, make_inputs

import gsrl_core
from gsrl_core import package_check
from gsrl_core.config import load
from gsrl_core.deploy import parity
from gsrl_core.deploy.camera import CameraCalibration, Picture
from gsrl_core.deploy.child import child_environment
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.emulator import running_emulator
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.loop import EpisodeLog
from gsrl_core.deploy.manifest import NAME, check_manifest, write_manifest
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import GsrlError, PackageError, SafetyError
from gsrl_core.interfaces import NullReporter
from gsrl_core.package import build_package, verify_package
from gsrl_core.package_card import evaluation_table, installed_requirements
from gsrl_core.package_check import check_following, check_steps
from gsrl_core.package_run import deploy_package, load_served_policy, serving

TOKENIZER = Path(gsrl_core.__file__).parent / "bundled" / "pi05_tiny" / "tokenizer.model"


def with_limits(bundle, folder, **changes):
    """A copy with other limits, as if it had been packaged like this."""
    shutil.copytree(bundle, folder)
    SafetyLimits.load(folder / "safety.yaml").model_copy(update=changes).save(folder / "safety.yaml")
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), TOKENIZER)


@pytest.fixture(scope="module")
def bundle(inputs, tmp_path_factory):
    return make_bundle(inputs, tmp_path_factory.mktemp("out") / "bundle", **{"sim.max_episode_steps": 50})


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")


def test_the_bundle_holds_everything(bundle, inputs):
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert names >= {
        "model.safetensors", "config.json", "tokenizer.model", "assets/fr3/norm_stats.json", "contract.json",
        "safety.yaml", "calib/camera.json", "parity/vectors.safetensors", "scene/scene.json", "lineage.json",
        "latency.json", "requirements.lock", "README.md", NAME,
    }  # fmt: skip
    for name in ("model.safetensors", "tokenizer.model"):
        assert (bundle / name).read_bytes() == (inputs / "checkpoint" / name).read_bytes()
    lineage = json.loads((bundle / "lineage.json").read_text())
    assert lineage["lineage"] == {"mlflow_run": "0123"}
    assert set(lineage["inputs"]) == {"checkpoint", "scene", "evaluation"}
    assert SafetyLimits.load(bundle / "safety.yaml") == load("laptop").release.safety
    lock = (bundle / "requirements.lock").read_text()
    assert f"\nnumpy=={np.__version__}\n" in lock
    assert "\nfranky-control==" in lock
    assert json.loads((bundle / "latency.json").read_text())["infer_ms"]["p50"] > 0


def test_the_manifest_is_sha256sums_format(bundle):
    lines = (bundle / NAME).read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    assert listed["contract.json"] == hashlib.sha256((bundle / "contract.json").read_bytes()).hexdigest()
    tool = shutil.which("sha256sum")
    if tool:
        subprocess.run([tool, "--check", "--strict", "--quiet", NAME], cwd=bundle, check=True)


def test_the_contract_says_what_the_environment_did(bundle):
    config, contract = load("laptop"), Contract.load(bundle / "contract.json")
    camera = config.sim.cameras[0]
    assert (contract.camera.width, contract.camera.height) == (160, 120)
    np.testing.assert_allclose(contract.camera.K[0][0], camera.fx / 4)
    np.testing.assert_allclose(contract.camera.K[1][2], camera.cy / 4)
    pose = np.array(contract.camera.base_from_camera)
    np.testing.assert_allclose(pose[:3, 3], camera.position, atol=1e-6)
    # SAPIEN's x axis (forward) is OpenCV's z axis.
    np.testing.assert_allclose(pose[:3, 2], np.array(camera.rotation)[:, 0], atol=1e-5)
    assert (contract.horizon, contract.action_chunk, contract.control_hz) == (5, 5, 10)
    assert contract.action.width(1.0) == 0.08
    assert contract.action.width(-1.0) == 0.0
    assert contract.action.width(-0.5) == pytest.approx(0.005)
    assert contract.action.width(7.0) == 0.08


def test_the_card_states_numbers_and_that_hardware_is_open(bundle):
    card = (bundle / "README.md").read_text()
    assert "| nominal | 50.0% | 40.2% .. 59.8% | 48 of 96 | 62.5% |" in card
    assert "Hardware acceptance: not done" in card
    assert "state age 1 s, stream time-out 1 s, tracking error\nx2. It then requires" in card
    assert "deploy --bundle . --robot HOST --dry-run" in card
    assert card.startswith("---\nlicense: apache-2.0\n")


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("tamper", "text"),
    [
        (flip, r"altered: model\.safetensors"),
        (lambda folder: (folder / "safety.yaml").write_text("max_speed: 1.0\n"), r"altered: safety\.yaml"),
        (lambda folder: (folder / "calib" / "camera.json").unlink(), r"missing: calib/camera\.json"),
        (lambda folder: (folder / "extra.py").write_text(""), r"not in the manifest: extra\.py"),
        (lambda folder: (folder / "link").symlink_to("README.md"), "link is a link"),
        (lambda folder: (folder / NAME).unlink(), "MANIFEST.sha256 is missing"),
        (lambda folder: (folder / NAME).write_text("nonsense"), "broken"),
    ],
)
def test_tampering_is_found_and_named(copy, tamper, text):
    tamper(copy)
    with pytest.raises(PackageError, match=text):
        check_manifest(copy)


def test_a_tampered_package_is_neither_verified_nor_deployed(copy):
    flip(copy)
    with pytest.raises(PackageError, match=r"altered: model\.safetensors"):
        verify_package(copy, False, NullReporter())
    with pytest.raises(PackageError, match=r"altered: model\.safetensors"):
        deploy_package(copy, "127.0.0.1", dry_run=True)


def test_a_device_needs_a_calibration_of_this_bench(bundle, tmp_path):
    with pytest.raises(SafetyError, match="--calibration"):
        deploy_package(bundle, "172.16.0.2", permit=lambda: True)
    with pytest.raises(SafetyError, match="not a camera calibration"):
        deploy_package(bundle, "172.16.0.2", calibration=tmp_path / "none.json", dry_run=True)
    with pytest.raises(SafetyError, match="does not show the bench"):
        deploy_package(bundle, "172.16.0.2", camera="scene", permit=lambda: True)


def test_hardware_needs_a_dead_man_switch(bundle):
    with pytest.raises(SafetyError, match=r"172\.16\.0\.2 needs a dead-man switch"):
        deploy_package(bundle, "172.16.0.2", camera=NoisyCamera(Contract.load(bundle / "contract.json")))


class Progress(NullReporter):
    def __init__(self):
        self.messages = []

    def progress(self, fraction, message):
        self.messages.append((fraction, message))


def test_verification_with_the_emulator(bundle):
    progress = Progress()

    findings = verify_package(bundle, True, progress)
    assert findings["parity_vectors"] == 4
    assert findings["parity_max_difference"] <= findings["parity_tolerance"]
    assert findings["color_swap_detected"]
    assert findings["robot_outcome"] == "completed"
    assert findings["robot_steps"] == Contract.load(bundle / "contract.json").max_episode_steps
    assert findings["robot_attempts"] in (1, 2)
    assert findings["robot_max_step_m"] <= SafetyLimits().max_step_translation + 1e-9
    assert findings["robot_travel_m"] > 0.005
    assert findings["robot_final_mm"] <= 15.0
    assert findings["robot_tracking_mm_mean"] <= 30.0
    assert findings["robot_reached_mm"] > 0.5 * findings["robot_asked_mm"]
    # What was relaxed for the emulator is said, with what the package demands: timing, and nothing that bounds motion.
    assert findings["emulator_max_tracking_error"] == pytest.approx(2 * findings["package_max_tracking_error"])
    assert {name for name in findings if name.startswith("emulator_")} == {
        f"emulator_{name}"
        for name in (
            "max_state_age",
            "stream_timeout",
            "max_chunk_age",
            "watchdog",
            "min_success_rate",
            "max_tracking_error",
            "max_tracking_turn",
        )
    }
    assert findings["manifest_sha256"] == check_manifest(bundle)
    assert [fraction for fraction, _ in progress.messages] == sorted(fraction for fraction, _ in progress.messages)
    assert progress.messages[-1] == (1.0, "verified")


def test_an_episode_that_fell_behind_is_tried_once_more_and_no_oftener(monkeypatch):
    outcomes = [PackageError("the arm did not follow"), {"robot_outcome": "completed"}]

    def episode(*_):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    said = []
    monkeypatch.setattr(package_check, "_episode", episode)
    monkeypatch.setattr(package_check, "_progress", lambda fraction, message: said.append(message))
    assert package_check._robot_findings(None, None, None, None) == {"robot_outcome": "completed", "robot_attempts": 2}
    assert said[-1] == "the arm did not follow; trying once more"
    outcomes[:] = [PackageError("first"), PackageError("second")]
    with pytest.raises(PackageError, match="second"):
        package_check._robot_findings(None, None, None, None)


class NoisyCamera:
    def __init__(self, contract):
        self.calibration = CameraCalibration.of(contract.camera)
        self._rng = np.random.default_rng(0)

    def read(self):
        shape = (self.calibration.height, self.calibration.width, 3)
        return Picture(self._rng.integers(256, size=shape, dtype=np.uint8), time.monotonic())


@pytest.mark.usefixtures("emulated_time")
def test_deploy_drives_to_the_start_pose_runs_and_writes_its_log(bundle, tmp_path):
    # The arm has to keep to the package's own limits. The policy computes in real time, on a machine that may be busy.
    bundle = with_limits(bundle, tmp_path / "bundle", watchdog=30.0, max_chunk_age=5.0)
    contract = Contract.load(bundle / "contract.json")
    elsewhere = np.array(contract.start_q) + np.array([0.1, 0, 0, 0, 0, 0, 0.1])
    with serving(bundle) as server, running_emulator(elsewhere) as host:
        options = {"camera": NoisyCamera(contract), "server": server, "realtime": False, "max_steps": 5}
        # As on the card: no calibration, and here no camera either.
        without = {**options, "camera": "scene"}
        dry = deploy_package(bundle, host, **without, dry_run=True, log_path=tmp_path / "dry.json")
        assert dry["outcome"] == "completed"
        assert dry["calibration"] == "rendered"
        measured = [step["q"] for step in json.loads((tmp_path / "dry.json").read_text())["steps"]]
        np.testing.assert_allclose(measured[-1], elsewhere, atol=5e-3)  # nothing moved
        with pytest.raises(SafetyError, match="not held"):
            deploy_package(bundle, host, **options, permit=lambda: False)
        other = with_limits(bundle, tmp_path / "other", max_speed=0.3)
        with pytest.raises(PackageError, match="serves another package"):
            deploy_package(other, host, **options)
        summary = deploy_package(bundle, host, **options, log_path=tmp_path / "log.json")
    assert summary["outcome"] == "completed"
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["summary"]["steps"] == len(log["steps"]) == 5
    np.testing.assert_allclose(log["steps"][0]["q"], contract.start_q, atol=0.05)  # it was 0.1 away


def test_weights_that_answer_differently_fail_parity(copy):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "parity" / "vectors.safetensors")
    tensors["actions"] = tensors["actions"] + np.float32(1e-3)
    save_file(tensors, copy / "parity" / "vectors.safetensors")
    write_manifest(copy)  # as if it had been packaged like this
    with pytest.raises(PackageError, match=r"parity vector 0: actions differ by 1\.0\de-03"):
        verify_package(copy, False, NullReporter())


def test_a_timeout_is_an_error_and_leaves_no_process(bundle):
    with pytest.raises(PackageError, match="longer than 0 s"):
        verify_package(bundle, True, NullReporter(), timeout=0.2)


def test_verification_that_crashes_says_so(tmp_path):
    with pytest.raises(PackageError, match="not a package"):
        verify_package(tmp_path, False, NullReporter())


def test_parity_detects_swapped_colours_other_noise_and_another_horizon(bundle):
    contract = Contract.load(bundle / "contract.json")
    vectors = parity.load_vectors(bundle / "parity", contract)
    service = PolicyService(load_served_policy(bundle, contract.denoise_steps, 5, "float32"), contract)
    assert parity.check_vectors(service.infer, vectors, contract)["max_difference"] <= 2e-4

    def swapped(request):
        image = np.ascontiguousarray(request[contract.camera.key][..., ::-1])
        return service.infer({**request, contract.camera.key: image})

    for answer in (
        swapped,
        lambda request: service.infer({**request, "seed": request["seed"] + 1}),
        lambda request: service.infer({**request, "prompt": "open the drawer"}),
        lambda request: {"actions": service.infer(request)["actions"] * np.nan},
    ):
        with pytest.raises(PackageError, match="actions differ"):
            parity.check_vectors(answer, vectors, contract)
    with pytest.raises(PackageError, match=r"chunk of \(4, 7\), expected \(5, 7\)"):
        parity.check_vectors(lambda request: {"actions": service.infer(request)["actions"][:4]}, vectors, contract)
    with pytest.raises(PackageError, match="does not fit the contract"):
        parity.load_vectors(bundle / "parity", contract.model_copy(update={"horizon": 4}))


def test_parity_pictures_show_the_scene(bundle):
    contract = Contract.load(bundle / "contract.json")
    images = parity.load_vectors(bundle / "parity", contract).images
    assert images.shape == (4, 120, 160, 3)
    assert images.std() > 10
    assert all((images[i] != images[0]).any() for i in range(1, 4))


def test_building_is_all_or_nothing(inputs, tmp_path):
    broken = shutil.copytree(inputs, tmp_path / "inputs")
    (broken / "scene" / "cube.ply").write_bytes(b"ply\n")
    out = tmp_path / "out" / "bundle"
    with pytest.raises(GsrlError):
        make_bundle(broken, out)
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(PackageError, match="not an empty folder"):
        make_bundle(inputs, out)
    assert (out / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda root: (root / "checkpoint" / "tokenizer.model").unlink(), r"lacks tokenizer\.model"),
        (lambda root: shutil.rmtree(root / "checkpoint" / "assets"), "has 0 assets"),
        (lambda root: (root / "evaluation" / "report.json").unlink(), "no readable evaluation report"),
        (lambda root: (root / "evaluation" / "report.json").write_text('{"cells": []}'), "no cells"),
        (lambda root: (root / "evaluation" / "report.json").write_text('{"cells": [{"name": "x"}]}'), "success_rate"),
    ],
)
def test_incomplete_inputs_are_named(inputs, tmp_path, damage, text):
    root = shutil.copytree(inputs, tmp_path / "inputs")
    damage(root)
    with pytest.raises(PackageError, match=text):
        make_bundle(root, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_a_package_cannot_express_is_refused(inputs, tmp_path):
    camera = load("laptop").sim.cameras[0].model_dump(mode="json")
    for override, text in (
        ({"sim.cameras": [camera, {**camera, "name": "second"}]}, "2 cameras"),
        ({"sim.cameras": [{**camera, "link": "fr3_hand"}]}, "fixed in the base"),
        ({"sim.cameras": [{**camera, "distortion": [0.1, 0, 0, 0, 0]}]}, "pinhole cameras only"),
        ({"sim.control_mode": "pd_joint_delta_pos"}, "pd_ee_target_delta_pose"),
    ):
        with pytest.raises(PackageError, match=text):
            make_bundle(inputs, tmp_path / "bundle", **override)


def test_safety_overrides_reach_the_package(inputs, tmp_path):
    out = make_bundle(inputs, tmp_path / "bundle", **{"release.safety.max_step_translation": 0.005})
    assert SafetyLimits.load(out / "safety.yaml").max_step_translation == 0.005


def recorded(contract, count=5, step=0.01):
    from gsrl_core.deploy.kinematics import tcp_pose

    q = np.array(contract.start_q)
    pose = tcp_pose(q)
    steps = []
    for k in range(count):
        target = pose.copy()
        target[1, 3] += step * k
        steps.append({"target": target.tolist(), "measured": pose.tolist(), "q": q.tolist()})
    return steps


def test_the_check_of_a_recorded_episode_flags_every_violation(bundle):
    contract, limits = Contract.load(bundle / "contract.json"), SafetyLimits()
    assert check_steps(recorded(contract), limits, contract)["step_m"] == pytest.approx(0.01)
    with pytest.raises(PackageError, match="step of the target"):
        check_steps(recorded(contract, step=0.05), limits, contract)
    with pytest.raises(PackageError, match="workspace"):
        check_steps(recorded(contract, count=40), limits, contract)
    turned = recorded(contract, step=0.0)
    angle = 0.2
    turned[2]["target"] = (
        np.array(
            [[np.cos(angle), -np.sin(angle), 0, 0], [np.sin(angle), np.cos(angle), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        )
        @ np.array(turned[2]["target"])
    ).tolist()
    turned[2]["target"][0][3], turned[2]["target"][1][3] = turned[1]["target"][0][3], turned[1]["target"][1][3]
    with pytest.raises(PackageError, match=r"turn of the target \[rad\] reached 0\.2000"):
        check_steps(turned, limits, contract)
    bent = recorded(contract)
    bent[1]["q"] = [3.0, *bent[1]["q"][1:]]
    with pytest.raises(PackageError, match="joint beyond"):
        check_steps(bent, limits, contract)


def test_fingers_below_the_workspace_are_flagged_though_the_tcp_is_inside(bundle):
    contract, limits = Contract.load(bundle / "contract.json"), SafetyLimits()
    steps = recorded(contract, count=1)
    down = np.diag([1.0, -1.0, -1.0, 1.0])
    down[:3, 3] = (0.45, 0.0, 0.014)  # 9.5 mm from TCP to tip leave 4.5 mm, the floor is 5 mm
    steps[0]["target"] = down.tolist()
    with pytest.raises(PackageError, match=r"finger tip below the workspace \[m\] reached 0\.0005"):
        check_steps(steps, limits, contract)
    down[2, 3] = 0.0146
    steps[0]["target"] = down.tolist()
    check_steps(steps, limits, contract)


def followed(asked=0.04, share=1.0, final=0.0, turn=0.0, lag_mm=5.0):
    """The log of an arm that came ``share`` of the way and ended ``final`` m and ``turn`` rad off."""

    def at(x, angle=0.0):
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pose[0, 3] = x
        return pose.tolist()

    log = EpisodeLog(start=at(0.0), tracking_mm=[lag_mm] * 10)
    log.steps = [{"target": at(asked * k / 4), "measured": at(share * asked * k / 4)} for k in range(1, 5)]
    log.final = {"target": at(asked), "measured": at(asked - final, turn)}
    return log


def test_following_is_judged():
    found = check_following(followed(final=0.004))
    assert found["final_mm"] == pytest.approx(4.0)
    assert found["mean_mm"] == pytest.approx(5.0)
    assert (found["asked_mm"], found["travelled_mm"]) == pytest.approx((40.0, 40.0))
    for log, text in (
        (followed(lag_mm=31.0), "mean distance"),
        (followed(final=0.016), "final distance"),
        (followed(turn=0.09), "final turn"),
        (followed(asked=0.012, share=0.0, final=0.012), "the arm only 0.0 mm"),
        (EpisodeLog(), "nothing was streamed"),
    ):
        with pytest.raises(PackageError, match=text):
            check_following(log)
    # A policy that asks for nothing cannot show that the arm follows, and is not blamed for it.
    check_following(followed(asked=0.004, share=0.0, final=0.004))


def test_a_policy_blind_to_colours_fails_verification(bundle, monkeypatch):
    from gsrl_core import package_check

    monkeypatch.setattr(package_check.parity, "color_sensitivity", lambda *_: 1e-5)
    with pytest.raises(PackageError, match="red and blue are swapped"):
        package_check.check_package(bundle, robot=False)


def test_serve_runs_as_a_process_and_ends_with_it(bundle):
    from gsrl_core.deploy.client import PolicyClient

    contract = Contract.load(bundle / "contract.json")
    vectors = parity.load_vectors(bundle / "parity", contract)
    with serving(bundle) as (host, port), PolicyClient(host, port) as client:
        client.check(contract)
        answer = client.infer(vectors.request(0, contract))
        np.testing.assert_allclose(answer["actions"], vectors.actions[0], atol=2e-4)
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=1)


def test_the_calibration_of_a_larger_camera_is_reduced(bundle, tmp_path):
    contract = Contract.load(bundle / "contract.json")
    wanted = CameraCalibration.of(contract.camera)
    full = CameraCalibration(640, 480, wanted.K * np.array([[4.0], [4.0], [1.0]]), wanted.base_from_camera)
    full.save(tmp_path / "camera.json")
    reduced = CameraCalibration.load(tmp_path / "camera.json").resized(160, 120)
    np.testing.assert_allclose(reduced.K, wanted.K)
    with pytest.raises(SafetyError, match="shape"):
        full.resized(160, 160)


def test_tables_and_locks_refuse_what_they_cannot_fill():
    with pytest.raises(PackageError, match="success_rate"):
        evaluation_table({"cells": [{"name": "nominal"}]})
    with pytest.raises(PackageError, match="not installed"):
        installed_requirements("no-such-distribution-here")


def test_importing_the_package_module_stays_light():
    heavy = ("franky", "mani_skill", "sapien", "ray")
    code = f"import sys, gsrl_core.package; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_existing_empty_folder_is_filled(inputs, tmp_path):
    out = tmp_path / "bundle"
    out.mkdir()
    facts = build_package(inputs / "checkpoint", inputs / "scene", inputs / "evaluation", out, load("laptop"), {})
    assert facts["manifest_sha256"] == check_manifest(out)
    assert facts["parity_vectors"] == 4
