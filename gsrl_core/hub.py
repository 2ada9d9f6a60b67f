"""Fetch checkpoints and asset sets: from the Hugging Face hub or a mirror, a folder, or what ships with the project."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from gsrl_core import hub_local
from gsrl_core.artifacts import Artifact, Store, digest_file, digest_folder
from gsrl_core.errors import HubError
from gsrl_core.folders import BUNDLED, bundled_folder, copy_folder

if TYPE_CHECKING:  # interfaces imports torch, which fetching does not need
    from gsrl_core.interfaces import Reporter

RepoType = Literal["model", "dataset"]

_log = logging.getLogger(__name__)
_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class InterruptedDownloadError(HubError):
    """A download broke off after it had begun: worth trying again, finished files are kept."""


class UnreachableHubError(HubError):
    """No answer from the hub (network down, offline mode, wrong mirror)."""


class Source(NamedTuple):
    """Where a reference leads, with the identity of its content as far as known before any transfer."""

    reference: str
    kind: Literal["bundled", "folder", "hub"]
    identity: str
    """Digest of the folder, or the commit on the hub."""


def endpoint() -> str:
    """The hub in use: ``$HF_ENDPOINT`` (a mirror), by default https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def resolve(reference: str, revision: str, store: Store, repo_type: RepoType = "model") -> Source:
    """Find out what ``reference`` means now, without transferring it: the key under which a fetch is cached.

    A branch or tag is looked up on the hub; when that is unreachable, the commit seen last on this machine counts.

    Raises:
        HubError: empty or malformed reference, unknown bundled name, folder, repository or revision, or an
            unreachable hub with nothing cached.
    """
    if not reference:  # as a path it would be the current folder
        raise HubError("the reference is empty; give a folder, a hub id (owner/name) or bundled:<name>")
    if reference.startswith(BUNDLED):
        return Source(reference, "bundled", digest_folder(bundled_folder(reference)))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Source(reference, "folder", digest_folder(folder))
    if folder.is_absolute() or reference.startswith((".", "~")):
        raise HubError(f"there is no folder {reference}; give a folder, a hub id (owner/name) or bundled:<name>")
    if not _REPO_ID.match(reference):
        raise HubError(f"{reference!r} is neither a folder, nor a hub id (owner/name), nor bundled:<name>")
    if _COMMIT.match(revision):
        return Source(reference, "hub", revision)
    return Source(reference, "hub", _latest_commit(reference, revision, store, repo_type))


def fetch_checkpoint(reference: str, revision: str, sha256: str | None, store: Store, reporter: Reporter) -> Artifact:
    """Bring a policy checkpoint into the store.

    Args:
        reference: hub model id, folder, or ``bundled:<name>`` (served on loopback and fetched as from the hub).
        revision: commit, tag or branch on the hub.
        sha256: expected digest of ``model.safetensors``, as hex; None accepts any.
        store: receives the checkpoint.
        reporter: told the fraction of files that arrived.

    Raises:
        HubError: unreachable, unknown, incomplete, or ``model.safetensors`` has another digest.
    """
    source = resolve(reference, revision, store)
    return _fetch(source, "checkpoint", "model", sha256, store, reporter)


def fetch_dataset(reference: str, revision: str, store: Store, reporter: Reporter) -> Artifact:
    """Bring an asset set (a hub data set, folder or ``bundled:<name>``) into the store. Raises HubError."""
    source = resolve(reference, revision, store, "dataset")
    return _fetch(source, "dataset", "dataset", None, store, reporter)


def fetch_into(
    source: Source, out: Path, repo_type: RepoType, sha256: str | None, store: Store, reporter: Reporter
) -> dict[str, str]:
    """Fill ``out`` with what :func:`resolve` found and return where it came from (facts). Raises HubError."""
    reporter.progress(0.0, f"fetching {source.reference}")
    if source.kind == "folder":
        copy_folder(Path(source.reference).expanduser(), out)
    else:
        copy_folder(_snapshot(source, repo_type, store, reporter), out, link=True)
    if sha256 is not None:
        _check_weights(out / "model.safetensors", sha256, source)
    reporter.progress(1.0, f"fetched {source.reference}")
    return {"reference": source.reference, "revision": source.identity}


def _fetch(
    source: Source, kind: str, repo_type: RepoType, sha256: str | None, store: Store, reporter: Reporter
) -> Artifact:
    with store.building(kind) as folder:
        facts = fetch_into(source, folder, repo_type, sha256, store, reporter)
        return store.commit(kind, folder, facts)


def _snapshot(source: Source, repo_type: RepoType, store: Store, reporter: Reporter) -> Path:
    if source.kind == "hub":
        # None is huggingface_hub's own cache: what was downloaded before (``hf download``) is used.
        return _download(source.reference, source.identity, repo_type, endpoint(), None, reporter)
    folder = bundled_folder(source.reference)
    with _loopback_reachable(), hub_local.serving(folder, f"bundled/{folder.name}") as hub:
        return _download(hub.repo_id, hub.commit, repo_type, hub.endpoint, store.root / "hub", reporter)


