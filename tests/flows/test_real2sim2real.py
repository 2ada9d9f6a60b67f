"""The laptop flow as a user runs it, at toy sizes with every part real: killed in three stages, resumed, cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gsrl_core.artifacts import Store, digest_folder

MAIN = "import sys; sys.argv[0] = 'real2sim2real'; from flows.cli import main; main()"
TOY = {
    "capture.max_image_side": 160,
    "capture.sfm_image_side": 640,
    "fit.steps": 140,
    "fit.max_gaussians": 6000,
    "fit.checkpoint_every": 60,
    "quality.min_psnr": 5,
    "quality.max_scale_residual_mm": 50,
    "sim.num_envs": 4,
    "sim.workers": 2,
    "sim.max_episode_steps": 50,
    "ppo.iterations": 2,
    "ppo.rollout_epochs": 1,
    "ppo.global_batch": 16,
    "ppo.micro_batch": 16,
    "ppo.checkpoint_every": 1,
    "evaluation.episodes": 4,
    "evaluation.episodes_per_perturbation": 0,
    "evaluation.videos": 1,
    "release.name": "toy",
    "release.minimum_success": 0,
}
STAGES = (
    "policy", "capture", "reconstruct", "assemble", "sweep-before", "finetune", "sweep", "package", "verify",
    "register", "promote",
)  # fmt: skip


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
        self.toy = {**TOY, "assets.capture": str(half_a_capture(home.parent / "photos"))}
        self.environment = {**os.environ, "GSRL_HOME": str(home)}
        for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)

    def start(self, **changes):
        sets = [f"--set={key}={json.dumps(value)}" for key, value in {**self.toy, **changes}.items()]
        self.log = (self.home.parent / "run.log").open("w")
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, "run", *sets], env=self.environment, stdout=self.log, stderr=self.log
        )

    def run(self, code=0, **changes):
        process = self.start(**changes)
        assert process.wait(timeout=580) == code, self.text()
        assert "Traceback" not in self.text()
        return self.reports()[-1] if self.reports() else None

    def text(self):
        return (self.home.parent / "run.log").read_text()

    def reports(self):
        found = sorted((self.home / "runs").glob("*/report.json"), key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text()) for path in found]

    def kill_when(self, condition):
        """SIGKILL a run as soon as ``condition`` holds; nothing that it started may live on."""
        process = self.start()
        deadline = time.monotonic() + 500
        while not condition():
            assert process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive

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


def test_a_wrong_checkpoint_digest_costs_seconds_and_is_reported(runner):
    report = runner.run(code=1, **{"policy.sha256": "ab" * 32})
    assert report["status"] == "failed"
    assert "sha256" in report["reason"]
    assert "ab" * 32 in runner.text()
    assert not list(runner.home.glob("stages/*/*"))


def test_killed_in_fit_finetune_and_release_the_next_run_completes(runner):
    work = runner.home / "work"
    runner.kill_when(lambda: any(work.glob("reconstruct-*/draft/.work/fit.pt")))
    runner.no_half_written_artefact()
    assert not list(runner.home.glob("stages/reconstruct/*"))
    saved_step = torch.load(next(work.glob("reconstruct-*/draft/.work/fit.pt")), weights_only=True)["step"]
    assert min(reported_fit_steps(runner)) == 50

    runner.kill_when(lambda: any(work.glob("finetune-*/checkpoint.pt")))
    runner.no_half_written_artefact()
    assert min(reported_fit_steps(runner)) > saved_step
    assert list(runner.home.glob("stages/assemble/*"))
    assert not list(runner.home.glob("stages/finetune/*"))
    saved = torch.load(next(work.glob("finetune-*/checkpoint.pt")), weights_only=True)["history"]

    runner.kill_when(lambda: any(work.glob("package-*")))
    runner.no_half_written_artefact()
    assert list(runner.home.glob("stages/finetune/*"))

    report = runner.run()
    assert report["status"] == "released"
    assert tuple(cached(report)) == STAGES
    before_release = STAGES[: STAGES.index("package")]
    assert all(cached(report)[name] for name in before_release)
    tuned = next(stage for stage in report["stages"] if stage["name"] == "finetune")["artifact"]
    history = json.loads((Path(tuned["path"]) / "training.json").read_text())["history"]
    assert history[: len(saved)] == saved  # with the very seconds that the killed run measured
    runner.no_half_written_artefact()
    assert not list((runner.home / "tmp").glob("*/"))
    assert not list((runner.home / "work").iterdir())


def reported_fit_steps(runner):
    """Steps at which the newest attempt of the fit reported its loss."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runner.home / 'mlflow.db'}")
    experiment = client.search_experiments(filter_string="name = 'real2sim2real'")[0].experiment_id
    newest = client.search_runs([experiment], "tags.`gsrl.stage` = 'reconstruct'", order_by=["start_time DESC"])[0]
    return [point.step for point in client.get_metric_history(newest.info.run_id, "fit/loss")]


