"""Services end with whoever started them, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from flows import environment, guard
from flows.services import ServiceError, Services, answers, free_port, require_free_port
from gsrl_core.errors import ConfigError

# A parent with a child of its own; both ignore the polite signal when asked to.
FAMILY = """
import signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


def guarded(*command):
    return subprocess.Popen(
        [sys.executable, guard.__file__, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def gone(pids, timeout=15):
    deadline = time.monotonic() + timeout
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("temper", ["polite", "stubborn"])
def test_a_closed_pipe_ends_the_command_and_its_children(temper, monkeypatch):
    process = guarded(sys.executable, "-c", FAMILY, temper)
    family = [int(process.stdout.readline()), *(c.pid for c in psutil.Process(process.pid).children(recursive=True))]
    process.stdin.close()
    process.wait(20)
    assert gone(family)
    process.stdout.close()


def test_sigkill_of_the_starter_ends_the_family():
    starter = """
import subprocess, sys
p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(p.stdout.readline(), end="", flush=True)
p.wait()
"""
    command = [sys.executable, guard.__file__, sys.executable, "-c", FAMILY, "polite"]
    process = subprocess.Popen([sys.executable, "-c", starter, *command], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(family) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(family)
    process.stdout.close()


def test_the_exit_code_is_the_commands():
    process = guarded(sys.executable, "-c", "raise SystemExit(7)")
    assert process.wait(20) == 7
    process.stdin.close()
    process.stdout.close()


def test_a_service_that_ends_is_an_error_with_its_last_words(home):
    services = Services(os.environ)
    services.start("broken", "a_module_that_does_not_exist")
    with pytest.raises(ServiceError, match=r"broken ended with code 1.*a_module_that_does_not_exist"):
        services.wait_for("broken", f"http://127.0.0.1:{free_port()}/")
    services.stop()
    with pytest.raises(ServiceError, match=r"the step failed: .*a_module_that_does_not_exist"):
        services.run("the step", "a_module_that_does_not_exist")


def test_a_service_answers_until_it_is_stopped(home, tmp_path):
    port = free_port()
    services = Services(os.environ)
    services.start("files", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    services.wait_for("files", f"http://127.0.0.1:{port}/")
    with pytest.raises(ConfigError, match=f"port {port}"):
        require_free_port(port, "--port")
    services.check()
    services.stop()
    assert not answers(f"http://127.0.0.1:{port}/")


def test_what_the_user_set_is_left_alone(home, monkeypatch, tmp_path):
    for name in (
        "PREFECT_HOME",
        "MLFLOW_LOGGING_LEVEL",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    environment.prepare(verbose=False)
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "mine")
    assert os.environ["no_proxy"] == "127.0.0.1"
    assert home.is_dir()


def test_a_stale_address_file_is_not_believed(home):
    home.mkdir()
    environment.services_file().write_text(
        json.dumps({"prefect_api": f"http://127.0.0.1:{free_port()}/api", "mlflow": "x"})
    )
    assert environment.running_services() is None
    environment.services_file().write_text("{")
    assert environment.running_services() is None
