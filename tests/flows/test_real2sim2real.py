"""The laptop flow as a user runs it, at toy sizes with every part real: killed in three stages, resumed, cached."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from gsrl_core.artifacts import Store, digest_folder
from gsrl_core.sim.task import EpisodeSpec
from gsrl_core.sim.tasks import load_task

MAIN = "import sys; sys.argv[0] = 'real2sim2real'; from flows.cli import main; main()"
# A run that is to be killed stops in the middle of its work, where it says so and waits.
HELD = """
import importlib, time
from pathlib import Path
module, name, number, about = {moment!r}
module = importlib.import_module(module)
work, calls = getattr(module, name), []
def held(*args, **kwargs):
    calls.extend([1] * (about in repr(args)))
    if len(calls) == number:
        Path({marker!r}).touch()
        time.sleep(600)
    return work(*args, **kwargs)
setattr(module, name, held)
"""
# Module, function, which of its calls, and what its arguments mention.
MOMENTS = {
    "capture": ("shutil", "copyfile", 8, "/tmp/capture-"),  # half of the photos
    "fit": ("gsrl_core.splat.fit", "save_state", 2, ""),  # 60 steps are saved, the next 60 are done
    "assemble": ("gsrl_core.splat.scene", "write_ply", 3, ""),
    "finetune": ("gsrl_core.finetune", "save_progress", 2, ""),  # one iteration is saved, the next is done
    "sweep": ("gsrl_core.evaluate", "_play_whole", 2, ""),  # one batch of episodes of two, with workers waiting
    "package": ("gsrl_core.deploy.parity", "make_vectors", 1, ""),
}
CHILDREN = {"reconstruct": "gsrl_core.capture.sfm_worker", "verify": "gsrl_core.deploy.emulator"}
"""Stages that work in a process of their own: its module."""
# Some episodes succeed and some do not, and which ones is known beforehand.
TASK = """
from gsrl_core.sim.tasks.put_cube_on_plate import PutCubeOnPlate

class CubeOnTheLeft(PutCubeOnPlate):
    support = "table"

    def locate(self, poses):
        left = bool(poses["cube"][1, 3] > 0.2)
        return left, left
"""
TOY = {
    "capture.max_image_side": 160,
    "capture.sfm_image_side": 640,
    "fit.steps": 140,
    "fit.max_gaussians": 4000,
    "fit.checkpoint_every": 60,
    "quality.min_psnr": 5,
    "quality.max_scale_residual_mm": 50,
    "sim.num_envs": 2,
    "sim.workers": 2,
    "sim.max_episode_steps": 25,
    "ppo.iterations": 2,
    "ppo.rollout_epochs": 1,
    "ppo.global_batch": 10,
    "ppo.micro_batch": 10,
    "ppo.checkpoint_every": 1,
    "evaluation.episodes": 3,  # the second batch of two holds one that does not count
    "evaluation.seed": 9_000_004,
    "evaluation.episodes_per_perturbation": 0,
    "evaluation.videos": 1,
    "release.name": "toy",
    "release.minimum_success": 0,
}
STAGES = (
    "policy", "capture", "reconstruct", "assemble", "sweep-before", "finetune", "sweep", "package", "verify",
    "register", "promote",
)  # fmt: skip

# Of each test: the first one that asks for the completed run makes it too.
pytestmark = pytest.mark.timeout(2400)

BUNDLED = Path(__file__).parents[2] / "gsrl_core" / "bundled" / "capture_tabletop"


def half_a_capture(folder):
    """Every second bundled photo, with the tags' places: matching takes a quarter of the time."""
    folder.mkdir()
    for photo in sorted(BUNDLED.glob("*.jpg"))[::2]:
        shutil.copyfile(photo, folder / photo.name)
    shutil.copyfile(BUNDLED / "markers.json", folder / "markers.json")
    return folder