def _download(
    repo_id: str, commit: str, repo_type: RepoType, from_endpoint: str, cache: Path | None, reporter: Reporter
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    download = functools.partial(
        snapshot_download, repo_id, repo_type=repo_type, revision=commit, endpoint=from_endpoint, cache_dir=cache
    )
    try:
        return Path(download(local_files_only=True))  # complete in the cache: no network is touched
    except LocalEntryNotFoundError:
        pass
    with _hub_errors(repo_id, commit, from_endpoint, begun=False):
        HfApi(endpoint=from_endpoint).repo_info(repo_id, repo_type=repo_type, revision=commit, timeout=_TIMEOUT_S)
    with _hub_errors(repo_id, commit, from_endpoint, begun=True):
        return Path(download(etag_timeout=_TIMEOUT_S, tqdm_class=_bar_for(reporter, repo_id)))


def _latest_commit(repo_id: str, revision: str, store: Store, repo_type: RepoType) -> str:
    """The commit that a branch or tag points to; remembered for the times when the hub cannot be reached."""
    from huggingface_hub import HfApi

    memory = (
        store.root / "hub" / "commits" / f"{repo_type}--{repo_id.replace('/', '--')}--{revision.replace('/', '--')}"
    )
    try:
        with _hub_errors(repo_id, revision, endpoint(), begun=False):
            info = HfApi(endpoint=endpoint()).repo_info(
                repo_id, repo_type=repo_type, revision=revision, timeout=_TIMEOUT_S
            )
    except UnreachableHubError:
        if not memory.is_file():
            raise
        commit = memory.read_text().strip()
        _log.warning(
            "%s does not answer: %s at %r is taken to be commit %s, as seen last; give a commit as revision to pin it",
            endpoint(), repo_id, revision, commit,
        )  # fmt: skip
        return commit
    if info.sha is None:
        raise HubError(f"{endpoint()} did not name a commit for {repo_id} at {revision!r}; is it a hub mirror?")
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
    temporary.write_text(info.sha)
    temporary.replace(memory)
    return info.sha


@contextmanager
def _hub_errors(repo_id: str, revision: str, from_endpoint: str, *, begun: bool) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    advice = (
        "check the network, set HF_ENDPOINT to a mirror you can reach, or download it elsewhere and give the folder "
        "(for a run without network: --set policy.checkpoint=bundled:pi05_tiny)"
    )
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{repo_id} on {from_endpoint} is gated: accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"there is no {repo_id} on {from_endpoint} (or it is private: set HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id} on {from_endpoint} has no revision {revision!r}; give a commit, tag or branch"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UnreachableHubError(
            f"{repo_id} is not on this machine and HF_HUB_OFFLINE forbids to fetch it; unset it, or {advice}"
        ) from error
    except (httpx.TransportError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        if begun:
            raise InterruptedDownloadError(
                f"the download of {repo_id} from {from_endpoint} broke off ({error}); run again, finished files are "
                f"kept; otherwise {advice}"
            ) from error
        raise UnreachableHubError(f"cannot fetch {repo_id} from the hub {from_endpoint} ({error}); {advice}") from error
    except OSError as error:
        if error.errno is not None:  # a full disk is not the hub's fault
            raise
        # huggingface_hub's consistency check: fewer bytes than announced.
        raise InterruptedDownloadError(f"the download of {repo_id} is incomplete ({error}); run again") from error


@contextmanager
def _loopback_reachable() -> Iterator[None]:
    """Let hub requests to 127.0.0.1 through although a proxy is configured or the user asked for offline mode."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    offline, no_proxy = constants.HF_HUB_OFFLINE, os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    # Offline mode forbids traffic that leaves the machine; this does not.
    constants.HF_HUB_OFFLINE = False
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [no_proxy, "127.0.0.1"]))
    close_session()  # proxies are read when the session is made
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        close_session()


def _check_weights(weights: Path, expected: str, source: Source) -> None:
    if not weights.is_file():
        raise HubError(f"{source.reference} has no model.safetensors, so its sha256 {expected} cannot be checked")
    found = digest_file(weights)
    if found != expected.lower():
        raise HubError(
            f"model.safetensors of {source.reference} (revision {source.identity[:12]}) has sha256 {found}, but "
            f"policy.sha256 says {expected}: it changed upstream or was damaged; compare with the publisher's digest"
        )


@functools.cache
def _quiet_bar() -> type:
    from tqdm.std import tqdm

    class QuietBar(tqdm):
        """A tqdm that draws nothing."""

        def display(self, *_: object, **__: object) -> bool:
            return True

    return QuietBar


def _bar_for(reporter: Reporter, name: str) -> type:
    """A tqdm class, as huggingface_hub wants one, that reports the fraction of bytes to ``reporter``."""
    quiet = _quiet_bar()

    class ReporterBar(quiet):
        """Forwards byte counts."""

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B" and self.total:
                reporter.progress(min(self.n / self.total, 1.0), f"fetching {name}")
            return shown

    return ReporterBar
