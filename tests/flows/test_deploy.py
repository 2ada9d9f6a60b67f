"""prefect.yaml on a real server: deployments, typed forms, and what is refused when submitted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FLOWS = {"scene", "policy", "finetune", "sweep", "release"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own with its own home and all deployments; yields (api, environment)."""
    folder = tmp_path_factory.mktemp("deploy")
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "GSRL_HOME": str(folder / "gsrl"),
    }
    environment.pop("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", None)
    process, api = started(environment, folder / "server.log")
    environment["PREFECT_API_URL"] = api
    try:
        prefect(environment, "work-pool", "create", "local", "--type", "process")
        prefect(environment, "--no-prompt", "deploy", "--all")
        yield api, environment
    finally:
        end(process)


def started(environment, log):
    """A server that answers: (process, api). Another program may take the free port first; then another is tried."""
    for _ in range(3):
        port = free_port()
        api = f"http://127.0.0.1:{port}/api"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
                env={**environment, "PREFECT_API_URL": api}, stdout=output, stderr=output,
            )  # fmt: skip
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            if alive(api):
                return process, api
            time.sleep(0.3)
        end(process)
    pytest.fail(f"the server did not start: {log.read_text()}")


def end(process):
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def alive(api):
    try:
        return urllib.request.urlopen(f"{api}/health", timeout=2).status == 200
    except OSError:
        return False


def prefect(environment, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def post(api, path, body):
    request = urllib.request.Request(
        f"{api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def deployments(server):
    api, _ = server
    status, found = post(api, "/deployments/filter", {})
    assert status == 200
    names = {flow["id"]: flow["name"] for flow in post(api, "/flows/filter", {})[1]}
    return {f"{names[d['flow_id']]}/{d['name']}": d for d in found}


def test_all_deployments_are_there_with_nothing_to_fetch(deployments):
    pipeline = {f"real2sim2real/{name}" for name in ("full", "one-gpu", "laptop")}
    assert set(deployments) == pipeline | {f"{flow}/full" for flow in FLOWS}
    for deployment in deployments.values():
        assert not deployment["pull_steps"]
        assert deployment["entrypoint"].startswith("flows.")
        assert deployment["enforce_parameter_schema"] is True


def test_each_carries_its_preset_expanded(deployments):
    from gsrl_core.config import load

    for name, preset in (("full", "full"), ("one-gpu", "one-gpu"), ("laptop", "laptop")):
        config = deployments[f"real2sim2real/{name}"]["parameters"]["config"]
        assert config == load(preset).model_dump(mode="json")


def test_the_form_is_typed(deployments):
    schema = deployments["real2sim2real/full"]["parameter_openapi_schema"]
    assert set(schema["properties"]) == {"config", "overrides"}
    assert schema["definitions"]["PpoConfig"]["properties"]["learning_rate"]["type"] == "number"
    assert schema["definitions"]["Overrides"]["properties"]["ppo.learning_rate"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"ppo.lr": 1}, "'ppo.lr' was unexpected"),
        ({"ppo": {"learning_rate": 1}}, "'ppo' was unexpected"),
        ({"ppo.learning_rate": -1}, "minimum"),
        ({"ppo.iterations": "many"}, "'many' is not"),
        ({"policy.noise_method": "flow_ode"}, "is not one of"),
    ],
)
def test_a_misspelt_or_impossible_override_is_refused_when_submitted(server, deployments, overrides, reason):
    api, _ = server
    deployment = deployments["real2sim2real/laptop"]
    status, answer = post(
        api, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"overrides": overrides}}
    )
    assert status in (409, 422)
    assert reason in answer


def test_the_prefect_command_says_so_too(server):
    _, environment = server
    text = prefect(environment, "deployment", "run", "real2sim2real/laptop", "-p", 'overrides={"ppo.lr": 1}', code=1)
    assert "'ppo.lr' was unexpected" in text


def test_a_right_override_is_accepted_and_leaves_the_preset_alone(server, deployments):
    api, _ = server
    deployment = deployments["real2sim2real/laptop"]
    given = {"ppo.learning_rate": 1e-5, "policy.sha256": None}
    status, run = post(api, f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"overrides": given}})
    assert status in (200, 201)
    assert run["parameters"]["overrides"] == given
    assert run["parameters"]["config"] == deployment["parameters"]["config"]
