"""Local folders as inputs: what ships with the project, captures, and folders that a user names."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from gsrl_core.artifacts import Artifact, Store, digest_file, digest_folder
from gsrl_core.errors import ArtifactError, CaptureError, HubError

BUNDLED = "bundled:"
"""Prefix of references to what ships with the project."""

_IGNORED = {".git", ".gitattributes", ".cache", "__pycache__"}
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


def bundled_folder(reference: str) -> Path:
    """The folder behind ``bundled:<name>``. Raises HubError with the names that exist."""
    root = Path(__file__).parent / "bundled"
    name = reference.removeprefix(BUNDLED)
    available = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if name not in available:
        raise HubError(f"nothing bundled is called {name!r}; available: {', '.join(available) or 'nothing'}")
    return root / name


def locate_capture(reference: str) -> Path:
    """The folder or video behind ``assets.capture`` (``bundled`` is the tabletop that ships).

    Raises:
        CaptureError: empty reference, no such file, or an empty folder.
    """
    if not reference:  # as a path it would be the current folder
        raise CaptureError("the capture is not named; give a folder of photos, a video file, or 'bundled'")
    source = bundled_folder("capture_tabletop") if reference == "bundled" else Path(reference).expanduser()
    if not source.exists():
        raise CaptureError(f"there is no capture {reference}; give a folder of photos, a video file, or 'bundled'")
    if source.is_dir() and not any(path.is_file() for path in source.rglob("*")):
        raise CaptureError(f"the capture {source} is empty; put photos (JPEG or PNG) into it")
    return source


def copy_capture(source: Path, out: Path) -> int:
    """Copy photos, or one video with the markers.json beside it, into ``out``; returns the number of files."""
    from gsrl_core.capture.markers import MARKERS_FILE

    if source.is_file():
        for file in (source, source.with_name(MARKERS_FILE)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    else:
        copy_folder(source, out)
    return sum(path.is_file() for path in out.rglob("*"))


def import_folder(folder: Path, kind: str, store: Store) -> Artifact:
    """Copy a user's folder into the store as an artefact of ``kind``. Raises ArtifactError when there is none."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder} to take the {kind} from")
    with store.building(kind) as out:
        copy_folder(folder, out)
        return store.commit(kind, out, {"reference": str(folder)})


def digest_path(path: Path) -> str:
    """Digest of a folder's content or of a file."""
    return digest_folder(path) if path.is_dir() else digest_file(path)


def copy_folder(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy all files but those of version control and caches into ``target``.

    ``link`` makes hard links where both lie on one disk (14 GB are not stored twice): only for sources that nobody
    edits in place.
    """
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and not _IGNORED.intersection(relative.parts):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            if link:
                link_or_copy(path.resolve(), target / relative)
            else:
                shutil.copyfile(path, target / relative)


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to the file ``source``, or a copy where that is impossible."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