class Runner:
    def __init__(self, home: Path):
        self.home = home
        (home.parent / "task.py").write_text(TASK)
        self.toy = {
            **TOY,
            "assets.capture": str(half_a_capture(home.parent / "photos")),
            "sim.task": f"{home.parent / 'task.py'}:CubeOnTheLeft",
        }
        self.environment = {**os.environ, "GSRL_HOME": str(home)}
        for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)

    def start(self, prelude="", **changes):
        sets = [f"--set={key}={json.dumps(value)}" for key, value in {**self.toy, **changes}.items()]
        self.log = (self.home.parent / "run.log").open("w")
        return subprocess.Popen(
            [sys.executable, "-c", prelude + MAIN, "run", *sets], env=self.environment, stdout=self.log, stderr=self.log
        )

    def run(self, code=0, **changes):
        process = self.start(**changes)
        try:
            assert process.wait(timeout=580) == code, self.text()
        finally:
            process.kill()
        assert "Traceback" not in self.text()
        return self.reports()[-1] if self.reports() else None

    def text(self):
        return (self.home.parent / "run.log").read_text()

    def reports(self):
        found = sorted((self.home / "runs").glob("*/report.json"), key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text()) for path in found]

    def kill_at(self, moment):
        """SIGKILL a run that has come to one of ``MOMENTS``."""
        marker = self.home.parent / f"held-{moment}"
        marker.unlink(missing_ok=True)
        held = HELD.format(moment=MOMENTS[moment], marker=str(marker))
        self._kill(self.start(held), lambda _: marker.exists())

    def kill_while_child(self, module):
        """SIGKILL a run while a process that it started works for it."""
        self._kill(self.start(), lambda process: module in commands(process))

    def _kill(self, process, condition):
        """SIGKILL a run as soon as ``condition`` holds of its process; nothing that it started may live on."""
        try:
            deadline = time.monotonic() + 500
            while not condition(psutil.Process(process.pid)):
                assert process.poll() is None, self.text()
                assert time.monotonic() < deadline, self.text()
                time.sleep(0.05)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        self.no_half_written_artefact()

    def under_way(self, kind):
        """Something of an artefact has been written, in its place or beside it."""
        return any(path.is_file() for path in self.home.glob(f"tmp/{kind}-*/**/*"))

    def remembered(self, stage):
        return len(list(self.home.glob(f"stages/{stage}/*")))

    def no_half_written_artefact(self):
        for folder in self.home.glob("objects/*/*"):
            assert digest_folder(folder) == folder.name
        store = Store(self.home)
        for entry in self.home.glob("stages/*/*.json"):
            assert store.recall(entry.parent.name, entry.stem) is not None


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    home = tmp_path_factory.mktemp("pipeline") / "home"
    home.mkdir()
    return Runner(home)


def cached(report):
    return {stage["name"]: stage["cached"] for stage in report["stages"]}


@pytest.fixture(scope="module")
def killed(runner):
    """What was there after each kill in fit, finetune and release, and the report of the run that then completed."""
    work, seen = runner.home / "work", SimpleNamespace()
    runner.kill_at("fit")
    seen.reconstructions = runner.remembered("reconstruct")
    seen.step = torch.load(next(work.glob("reconstruct-*/draft/.work/fit.pt")), weights_only=True)["step"]
    seen.first_steps = reported_fit_steps(runner)

    runner.kill_at("finetune")
    seen.resumed_steps = reported_fit_steps(runner)
    seen.scenes, seen.tunings = runner.remembered("assemble"), runner.remembered("finetune")
    seen.history = torch.load(next(work.glob("finetune-*/checkpoint.pt")), weights_only=True)["history"]

    runner.kill_at("package")
    seen.begun = runner.under_way("package")
    seen.tuned, seen.packages = runner.remembered("finetune"), runner.remembered("package")

    seen.report = runner.run()
    seen.candidate = candidate(runner)
    seen.tmp, seen.work = list((runner.home / "tmp").glob("*/")), list(work.iterdir())
    return seen


@pytest.fixture
def report(killed):
    """Of the run that completed."""
    return killed.report


def test_a_wrong_checkpoint_digest_costs_seconds_and_is_reported(runner):
    before = set(runner.home.glob("stages/*/*"))
    report = runner.run(code=1, **{"policy.sha256": "ab" * 32})
    assert report["status"] == "failed"
    assert "sha256" in report["reason"]
    assert "ab" * 32 in runner.text()
    assert set(runner.home.glob("stages/*/*")) == before


def test_killed_in_fit_finetune_and_release_the_next_run_completes(runner, killed):
    assert killed.reconstructions == 0
    assert killed.step == TOY["fit.checkpoint_every"]
    assert killed.first_steps == [50, 100]
    assert killed.resumed_steps == [100, 140]
    assert killed.scenes == 1
    assert killed.tunings == 0
    assert len(killed.history) == 1
    assert killed.tuned == 1
    assert killed.packages == 0
    assert killed.begun

    report = killed.report
    assert report["status"] == "released"
    assert tuple(cached(report)) == STAGES
    before_release = STAGES[: STAGES.index("package")]
    assert all(cached(report)[name] for name in before_release)
    tuned = next(stage for stage in report["stages"] if stage["name"] == "finetune")["artifact"]
    history = json.loads((Path(tuned["path"]) / "training.json").read_text())["history"]
    assert len(history) == TOY["ppo.iterations"]
    assert history[:1] == killed.history  # with the very seconds that the killed run measured
    runner.no_half_written_artefact()
    assert not killed.tmp
    assert not killed.work


