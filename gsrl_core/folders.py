"""Local folders as inputs: what ships with the project, captures, and folders that a user names."""

from __future__ import annotations

import shutil
from pathlib import Path

from gsrl_core.artifacts import Artifact, Store, digest_file, digest_folder, link_or_copy
from gsrl_core.errors import ArtifactError, CaptureError, HubError

BUNDLED = "bundled:"
"""Prefix of references to what ships with the project."""

_IGNORED = {".git", ".gitattributes", ".cache", "__pycache__"}


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
    if source.is_file():
        for file in _video_files(source):
            shutil.copyfile(file, out / file.name)
    else:
        copy_folder(source, out)
    return sum(path.is_file() for path in out.rglob("*"))


def capture_digest(source: Path) -> str:
    """Digest of all that :func:`copy_capture` copies."""
    if source.is_dir():
        return digest_folder(source)
    return " ".join(digest_file(file) for file in _video_files(source))


def _video_files(video: Path) -> list[Path]:
    from gsrl_core.capture.markers import MARKERS_FILE

    return [file for file in (video, video.with_name(MARKERS_FILE)) if file.is_file()]


def import_folder(folder: Path, kind: str, store: Store) -> Artifact:
    """Copy a user's folder into the store as an artefact of ``kind``. Raises ArtifactError when there is none."""
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder} to take the {kind} from")
    with store.building(kind) as out:
        copy_folder(folder, out)
        return store.commit(kind, out, {"reference": str(folder)})


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
