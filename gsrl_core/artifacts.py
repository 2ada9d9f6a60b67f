"""Content-addressed store of what stages produce: folders, written whole or not at all, checked when read.

Layout below the root (``$GSRL_HOME``)::

    objects/<kind>/<sha256>/      finished folders, never changed again
    stages/<stage>/<key>.json     which finished folder a stage made from which inputs (the cache)
    work/<stage>-<key>/           a stage's resumable state, kept over crashes, removed when the stage is done
    tmp/<kind>-<id>/content/      a folder being filled; <kind>-<id>.lock is held by its living owner
    locks/                        advisory locks (flock), released by the kernel when their holder dies
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from gsrl_core.errors import ArtifactError, GsrlError

JsonScalar = str | int | float | bool | None

_ABANDONED_S = 30 * 24 * 3600.0
_LARGER_STORE = "set GSRL_HOME to a folder on a larger disk"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that write files themselves lose the error number: safetensors keeps it in its text (Rust); torch says that
# its archive or stream is not where it should be, numpy that a write was cut short.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
_PLENTY = 1 << 30
"""With more bytes free than this, a text alone is not believed to mean a full disk."""
_FULL_TEXTS = re.compile(
    rf"\(os error ({'|'.join(map(str, _FULL))})\)|PytorchStreamWriter failed|inline_container\.cc.* unexpected pos"
    r"|iostream error|\d+ requested and \d+ written"
)


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
    return Path(os.environ.get("GSRL_HOME") or "~/.gsrl").expanduser().absolute()


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
    """Finished artefacts, the index of stages that made them, and unfinished work (layout: module docstring)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or gsrl_home()

    def full_disk_is_an_error(self) -> AbstractContextManager[None]:
        """As :func:`full_disk_is_an_error`, with advice that fits a store."""
        return full_disk_is_an_error(self.root, _LARGER_STORE)

    @contextmanager
    def building(self, kind: str) -> Iterator[Path]:
        """A fresh folder to fill; on success hand it to :meth:`commit`. Left behind by a crash, it is garbage.

        Raises:
            ArtifactError: the disk is full (also when the code that fills the folder meets it).
        """
        folder = self.root / "tmp" / f"{kind}-{uuid.uuid4().hex}"
        owner = folder.with_suffix(".lock")
        with self.full_disk_is_an_error():
            with self.locked("tmp"):  # nobody collects between the creation of the lock and its flock
                content = folder / "content"  # one level down: builders may keep scratch files beside their output
                content.mkdir(parents=True)
                stream = owner.open("w")
                fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                yield content
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                owner.unlink(missing_ok=True)
                stream.close()

    def commit(self, kind: str, folder: Path, facts: Mapping[str, JsonScalar]) -> Artifact:
        """Move a filled folder to its content address in one rename and return its Artifact.

        Raises:
            ArtifactError: the disk is full.
        """
        sha256 = digest_folder(folder)
        target = self.root / "objects" / kind / sha256
        with self.full_disk_is_an_error():
            if target.is_dir() and digest_folder(target) != sha256:  # damaged since: replace it, do not trust it
                self.discard(target)
            if not target.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                _sync(folder)
                try:
                    folder.rename(target)
                except OSError:
                    if not target.is_dir():  # another process committed the same content first
                        raise
                _sync_entry(target.parent)
        return Artifact(kind=kind, path=target, sha256=sha256, facts=dict(facts))

    def workspace(self, name: str) -> Path:
        """A folder that survives crashes, for a stage's resumable state; the stage deletes it when it is done."""
        folder = self.root / "work" / name
        with self.full_disk_is_an_error():
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

    def discard(self, folder: Path) -> None:
        """Remove a finished folder so that no reader sees it half-removed (rename out of the way first)."""
        grave = self.root / "tmp" / f"discarded-{uuid.uuid4().hex}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)

    def record(self, stage: str, key: str, artifact: Artifact) -> None:
        """Remember that ``stage`` with inputs ``key`` made ``artifact``; the last of concurrent writers wins whole."""
        entry = {"kind": artifact.kind, "sha256": artifact.sha256, "facts": artifact.facts}
        with self.full_disk_is_an_error():
            path = self._entry(stage, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, entry)

    def recall(self, stage: str, key: str) -> Artifact | None:
        """What ``stage`` made from ``key``, verified byte for byte; None when it has to be made (again).

        An entry whose folder is gone or altered is not used: entry and folder are removed so that the stage is redone.
        """
        path = self._entry(stage, key)
        try:
            entry = json.loads(path.read_text())
            target = self.root / "objects" / entry["kind"] / entry["sha256"]
            artifact = Artifact(path=target, **entry)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            path.unlink(missing_ok=True)
            return None
        try:
            self.check(artifact)
        except ArtifactError:
            path.unlink(missing_ok=True)
            if artifact.path.is_dir():
                self.discard(artifact.path)
            return None
        return artifact

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the advisory lock ``name``; waits for a living holder. The kernel frees it when the holder dies."""
        path = self.root / "locks" / f"{name}.lock"
        with self.full_disk_is_an_error():
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("w")
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def collect_garbage(self) -> list[Path]:
        """Remove folders in ``tmp`` whose owner died, and workspaces that nobody came back to for a month.

        Living owners are left alone. Returns what was removed.
        """
        removed = self._abandoned_workspaces()
        with self.locked("tmp"):
            for folder in sorted((self.root / "tmp").glob("*")):
                if folder.is_dir() and not _is_owned(folder.with_suffix(".lock")):
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
            for lock in (self.root / "tmp").glob("*.lock"):
                if not lock.with_suffix("").exists():
                    lock.unlink(missing_ok=True)
        return removed

    def _abandoned_workspaces(self) -> list[Path]:
        removed = []
        for folder in sorted((self.root / "work").glob("*")):
            if time.time() - _last_change(folder) > _ABANDONED_S and not _is_owned(
                self.root / "locks" / f"{folder.name}.lock"
            ):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        return removed

    def require_space(self, needed: int) -> None:
        """Raise ArtifactError unless ``needed`` bytes [B] are free below the root (creates the root)."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot create the store {self.root} ({error.strerror}); set GSRL_HOME to a folder you can write to"
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise ArtifactError(f"the store {self.root} is not writable; set GSRL_HOME to a folder you can write to")
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise ArtifactError(
                _full_disk_message(self.root, f"at least {needed / 2**20:.0f} MiB are needed", _LARGER_STORE)
            )

    def _entry(self, stage: str, key: str) -> Path:
        return self.root / "stages" / stage / f"{key}.json"


