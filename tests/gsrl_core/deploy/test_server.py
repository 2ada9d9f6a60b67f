import http.client
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from deploy_examples import MeanColorPolicy, make_contract
from websockets.sync.client import connect
from websockets.sync.server import serve

from gsrl_core.deploy import wire
from gsrl_core.deploy.client import PolicyClient
from gsrl_core.deploy.server import PolicyServer, is_loopback, parse_address
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import PackageError, WorkerError


def make_request(contract, **changes):
    rng = np.random.default_rng(0)
    request = {
        "observation/image": rng.integers(256, size=contract.camera.shape, dtype=np.uint8),
        "observation/state": np.linspace(0, 1, 9, dtype=np.float32),
        "prompt": "pick up the cube",
        "seed": 7,
    }
    return {key: value for key, value in {**request, **changes}.items() if value is not None}


@contextmanager
def running(policy=None, contract=None, **options):
    contract = contract or make_contract()
    service = PolicyService(policy or MeanColorPolicy(), contract)
    with PolicyServer(service, {"contract": contract.model_dump(mode="json")}, port=0, **options) as server:
        yield server, service, contract


def test_an_answer_over_the_wire_is_the_policys_answer():
    with running() as (server, service, contract), PolicyClient(port=server.port) as client:
        client.check(contract)
        request = make_request(contract)
        answer = client.infer(request)
        np.testing.assert_array_equal(answer["actions"], service.infer(request)["actions"])
        assert answer["actions"].shape == (4, 7)
        assert answer["actions"].dtype == np.float32
        np.testing.assert_array_equal(answer["state"], request["observation/state"])
        assert answer["policy_timing"]["infer_ms"] >= 0
        assert "prev_total_ms" not in answer["server_timing"]
        assert client.infer(request)["server_timing"]["prev_total_ms"] > 0


