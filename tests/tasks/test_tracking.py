"""What MLflow is asked, and what its answers are taken for."""

from __future__ import annotations

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as codes


def test_an_alias_is_a_version_or_nothing(tracking):
    module, parent = tracking
    client = module._client()
    assert module.alias("no-such-model", "candidate") is None
    client.create_registered_model("aliased")
    assert module.alias("aliased", "candidate") is None
    for wanted in ("1", "2"):
        client.create_model_version("aliased", "file:///tmp/x", run_id=parent)
        module.set_alias("aliased", "candidate", wanted)
        assert module.alias("aliased", "candidate") == wanted
    module.set_alias("aliased", "candidate", None)
    assert module.alias("aliased", "candidate") is None


@pytest.mark.parametrize("code", [codes.INTERNAL_ERROR, codes.TEMPORARILY_UNAVAILABLE, codes.PERMISSION_DENIED])
def test_a_registry_that_fails_is_not_an_alias_that_is_missing(tracking, monkeypatch, code):
    """Taken for None, the rollback of a failed release would remove the alias of the version before."""
    module, _ = tracking

    class Failing:
        def __getattr__(self, name):
            def fails(*_):
                raise MlflowException("the database is locked", code)

            return fails

    monkeypatch.setattr(module, "_client", Failing)
    with pytest.raises(MlflowException, match="locked"):
        module.alias("any", "candidate")


def test_the_experiment_opens_on_its_training_runs(tracking):
    module, parent = tracking
    client = module._client()
    experiment = client.get_experiment(client.get_run(parent).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
