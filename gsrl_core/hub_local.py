"""A loopback server that speaks the Hugging Face hub's HTTP interface for one folder.

What ships with the project is fetched through it, so that a laptop without network runs the same
``snapshot_download`` as a machine that talks to huggingface.co or a mirror. Served: revision look-up
(``/api/models/<id>/revision/<rev>``), tree listing (``/api/models/<id>/tree/<rev>``) and files
(``/<id>/resolve/<rev>/<path>``, HEAD and GET, ETag, commit and byte ranges); for data sets below ``/datasets``.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gsrl_core.artifacts import digest_file, digest_folder

_API = re.compile(r"^/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/]+)/?$")
_FILE = re.compile(r"^/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
_RANGE = re.compile(r"^bytes=(\d+)-(\d*)$")


class FolderHub(ThreadingHTTPServer):
    """Serves ``folder`` as repository ``repo_id``; its one commit is derived from the folder's content."""

    daemon_threads = True

    def __init__(self, folder: Path, repo_id: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.repo_id = repo_id
        self.commit = digest_folder(folder)[:40]
        self.digests = {
            path.relative_to(folder).as_posix(): digest_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    @property
    def endpoint(self) -> str:
        """What to give as hub endpoint (as HF_ENDPOINT would)."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path, repo_id: str) -> Iterator[FolderHub]:
    """Serve ``folder`` on a free loopback port for the duration of the block."""
    hub = FolderHub(folder, repo_id)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: requests to ourselves are not news."""

    def _answer(self, *, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if match := _API.match(path):
            if self._known(match, body=body):
                self._json(self._info() if match["what"] == "revision" else self._tree(), body=body)
        elif match := _FILE.match(path):
            if self._known(match, body=body):
                self._file(match["path"], body=body)
        else:
            self._refuse("EntryNotFound", f"no such route: {path}", body=body)

    def _known(self, match: re.Match[str], *, body: bool) -> bool:
        if match["repo"] != self.server.repo_id:
            self._refuse("RepoNotFound", f"no repository {match['repo']}", body=body)
        elif match["revision"] not in ("main", self.server.commit):
            self._refuse("RevisionNotFound", f"no revision {match['revision']}", body=body)
        else:
            return True
        return False

    def _info(self) -> dict[str, object]:
        files = [{"rfilename": name} for name in self.server.digests]
        return {"id": self.server.repo_id, "sha": self.server.commit, "private": False, "siblings": files}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": (self.server.folder / name).stat().st_size, "oid": digest}
            for name, digest in self.server.digests.items()
        ]

    def _json(self, value: object, *, body: bool) -> None:
        content = json.dumps(value).encode()
        self._head(HTTPStatus.OK, len(content), {"Content-Type": "application/json"})
        if body:
            self.wfile.write(content)

    def _file(self, name: str, *, body: bool) -> None:
        if name not in self.server.digests:
            self._refuse("EntryNotFound", f"no file {name}", body=body)
            return
        size = (self.server.folder / name).stat().st_size
        headers = {"ETag": f'"{self.server.digests[name]}"', "Accept-Ranges": "bytes"}
        start, end, status = 0, size, HTTPStatus.OK
        if match := _RANGE.match(self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            status = HTTPStatus.PARTIAL_CONTENT
            if start >= end:
                self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, {"Content-Range": f"bytes */{size}"})
                return
        self._head(status, end - start, headers)
        if body:
            self._send(self.server.folder / name, start, end)

    def _send(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as stream:
            stream.seek(start)
            remaining = end - start
            while remaining and (chunk := stream.read(min(remaining, 1 << 20))):
                self.wfile.write(chunk)
                remaining -= len(chunk)

    def _refuse(self, code: str, message: str, *, body: bool) -> None:
        content = json.dumps({"error": message}).encode()
        self._head(HTTPStatus.NOT_FOUND, len(content), {"X-Error-Code": code, "X-Error-Message": message})
        if body:
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "X-Repo-Commit": self.server.commit}.items():
            self.send_header(name, value)
        self.end_headers()
