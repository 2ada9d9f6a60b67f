"""Fetching through huggingface_hub from a loopback hub: good, wrong, unreachable, interrupted, offline."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.request

import pytest

from gsrl_core import hub, hub_local
from gsrl_core.artifacts import Store, digest_file, digest_folder
from gsrl_core.errors import HubError
from gsrl_core.interfaces import NullReporter

WEIGHTS = os.urandom(3 << 20)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "assets" / "fr3").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "assets" / "fr3" / "norm_stats.json").write_text('{"n": 1}')
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def served(folder, tmp_path, monkeypatch):
    """A hub at $HF_ENDPOINT that has ``lab/model``; huggingface_hub's cache is empty."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()
    with hub_local.serving(folder, "lab/model") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


class Recorder(NullReporter):
    def __init__(self):
        self.fractions = []

    def progress(self, fraction, message):
        self.fractions.append(fraction)


def fetch(reference, store, revision="main", sha256=None, reporter=None):
    return hub.fetch_checkpoint(reference, revision, sha256, store, reporter or NullReporter())


@pytest.fixture
def refused(monkeypatch):
    """HF_ENDPOINT at a port where nothing listens."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_snapshot_arrives_whole_and_checked(served, folder, store):
    reporter = Recorder()
    artifact = fetch("lab/model", store, sha256=digest_file(folder / "model.safetensors").upper(), reporter=reporter)
    assert digest_folder(artifact.path) == digest_folder(folder)
    assert artifact.facts == {"reference": "lab/model", "revision": served.commit}
    assert not any(path.is_symlink() for path in artifact.path.rglob("*"))
    assert reporter.fractions[0] == 0
    assert reporter.fractions[-1] == 1


def test_a_dataset_is_asked_for_below_datasets(served, folder, store):
    artifact = hub.fetch_dataset("lab/model", "main", store, NullReporter())
    assert artifact.kind == "dataset"
    assert digest_folder(artifact.path) == digest_folder(folder)


def test_bundled_comes_through_the_same_code(folder, store, monkeypatch, refused):
    monkeypatch.setattr(hub, "bundled_folder", lambda reference: folder)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = dict(os.environ)
    asked = []
    answer = hub_local._Handler._answer
    monkeypatch.setattr(
        hub_local._Handler, "_answer", lambda self, *, body: (asked.append(self.path), answer(self, body=body))
    )
    artifact = fetch("bundled:model", store)
    assert digest_folder(artifact.path) == digest_folder(folder)
    assert any("/resolve/" in path and path.endswith("model.safetensors") for path in asked)
    assert dict(os.environ) == before
    assert constants.HF_HUB_OFFLINE is True


def test_a_wrong_digest_states_both_and_stores_nothing(served, folder, store):
    wrong = "0" * 64
    with pytest.raises(HubError, match=f"sha256 {digest_file(folder / 'model.safetensors')}.*{wrong}"):
        fetch("lab/model", store, sha256=wrong)
    assert not (store.root / "objects").exists()


def test_bundled_weights_can_be_pinned_too(folder, store, monkeypatch):
    monkeypatch.setattr(hub, "bundled_folder", lambda reference: folder)
    right = digest_file(folder / "model.safetensors")
    assert fetch("bundled:model", store, sha256=right).sha256 == digest_folder(folder)
    with pytest.raises(HubError, match=r"model\.safetensors of bundled:model .* but policy\.sha256 says 000"):
        fetch("bundled:model", store, sha256="0" * 64)


def test_a_digest_without_weights_is_an_error(folder, store):
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match=r"has no model\.safetensors"):
        fetch(str(folder), store, sha256="0" * 64)


def test_a_folder_is_copied_without_version_control(folder, store):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    artifact = fetch(str(folder), store)
    assert not (artifact.path / ".git").exists()
    (folder / "config.json").write_text("changed")  # the user's file and ours are not the same file
    assert store.check(artifact)


@pytest.mark.parametrize("revision", ["main", "a" * 40])
def test_an_unreachable_hub_fails_fast_with_the_endpoint_and_advice(store, refused, revision, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    start = time.monotonic()
    with pytest.raises(hub.UnreachableHubError, match=r"http://127\.0\.0\.1:9.*HF_ENDPOINT to a mirror"):
        fetch("lab/model", store, revision)
    assert time.monotonic() - start < 10
    assert not (store.root / "objects").exists()


def test_a_fetched_snapshot_is_found_when_the_hub_is_gone(served, store, monkeypatch, caplog):
    first = fetch("lab/model", store)
    assert not caplog.records
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.resolve("lab/model", "main", store).identity == served.commit
    assert f"'main' is taken to be commit {served.commit}, as seen last" in caplog.text
    assert fetch("lab/model", Store(store.root)) == first
    assert fetch("lab/model", store, served.commit).sha256 == first.sha256


def test_unknown_repository_and_revision(served, store):
    with pytest.raises(HubError, match="there is no lab/other"):
        fetch("lab/other", store)
    with pytest.raises(HubError, match="has no revision 'v9'"):
        fetch("lab/model", store, "v9")


@pytest.mark.parametrize("reference", ["nope", "./nope", "/nope", "a/b/c", "lab/mo del", ""])
def test_a_reference_that_is_nothing(reference, store):
    with pytest.raises(HubError):
        fetch(reference, store)


def test_a_connection_that_drops_is_resumed_where_it_broke(served, folder, store, monkeypatch):
    """The first answer stops after one MiB; huggingface_hub asks for the rest with a byte range."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 18)  # what it keeps of a broken transfer: whole chunks
    ranges = []
    send = hub_local._Handler._send

    def broken(handler, path, start, end):
        if path.name == "model.safetensors":
            ranges.append(handler.headers.get("Range"))
            if len(ranges) == 1:
                handler.wfile.write(WEIGHTS[: 1 << 20])
                handler.wfile.flush()
                handler.connection.shutdown(2)
                handler.close_connection = True
                return
        send(handler, path, start, end)

    monkeypatch.setattr(hub_local._Handler, "_send", broken)
    artifact = fetch("lab/model", store)
    assert (artifact.path / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges[0] is None
    assert ranges[1] is not None
    resumed_at = int(ranges[1].removeprefix("bytes=").rstrip("-"))
    assert 0 < resumed_at <= 1 << 20


def test_a_download_that_breaks_off_for_good_keeps_finished_files_and_can_be_repeated(
    served, folder, store, monkeypatch
):
    import huggingface_hub.file_download

    send = hub_local._Handler._send
    asked = []

    def broken(handler, path, start, end):
        asked.append(path.name)
        if path.name == "model.safetensors":
            handler.connection.shutdown(2)
            handler.close_connection = True
            return
        send(handler, path, start, end)

    monkeypatch.setattr(hub_local._Handler, "_send", broken)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    with pytest.raises(hub.InterruptedDownloadError, match="finished files are kept"):
        fetch("lab/model", store)
    assert not (store.root / "objects").exists()
    monkeypatch.setattr(hub_local._Handler, "_send", lambda h, p, s, e: (asked.append(p.name), send(h, p, s, e)))
    asked.clear()
    artifact = fetch("lab/model", store)
    assert digest_folder(artifact.path) == digest_folder(folder)
    assert "config.json" not in asked


def test_the_stand_in_answers_ranges_as_http_says(served):
    def get(path, **headers):
        request = urllib.request.Request(served.endpoint + path, headers=headers)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    path = f"/lab/model/resolve/{served.commit}/model.safetensors"
    assert get(path)[1] == WEIGHTS
    status, body, headers = get(path, Range="bytes=10-19")
    assert (status, body, headers["Content-Range"]) == (206, WEIGHTS[10:20], f"bytes 10-19/{len(WEIGHTS)}")
    assert get(path, Range=f"bytes={len(WEIGHTS) - 3}-")[1] == WEIGHTS[-3:]
    assert get(path, Range=f"bytes={len(WEIGHTS)}-")[0] == 416
    assert get("/lab/model/resolve/main/../../etc/passwd")[0] == 404
    assert get("/lab/model/resolve/main/%2e%2e/%2e%2e/etc/passwd")[0] == 404
    assert get("/nothing")[0] == 404
    assert json.loads(get("/api/models/lab/model/revision/main")[1])["sha"] == served.commit
    connection = http.client.HTTPConnection("127.0.0.1", served.server_address[1])
    connection.request("HEAD", path)
    response = connection.getresponse()
    assert (response.getheader("ETag"), response.getheader("X-Repo-Commit")) == (
        f'"{served.digests["model.safetensors"]}"',
        served.commit,
    )
    connection.close()
