"""Registration and alias: both or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.transactions import transaction

from gsrl_core.artifacts import Store
from gsrl_core.config import load
from gsrl_core.folders import bundled_folder, import_folder
from tasks import release

sys.path.insert(0, str(Path(__file__).parents[1] / "gsrl_core"))

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def name(request):
    return f"fr3-{abs(hash(request.node.name)) % 10**8}"


def package(content):
    store = Store()
    with store.building("package") as folder:
        (folder / "model.safetensors").write_text(content)
        return store.commit("package", folder, {"success_rate": 0.6, "success_low": 0.5, "success_high": 0.7})


@task
def breaks():
    raise RuntimeError("the last step failed")


@flow
def publish(config, artifact, parent, fail):
    with transaction():
        registered = release.register(config, artifact, artifact, parent, return_state=True).result()
        promoted = release.promote(config, registered, parent, return_state=True)
        if fail:
            breaks()
    return promoted.name, registered.facts["version"]


def versions(tracking, name):
    return sorted(int(v.version) for v in tracking._client().search_model_versions(f"name='{name}'"))


def test_a_release_is_registered_once_and_aliased(tracking, name):
    module, parent = tracking
    config = load("laptop", {"release.name": name})
    first = package("one")
    assert publish(config, first, parent, False) == ("Completed", "1")
    assert publish(config, first, parent, False) == ("Cached", "1")
    assert versions(module, name) == [1]
    assert publish(config, package("two"), parent, False) == ("Completed", "2")
    assert module.alias(name, release.ALIAS) == "2"
    version = module._client().get_model_version(name, "1")
    assert version.tags["gsrl.sha256"] == first.sha256
    assert version.source == first.path.as_uri()
    model = module._client().get_logged_model(version.tags["gsrl.model_id"])
    assert {m.key: m.value for m in model.metrics} == {"success_rate": 0.6, "success_low": 0.5, "success_high": 0.7}


def test_a_release_that_fails_at_the_end_leaves_registry_and_alias_as_they_were(tracking, name):
    module, parent = tracking
    config = load("laptop", {"release.name": name})
    with pytest.raises(RuntimeError, match="the last step"):
        publish(config, package("zero"), parent, True)
    assert (versions(module, name), module.alias(name, release.ALIAS)) == ([], None)
    publish(config, package("one"), parent, False)
    before = versions(module, name)
    with pytest.raises(RuntimeError, match="the last step"):
        publish(config, package("two"), parent, True)
    assert versions(module, name) == before
    assert module.alias(name, release.ALIAS) == str(before[-1])


def test_a_failed_second_try_does_not_withdraw_the_version_of_the_first(tracking, name):
    module, parent = tracking
    config = load("laptop", {"release.name": name})
    publish(config, package("one"), parent, False)
    with pytest.raises(RuntimeError):
        publish(config, package("one"), parent, True)
    assert versions(module, name) == [1]
    assert module.alias(name, release.ALIAS) == "1"


def test_a_package_tells_the_configuration_that_decided_it_and_no_defaults_in_its_place(tracking, tmp_path):
    from package_examples import make_inputs

    from gsrl_core.deploy.contract import Contract
    from gsrl_core.deploy.parity import load_vectors
    from gsrl_core.package import SECTIONS

    root = make_inputs(tmp_path / "in", bundled_folder("bundled:pi05_tiny") / "tokenizer.model")
    inputs = [import_folder(root / kind, kind, Store()) for kind in ("checkpoint", "scene", "evaluation")]
    config = load("laptop", {"evaluation.seed": 77, "evaluation.episodes": 5, "sim.control_hz": 20})
    made = release.build_package.fn(config, *inputs, {"config": "of the flow"}, tracking[1])
    origin = json.loads((made.path / "lineage.json").read_text())
    told = {name: getattr(config, name).model_dump(mode="json") for name in ("sim", "policy", "evaluation", "release")}
    assert origin["configuration"] == told
    contract = Contract.load(made.path / "contract.json")
    assert load_vectors(made.path / "parity", contract).seeds.tolist() == [77, 78, 79, 80]
    assert set(release.PACKAGE.sections) == set(SECTIONS)