def test_the_seed_fixes_the_noise_and_its_absence_does_not():
    with running() as (server, _, contract), PolicyClient(port=server.port) as client:
        same = [client.infer(make_request(contract))["actions"] for _ in range(2)]
        other = client.infer(make_request(contract, seed=8))["actions"]
        free = [client.infer(make_request(contract, seed=None))["actions"] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert np.abs(other - same[0]).max() > 1e-4
    assert np.abs(free[0] - free[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"observation/image": None}, r"lacks \['observation/image'\]"),
        ({"observation/image": np.zeros((24, 32, 3), np.float32)}, "must be uint8"),
        ({"observation/image": np.zeros((3, 24, 32), np.uint8)}, r"shape \(24, 32, 3\)"),
        ({"observation/state": np.zeros(8, np.float32)}, r"shape \(9,\)"),
        ({"observation/state": np.full(9, np.nan, np.float32)}, "not finite"),
        ({"prompt": " "}, "not empty"),
        ({"prompt": 3}, "must be a text"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_a_bad_observation_gets_a_clear_error_and_the_server_lives_on(changes, text):
    with running() as (server, _, contract):
        with PolicyClient(port=server.port) as client:
            with pytest.raises(WorkerError, match=text):
                client.infer(make_request(contract, **changes))
            with pytest.raises(WorkerError, match="connection lost"):
                client.infer(make_request(contract))
        with PolicyClient(port=server.port) as client:
            assert client.infer(make_request(contract))["actions"].shape == (4, 7)


def test_errors_are_openpis_text_frame_and_close_code():
    with running() as (server, _, _), connect(f"ws://127.0.0.1:{server.port}", proxy=None) as connection:
        wire.unpack(connection.recv())
        connection.send("hello")
        text = connection.recv()
        assert text.startswith("Traceback")
        assert "binary msgpack" in text
        with pytest.raises(Exception, match="1011"):
            connection.recv(30)


def test_a_policy_that_raises_does_not_take_the_server_down():
    class Faulty(MeanColorPolicy):
        def act(self, observation, generator, *, explore):
            if observation.instruction[0] == "fail":
                raise RuntimeError("out of memory")
            return super().act(observation, generator, explore=explore)

    with running(Faulty()) as (server, _, contract):
        with PolicyClient(port=server.port) as client, pytest.raises(WorkerError, match="out of memory"):
            client.infer(make_request(contract, prompt="fail"))
        with PolicyClient(port=server.port) as client:
            client.infer(make_request(contract))


def test_health_is_answered_while_a_slow_inference_runs():
    policy = Held()
    with running(policy) as (server, _, contract), PolicyClient(port=server.port, timeout=60.0) as client:
        thread = threading.Thread(target=client.infer, args=(make_request(contract, prompt="hold"),))
        thread.start()
        assert policy.busy.wait(30.0)
        health = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        health.request("GET", "/healthz")
        response = health.getresponse()
        assert (response.status, response.read()) == (200, b"OK\n")
        assert thread.is_alive()  # the inference did run meanwhile
        policy.released.set()
        thread.join()


class Held(MeanColorPolicy):
    """Infers until the test lets it end, where the prompt says so."""

    def __init__(self):
        self.busy, self.released = threading.Event(), threading.Event()

    def act(self, observation, generator, *, explore):
        if observation.instruction[0] == "hold":
            self.busy.set()
            self.released.wait(60.0)
        return super().act(observation, generator, explore=explore)


def test_the_client_gives_up_on_a_server_that_does_not_answer():
    policy = Held()
    with running(policy) as (server, _, contract), PolicyClient(port=server.port, timeout=30.0) as client:
        client._timeout = 0.3  # of the answer alone: connecting takes what the machine needs
        with pytest.raises(WorkerError, match=r"no answer within 0\.3 s"):
            client.infer(make_request(contract, prompt="hold"))
        assert not policy.released.is_set()
        policy.released.set()
        # The late answer to that request must never be read as the answer to this one.
        with pytest.raises(WorkerError, match="connection lost"):
            client.infer(make_request(contract))


def test_a_refusal_closes_the_connection():
    # A server that would go on after a refusal.
    def lenient(connection):
        connection.send(wire.pack({}))
        for _ in connection:
            connection.send("refused")

    with scripted(lenient) as port, PolicyClient(port=port, timeout=30.0) as client:
        for text in ("refused the request: refused", "connection lost"):
            with pytest.raises(WorkerError, match=text):
                client.infer({})


@pytest.mark.parametrize(
    ("greeting", "error", "text"),
    [("no", WorkerError, "refused"), (b"\xc1", PackageError, "msgpack"), (None, WorkerError, "no answer within")],
)
def test_a_client_that_cannot_be_made_leaves_no_connection(greeting, error, text):
    left = threading.Event()

    def greet(connection):
        if greeting is not None:
            connection.send(greeting)
        for _ in connection:
            pass
        left.set()

    with scripted(greet) as port:
        with pytest.raises(error, match=text) as raised:
            PolicyClient(port=port, timeout=2.0 if greeting is None else 30.0)
        # While its traceback lives, the client does too: not the garbage collector closed it.
        assert left.wait(30.0)
        del raised


@contextmanager
def scripted(handler):
    with serve(handler, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()


def test_api_key():
    with running(api_key="secret") as (server, _, contract):
        for key in (None, "wrong"):
            with pytest.raises(WorkerError, match="401"):
                PolicyClient(port=server.port, api_key=key)
        with PolicyClient(port=server.port, api_key="secret") as client:
            client.infer(make_request(contract))


def test_browsers_are_turned_away():
    with running() as (server, _, _), pytest.raises(Exception, match="403"):
        connect(f"ws://127.0.0.1:{server.port}", origin="http://evil.example", proxy=None)


def test_an_open_address_needs_a_key_and_a_taken_port_is_named():
    service = PolicyService(MeanColorPolicy(), make_contract())
    with pytest.raises(PackageError, match="GSRL_API_KEY"):
        PolicyServer(service, {}, host="0.0.0.0", port=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PackageError, match=f"127.0.0.1:{port}"):
            PolicyServer(service, {}, port=port)
    with pytest.raises(WorkerError, match="serve"):
        PolicyClient(port=port, timeout=2)


def test_a_server_of_another_contract_is_refused():
    with running() as (server, _, _), PolicyClient(port=server.port) as client:
        with pytest.raises(PackageError, match=r"control_hz: server 10\.0, package 5\.0"):
            client.check(make_contract(control_hz=5))
        with pytest.raises(PackageError, match="horizon"):
            client.check(make_contract(horizon=5))
        with pytest.raises(PackageError, match=r"another package \(manifest None, ours 0123\)"):
            client.check(make_contract(), "0123")
    with pytest.raises(PackageError, match="chunks of"):
        PolicyService(MeanColorPolicy(), make_contract(horizon=5))


def test_addresses_are_read():
    assert parse_address("gpu-box:8000") == ("gpu-box", 8000)
    for text in ("8000", "gpu-box", ":8000", "gpu-box:0", "gpu-box:x"):
        with pytest.raises(PackageError, match="HOST:PORT"):
            parse_address(text)
    assert is_loopback("127.3.2.1")
    assert is_loopback("localhost")
    assert not is_loopback("172.16.0.2")
    assert not is_loopback("robot.example")


OPENPI_CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
assert policy.get_server_metadata()["contract"]["horizon"] == 4
request = {
    "observation/image": np.zeros((24, 32, 3), np.uint8),
    "observation/state": np.zeros(9, np.float32),
    "prompt": "pick up the cube",
    "seed": 7,
}
answer = policy.infer(request)
assert answer["actions"].shape == (4, 7), answer["actions"].shape
assert (answer["actions"] == policy.infer(request)["actions"]).all()
policy.reset()
try:
    policy.infer({"prompt": "no picture"})
except RuntimeError as error:
    assert "lacks ['observation/image'" in str(error), error
else:
    raise SystemExit("a bad request was not refused")
print("independent client ok")
"""


@pytest.mark.slow
def test_openpis_own_client():
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [uv, "run", "--no-project", "--python", "3.12"]
    command += ["--with", "openpi-client==0.1.2", "--with", "typing_extensions", "python"]
    probe = subprocess.run([*command, "-c", "import openpi_client"], capture_output=True, text=True, timeout=300)
    if probe.returncode:
        pytest.skip(f"openpi-client could not be installed: {probe.stderr.strip()[-300:]}")
    with running() as (server, _, _):
        done = subprocess.run(
            [*command, "-c", OPENPI_CLIENT, str(server.port)], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert "independent client ok" in done.stdout