def test_the_report_is_complete(runner):
    report = runner.reports()[-1]
    assert report["psnr"] > TOY["quality.min_psnr"]
    for success in (report["success_before"], report["success_after"]):
        assert success["episodes"] == TOY["evaluation.episodes"]
        assert 0 <= success["low"] <= success["rate"] <= success["high"] <= 1
    for stage in report["stages"]:
        assert stage["seconds"] >= 0
        assert digest_folder(Path(stage["artifact"]["path"])) == stage["artifact"]["sha256"]
    assert (Path(report["package"]) / "MANIFEST.sha256").is_file()


def test_tracking_has_one_parent_and_a_child_for_each_stage(runner, monkeypatch):
    from mlflow import MlflowClient

    report = runner.reports()[-1]
    client = MlflowClient(f"sqlite:///{runner.home / 'mlflow.db'}")
    parent = client.get_run(report["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["prefect.flow_run_id"] == report["prefect_flow_run_id"]
    assert parent.data.metrics["success_after"] == report["success_after"]["rate"]
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["start_time"]
    )
    assert [run.info.run_name for run in runs] == [name for name in STAGES if name not in ("register", "promote")]
    killed = client.search_runs([parent.info.experiment_id], "attributes.status = 'KILLED'")
    assert len(killed) >= 3
    trained = client.search_runs(
        [parent.info.experiment_id], "tags.`gsrl.stage` = 'finetune' and tags.`gsrl.cached` = 'false'"
    )
    assert any("actor/approx_kl" in run.data.metrics for run in trained)
    name, version = report["model_version"].split("/")
    assert str(client.get_model_version_by_alias(name, "candidate").version) == version


def test_a_second_run_is_cached_within_a_minute(runner):
    start = time.monotonic()
    report = runner.run()
    assert all(cached(report).values())
    assert time.monotonic() - start < 60


def test_one_ppo_key_runs_finetune_sweep_and_release_again(runner):
    report = runner.run(**{"ppo.gamma": 0.97})
    executed = {name for name, from_store in cached(report).items() if not from_store}
    assert executed == {"finetune", "sweep", "package", "verify", "register", "promote"}


def test_a_damaged_artefact_is_made_again_and_a_gate_ends_the_run_saying_what_to_do(runner):
    released = [report for report in runner.reports() if report["status"] == "released"]
    scene = next(stage for stage in released[-1]["stages"] if stage["name"] == "assemble")["artifact"]
    (Path(scene["path"]) / "scene.json").write_text("{}")
    report = runner.run(code=1, **{"release.minimum_success": 1})
    assert not cached(report)["assemble"]
    assert cached(report)["finetune"]  # the same bytes came out
    assert digest_folder(Path(scene["path"])) == scene["sha256"]
    assert report["status"] == "not released"
    assert report["package"] is None
    assert "release.minimum_success" in report["reason"]
    assert "not released" in runner.text()
