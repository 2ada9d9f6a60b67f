"""The openpi websocket protocol, client side (small, with time-outs; used by the control loop)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from gsrl_core.deploy import wire
from gsrl_core.deploy.contract import Contract
from gsrl_core.errors import PackageError, WorkerError


class PolicyClient:
    """One connection to a policy server."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8000, *, api_key: str | None = None, timeout: float = 10.0
    ) -> None:
        """Connect and read the server's metadata; ``timeout`` (s) also holds for every later answer.

        Raises:
            WorkerError: no server, wrong key, or no metadata in time.
            PackageError: the metadata is no msgpack. The connection is closed before either is raised.
        """
        self._address = f"{host}:{port}"
        self._timeout = timeout
        self._lock = threading.Lock()
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        try:
            self._connection = connect(
                f"ws://{self._address}",
                compression=None,
                max_size=wire.MAX_MESSAGE,
                additional_headers=headers,
                open_timeout=timeout,
                # Short: a server that did not answer a request will not answer a farewell either.
                close_timeout=0.2,
                proxy=None,
            )
        except (OSError, WebSocketException) as error:
            raise WorkerError(
                f"policy server {self._address}: {error or type(error).__name__}; start `real2sim2real serve` there"
            ) from error
        with self._closed_on_failure():
            self.metadata: dict[str, Any] = wire.unpack(self._received())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def check(self, contract: Contract, manifest: str | None = None) -> None:
        """Compare the server's contract with ours, and its package by the digest of its manifest if one is given.

        Raises:
            PackageError: they differ; names the fields.
        """
        served = self.metadata.get("contract")
        if not isinstance(served, Mapping):
            raise PackageError(f"policy server {self._address} sends no contract; it does not serve a package of ours")
        mine = contract.model_dump(mode="json")
        different = sorted(key for key in {*mine, *served} if mine.get(key) != served.get(key))
        if different:
            details = "; ".join(f"{key}: server {served.get(key)!r}, package {mine.get(key)!r}" for key in different)
            raise PackageError(f"policy server {self._address} serves another contract ({details}); serve this package")
        other = self.metadata.get("manifest_sha256")
        if manifest is not None and other != manifest:
            raise PackageError(
                f"policy server {self._address} serves another package (manifest {str(other)[:12]}, ours "
                f"{manifest[:12]}); serve this package there"
            )

    def infer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for one chunk.

        Raises:
            WorkerError: the server refused the request (with its own words), died, or did not answer in time.
            PackageError: the request cannot be packed, or the answer is no msgpack. The connection is closed before
                either is raised: a late answer must not be taken for that of the next request.
        """
        with self._lock, self._closed_on_failure():
            try:
                self._connection.send(wire.pack(dict(request)))
            except (OSError, WebSocketException) as error:
                raise self._lost(error) from error
            return wire.unpack(self._received())

    def close(self) -> None:
        """Close the connection; an answer that another thread waits for ends with WorkerError."""
        self._connection.close()

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._connection.close()
            raise

    def _received(self) -> bytes:
        try:
            message = self._connection.recv(self._timeout)
        except TimeoutError as error:
            raise WorkerError(f"policy server {self._address}: no answer within {self._timeout:g} s") from error
        except (OSError, WebSocketException) as error:
            raise self._lost(error) from error
        if isinstance(message, str):
            lines = message.strip().splitlines() or ["unknown error"]
            raise WorkerError(f"policy server {self._address} refused the request: {lines[-1]}")
        return message

    def _lost(self, error: Exception) -> WorkerError:
        return WorkerError(f"policy server {self._address}: connection lost ({error or type(error).__name__})")
