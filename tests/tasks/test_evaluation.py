"""The sweep as a stage: what it hands to the driver, and what makes it run again."""

from __future__ import annotations

import json

import pytest
from prefect.states import State

from gsrl_core import evaluate as driver
from gsrl_core.artifacts import Store
from gsrl_core.config import load
from tasks import evaluation


@pytest.fixture
def folder(home):
    with Store().building("checkpoint") as out:
        (out / "x").write_text("x")
        return Store().commit("checkpoint", out, {})


@pytest.fixture
def given(monkeypatch):
    """The files of real outcomes that the driver got."""
    seen = []

    def fake(checkpoint, scene, out, config, reporter, *, real_results=None):
        seen.append(real_results)
        (out / "report.json").write_text(json.dumps({"cells": []}))
        cell = driver.Cell("nominal", (1, 2), (True, False), (True, True), (10, 20), 0.95)
        return driver.EvalReport((cell,), None)

    monkeypatch.setattr(driver, "evaluate", fake)
    monkeypatch.setattr(evaluation, "create_table_artifact", lambda *_, **__: None)
    return seen


def test_real_outcomes_reach_the_driver_and_their_content_is_part_of_the_key(tracking, folder, given, tmp_path):
    real = tmp_path / "real.json"

    def sweep(**overrides):
        config = load("laptop", {key.replace("__", "."): value for key, value in overrides.items()})
        return evaluation.evaluate.fn(config, folder, folder, "sweep", tracking[1])

    made = sweep()
    assert given == [None]
    assert (made.facts["success_rate"], made.facts["episodes"]) == (0.5, 2)
    real.write_text("[]")
    sweep(evaluation__real_results=str(real))
    assert given == [None, real]
    assert isinstance(sweep(evaluation__real_results=str(real)), State)  # cached
    real.write_text("[ ]")
    sweep(evaluation__real_results=str(real))
    assert given == [None, real, real]