def commands(process):
    """Words of the command lines of all that a process started."""
    words = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            words += child.cmdline()
    return words


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["capture", "reconstruct", "assemble", "sweep", "verify"])
def test_killed_in_any_other_stage_the_next_run_completes(runner, report, stage):
    shutil.rmtree(runner.home / "stages" / stage)  # as if it had not run yet
    if stage in CHILDREN:
        runner.kill_while_child(CHILDREN[stage])
    else:
        runner.kill_at(stage)
    half_made = [path for path in (runner.home / "tmp").glob("*/content/**/*") if path.is_file()]
    if stage in ("capture", "assemble"):
        whole = next(made for made in report["stages"] if made["name"] == stage)["artifact"]["path"]
        assert 0 < len(half_made) < len([path for path in Path(whole).rglob("*") if path.is_file()])
    assert runner.remembered(stage) == 0
    again = runner.run()
    assert again["status"] == "released"
    assert not cached(again)["sweep-before" if stage == "sweep" else stage]
    earlier = [name for name in STAGES[: STAGES.index(stage)] if not name.startswith("sweep")]
    assert all(cached(again)[name] for name in earlier)
    runner.no_half_written_artefact()
    assert not list((runner.home / "tmp").glob("*/"))
    assert not list((runner.home / "work").iterdir())


def candidate(runner):
    """Name and version of the toy model that was released last."""
    from mlflow import MlflowClient

    version = MlflowClient(f"sqlite:///{runner.home / 'mlflow.db'}").get_model_version_by_alias("toy", "candidate")
    return version.name, str(version.version)


def reported_fit_steps(runner):
    """Steps at which the newest attempt of the fit reported its loss."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runner.home / 'mlflow.db'}")
    experiment = client.search_experiments(filter_string="name = 'real2sim2real'")[0].experiment_id
    newest = client.search_runs([experiment], "tags.`gsrl.stage` = 'reconstruct'", order_by=["start_time DESC"])[0]
    return [point.step for point in client.get_metric_history(newest.info.run_id, "fit/loss")]


def test_the_report_is_complete(runner, report):
    task, seed = load_task(runner.toy["sim.task"]), TOY["evaluation.seed"]
    starts = [task.start(EpisodeSpec(seed + i)).objects["cube"][1] for i in range(TOY["evaluation.episodes"])]
    expected = sum(y > 0.2 for y in starts)
    assert report["psnr"] > TOY["quality.min_psnr"]
    for success in (report["success_before"], report["success_after"]):
        assert success["episodes"] == TOY["evaluation.episodes"]
        assert success["successes"] == expected
        assert success["rate"] == pytest.approx(expected / 3)
        assert 0 < success["low"] < success["rate"] < success["high"] < 1
    for stage in report["stages"]:
        assert stage["seconds"] >= 0
        assert digest_folder(Path(stage["artifact"]["path"])) == stage["artifact"]["sha256"]
    assert (Path(report["package"]) / "MANIFEST.sha256").is_file()


def test_tracking_has_one_parent_and_a_child_for_each_stage(runner, killed):
    from mlflow import MlflowClient

    report = killed.report
    client = MlflowClient(f"sqlite:///{runner.home / 'mlflow.db'}")
    parent = client.get_run(report["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["prefect.flow_run_id"] == report["prefect_flow_run_id"]
    assert parent.data.metrics["success_after"] == report["success_after"]["rate"]
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["start_time"]
    )
    assert [run.info.run_name for run in runs] == [name for name in STAGES if name not in ("register", "promote")]
    broken_off = client.search_runs([parent.info.experiment_id], "attributes.status = 'KILLED'")
    assert len(broken_off) >= 3
    trained = client.search_runs(
        [parent.info.experiment_id], "tags.`gsrl.stage` = 'finetune' and tags.`gsrl.cached` = 'false'"
    )
    assert any("actor/approx_kl" in run.data.metrics for run in trained)
    name, version = report["model_version"].split("/")
    assert killed.candidate == (name, version)


def test_a_second_run_is_cached_within_a_minute(runner, report):
    start = time.monotonic()
    again = runner.run()
    assert all(cached(again).values())
    assert time.monotonic() - start < 60


def test_one_ppo_key_runs_finetune_sweep_and_release_again(runner, report):
    # The emulator had its turn before.
    again = runner.run(**{"ppo.gamma": 0.97, "release.verify_robot": False})
    executed = {name for name, from_store in cached(again).items() if not from_store}
    assert executed == {"finetune", "sweep", "package", "verify", "register", "promote"}


def test_a_damaged_artefact_is_made_again_and_a_gate_ends_the_run_saying_what_to_do(runner, report):
    scene = next(stage for stage in report["stages"] if stage["name"] == "assemble")["artifact"]
    (Path(scene["path"]) / "scene.json").write_text("{}")
    ended = runner.run(code=1, **{"release.minimum_success": 1})
    assert not cached(ended)["assemble"]
    assert cached(ended)["finetune"]  # the same bytes came out
    assert digest_folder(Path(scene["path"])) == scene["sha256"]
    assert ended["status"] == "not released"
    assert ended["package"] is None
    assert "release.minimum_success" in ended["reason"]
    assert "not released" in runner.text()
