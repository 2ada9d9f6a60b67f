"""How a stage runs: cached, locked, resumable, recorded."""

from __future__ import annotations

import errno

import pytest
from prefect.states import State

from gsrl_core.artifacts import Artifact, Store
from gsrl_core.config import load
from gsrl_core.errors import ArtifactError, GsrlError
from tasks.stage import Stage, run_stage

FIT = Stage("fit", "scene", sections=("fit",), attachments=("*.txt",))


class Body:
    def __init__(self):
        self.calls = 0

    def __call__(self, build):
        self.calls += 1
        self.build = build
        (build.out / "scene.txt").write_text(f"{build.config.fit.steps}")
        build.reporter.metrics({"fit/psnr": 20.0 + self.calls}, step=1)
        build.reporter.progress(0.5, "half")
        return {"psnr": 21.0, "note": "text"}


@pytest.fixture
def body():
    return Body()


def made(result):
    return result if isinstance(result, Artifact) else result.data


def child_runs(tracking, parent):
    client = tracking._client()
    experiment = client.get_run(parent).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", order_by=["start_time ASC"])


def test_the_second_time_it_comes_from_the_store(tracking, body):
    module, parent = tracking
    first = run_stage(FIT, load("laptop"), {}, body, parent)
    second = run_stage(FIT, load("laptop"), {}, body, parent)
    assert body.calls == 1
    assert isinstance(second, State)
    assert second.name == "Cached"
    assert second.data == first
    runs = child_runs(module, parent)
    assert [run.data.tags["gsrl.cached"] for run in runs] == ["false", "true"]
    assert all(run.info.status == "FINISHED" for run in runs)
    assert all(run.data.tags["gsrl.artifact.sha256"] == first.sha256 for run in runs)
    assert runs[0].data.params["fit.steps"] == str(load("laptop").fit.steps)
    assert runs[0].data.metrics == {"fit/psnr": 21.0, "psnr": 21.0}
    assert runs[1].data.metrics == {"psnr": 21.0}
    assert [f.path for f in module._client().list_artifacts(runs[0].info.run_id)] == ["scene.txt"]


def test_its_own_section_and_inputs_make_it_run_again(tracking, body):
    _, parent = tracking
    first = made(run_stage(FIT, load("laptop"), {}, body, parent))
    run_stage(FIT, load("laptop", {"ppo.iterations": 99}), {}, body, parent)
    assert body.calls == 1
    second = run_stage(FIT, load("laptop", {"fit.steps": 7}), {}, body, parent)
    assert (body.calls, (second.path / "scene.txt").read_text()) == (2, "7")
    run_stage(FIT, load("laptop"), {"capture": first}, body, parent)
    assert body.calls == 3
    assert body.build.inputs == {"capture": first.path}


def test_a_damaged_result_is_made_again_and_a_damaged_input_is_refused(tracking, body):
    _, parent = tracking
    first = run_stage(FIT, load("laptop"), {}, body, parent)
    (first.path / "scene.txt").write_text("tampered")
    with pytest.raises(ArtifactError, match="was altered"):
        run_stage(FIT, load("laptop"), {"capture": first}, body, parent)
    assert body.calls == 1
    again = run_stage(FIT, load("laptop"), {}, body, parent)
    assert body.calls == 2
    assert Store().check(again) == first.path


def test_a_failure_is_recorded_keeps_the_workspace_and_stores_nothing(tracking, body, home):
    module, parent = tracking

    def breaks(build):
        (build.workspace / "state").write_text("iteration 3")
        (build.out / "half").write_text("half")
        raise GsrlError("the sensor is upside down")

    with pytest.raises(GsrlError, match="upside down"):
        run_stage(FIT, load("laptop"), {}, breaks, parent)
    assert not (home / "objects").exists()
    assert not list((home / "tmp").iterdir())
    (run,) = child_runs(module, parent)
    assert run.info.status == "FAILED"
    assert "upside down" in run.data.tags["gsrl.error"]

    def resumes(build):
        assert (build.workspace / "state").read_text() == "iteration 3"
        assert not list(build.out.iterdir())
        return body(build)

    assert made(run_stage(FIT, load("laptop"), {}, resumes, parent))
    assert not list((home / "work").iterdir())


def test_a_full_disk_inside_a_driver_is_a_clear_error(tracking, home):
    def full(build):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match=r"is full.*GSRL_HOME"):
        run_stage(FIT, load("laptop"), {}, full, tracking[1])
    assert not (home / "objects").exists()


def test_tensorboard_files_are_written_unless_turned_off(tracking, body, home):
    run_stage(FIT, load("laptop", {"tracking.tensorboard": False}), {}, body, tracking[1])
    assert not (home / "tensorboard").exists()
    run_stage(FIT, load("laptop", {"fit.steps": 3}), {}, body, tracking[1])
    assert list((home / "tensorboard").glob("fit-*/events*"))
