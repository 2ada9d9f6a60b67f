"""Content-addressed store of what stages produce: folders, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gsrl_core.errors import ArtifactError

JsonScalar = str | int | float | bool | None


class Artifact(BaseModel):
    """A finished folder in the store: the only thing that crosses from one stage to the next."""

    model_config = ConfigDict(frozen=True)

    kind: str
    """What it is: ``capture``, ``scene``, ``checkpoint``, ``training``, ``evaluation``, ``package``."""
    path: Path
    sha256: str
    """Digest of the folder's content (names and bytes), see :func:`digest_folder`."""
    facts: dict[str, JsonScalar] = {}
    """A few numbers or words about it, for tables and gates."""


def gsrl_home() -> Path:
    """Root of everything the project keeps on this machine: ``$GSRL_HOME``, by default ``~/.gsrl``."""
    return Path(os.environ.get("GSRL_HOME", "~/.gsrl")).expanduser()


def digest_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """The sha256 over (relative name, file digest) of all files below ``folder``, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest_file(path)}\n".encode())
    return total.hexdigest()


class Store:
    """Finished artefacts under ``root/objects/<kind>/<sha256>`` and unfinished work under ``root/work/<name>``."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or gsrl_home()

    @contextmanager
    def building(self, kind: str) -> Iterator[Path]:
        """A fresh folder to fill; on success hand it to :meth:`commit`. Left behind by a crash, it is garbage."""
        folder = self.root / "tmp" / f"{kind}-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, kind: str, folder: Path, facts: Mapping[str, JsonScalar]) -> Artifact:
        """Move a filled folder to its content address in one rename and return its Artifact."""
        sha256 = digest_folder(folder)
        target = self.root / "objects" / kind / sha256
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # another process committed the same content first
                    raise
        return Artifact(kind=kind, path=target, sha256=sha256, facts=dict(facts))

    def workspace(self, name: str) -> Path:
        """A folder that survives crashes, for a stage's resumable state; the stage deletes it when it is done."""
        folder = self.root / "work" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def check(self, artifact: Artifact) -> Path:
        """The artefact's path, after its content was found to match its digest.

        Raises:
            ArtifactError: missing or altered.
        """
        if not artifact.path.is_dir():
            raise ArtifactError(f"{artifact.kind} {artifact.sha256[:12]} is gone from {artifact.path}; run again")
        found = digest_folder(artifact.path)
        if found != artifact.sha256:
            raise ArtifactError(
                f"{artifact.kind} at {artifact.path} was altered: expected sha256 {artifact.sha256[:12]}, found "
                f"{found[:12]}; delete the folder and run again"
            )
        return artifact.path


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically (temporary file, then rename)."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically (temporary file, flush to disk, then rename)."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
