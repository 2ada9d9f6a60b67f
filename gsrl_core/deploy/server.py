"""The openpi websocket protocol, server side.

A connection gets one metadata frame, then one answer per request, all msgpack with numpy arrays. What a request does
wrong is answered with a traceback as a text frame and close code 1011; the server lives on. GET /healthz answers OK.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
import time
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from gsrl_core.deploy import wire
from gsrl_core.deploy.service import PolicyService
from gsrl_core.errors import PackageError

_log = logging.getLogger(__name__)
_INTERNAL_ERROR = 1011


class PolicyServer:
    """Serves one policy; each connection has its thread, requests are answered one at a time.

    Inference therefore never blocks keep-alive pings or health checks. The policy is warmed up before the port opens.
    """

    def __init__(
        self,
        service: PolicyService,
        metadata: Mapping[str, Any],
        host: str = "127.0.0.1",
        port: int = 8000,
        api_key: str | None = None,
    ) -> None:
        """Open the port (0 takes a free one).

        Raises:
            PackageError: the port is taken, or the address is reachable by others and there is no API key.
        """
        if not api_key and not is_loopback(host):
            raise PackageError(
                f"{host} is reachable from other machines: set GSRL_API_KEY, or serve on 127.0.0.1 through a tunnel"
            )
        self._service = service
        self._metadata = wire.pack(dict(metadata))
        self._api_key = api_key
        self._lock = threading.Lock()
        self._connections: set[ServerConnection] = set()
        self.warm_up_ms = service.warm_up()
        try:
            # Browsers send an Origin header; no robot client does.
            self._server = serve(
                self._converse,
                host,
                port,
                compression=None,
                max_size=wire.MAX_MESSAGE,
                origins=[None],
                process_request=self._before_handshake,
            )
        except OSError as error:
            raise PackageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
        self.host = host
        self.port: int = self._server.socket.getsockname()[1]
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, name="policy-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.shutdown()
        if self._thread is not None:
            self._thread.join(10)

    def serve_forever(self) -> None:
        """Answer until :meth:`shutdown` is called from another thread."""
        self._server.serve_forever()

    def shutdown(self) -> None:
        """Close the port and all connections."""
        self._server.shutdown()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close_socket()

    def _before_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "")
        if self._api_key and not hmac.compare_digest(given.encode(), f"Api-Key {self._api_key}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "Authorization: Api-Key <key> is missing or wrong\n")
        return None

    def _converse(self, connection: ServerConnection) -> None:
        previous_ms: float | None = None
        with self._lock:
            self._connections.add(connection)
        try:
            connection.send(self._metadata)
            for message in connection:
                started = time.perf_counter()
                try:
                    answer = self._answer(message)
                except Exception as error:
                    _log.warning("request refused: %s", error)
                    connection.send(traceback.format_exc())
                    connection.close(_INTERNAL_ERROR, "the request failed; see the text frame before this")
                    return
                answer["server_timing"] = {"infer_ms": 1000.0 * (time.perf_counter() - started)}
                if previous_ms is not None:
                    answer["server_timing"]["prev_total_ms"] = previous_ms
                connection.send(wire.pack(answer))
                previous_ms = 1000.0 * (time.perf_counter() - started)
        except ConnectionClosed:
            _log.info("client left")
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, str):
            raise PackageError("a request is one binary msgpack frame, this was a text frame")
        return self._service.infer(wire.unpack(message))


def is_loopback(host: str) -> bool:
    """Whether an address reaches only this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises PackageError when it is not one."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise PackageError(f"{text!r} is not HOST:PORT; for example 192.168.1.5:8000")
    return host, int(port)
