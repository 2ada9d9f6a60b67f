"""MANIFEST.sha256 of a package: the digest of every file, in the format of ``sha256sum``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gsrl_core.errors import PackageError

NAME = "MANIFEST.sha256"


def write_manifest(bundle: Path) -> str:
    """Write the digests of all files of ``bundle``; returns the digest of the manifest, which names the package."""
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(_digests(bundle).items()))
    (bundle / NAME).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def check_manifest(bundle: Path) -> str:
    """Compare a package with its manifest; returns the manifest's digest.

    Raises:
        PackageError: no manifest, or files that were altered, are missing or do not belong; each is named.
    """
    path = bundle / NAME
    if not path.is_file():
        raise PackageError(f"{bundle} is not a package: {NAME} is missing; make one with `real2sim2real package`")
    try:
        text = path.read_bytes().decode()
        listed = {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}
    except ValueError as error:
        raise PackageError(
            f"{path} is broken (expected lines of '<sha256>  <name>'); fetch the package again"
        ) from error
    found = _digests(bundle)
    problems = {
        "altered": sorted(name for name in listed.keys() & found.keys() if listed[name] != found[name]),
        "missing": sorted(listed.keys() - found.keys()),
        "not in the manifest": sorted(found.keys() - listed.keys()),
    }
    if any(problems.values()):
        details = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise PackageError(f"package {bundle} does not match its manifest ({details}); fetch or build it again")
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(bundle: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink():
            raise PackageError(f"package {bundle}: {name} is a link; a package holds plain files only")
        if path.is_file() and name != NAME:
            with path.open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