def _last_change(folder: Path) -> float:
    """Newest modification time [s] below ``folder``, whose owner may be adding and removing files meanwhile."""
    newest = 0.0
    for parent, folders, files in os.walk(folder):
        for name in ("", *folders, *files):
            with suppress(FileNotFoundError):
                newest = max(newest, Path(parent, name).lstat().st_mtime)
    return newest


@contextmanager
def full_disk_is_an_error(folder: Path, otherwise: str = "choose a folder on a larger disk") -> Iterator[None]:
    """Turn "no space left" (also quota and file size limits) into an ArtifactError that says what to do.

    Args:
        folder: where the block writes; it need not exist yet.
        otherwise: what to do if no space can be freed.

    Raises:
        ArtifactError: a write did not fit, whichever library made it.
    """
    try:
        yield
    except GsrlError:
        raise
    except Exception as error:
        if (why := _full_disk_reason(error, folder)) is None:
            raise
        raise ArtifactError(_full_disk_message(folder, f"writing failed: {why}", otherwise)) from error


def _full_disk_reason(error: BaseException, folder: Path) -> str | None:
    """What the system said if ``error``, or what it was raised from, is a write that did not fit; else None."""
    chain = list(_chain(error))
    numbered = [cause for cause in chain if isinstance(cause, OSError) and cause.errno is not None]
    if numbered:  # a number is certain, texts are not
        return next((cause.strerror for cause in numbered if cause.errno in _FULL), None)
    if _free(folder) > _PLENTY and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY:
        return None
    return next((str(cause) for cause in chain if _FULL_TEXTS.search(str(cause))), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


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


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to the file ``source``, or a copy where that is impossible."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def _full_disk_message(folder: Path, what: str, otherwise: str) -> str:
    return (
        f"the disk of {folder} is full ({what}; {_free(folder) / 2**20:.0f} MiB free); nothing half-written was kept: "
        f"free some space, or {otherwise}, and run again"
    )


def _free(folder: Path) -> int:
    """Bytes that are free where ``folder`` is or would be."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _is_owned(lock: Path) -> bool:
    try:
        with lock.open("r") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _sync(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
