"""What all tasks share: retries of downloads, slots of GPUs, and the key under which a stage's result is cached.

One cache: the store's stage index (``gsrl_core.artifacts``). Prefect's own result cache stays off, because a hit must
mean that the artefact's bytes are on disk and unaltered, also after SIGKILL in the middle of writing; a hit is shown
to Prefect as the task state ``Cached``.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import State
from prefect.tasks import Task

import gsrl_core
from gsrl_core.artifacts import digest_file
from gsrl_core.config import section_digest
from gsrl_core.hub import InterruptedDownloadError
from gsrl_core.sections import PipelineConfig, SimConfig

STAGE: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False, "retries": 0}
"""Options of every task: a stage that failed is deterministic, trying again without a change does not help. (The one
that is not, the robot's episode in real time, is tried again inside the verification.)"""

GPU_LIMIT = "gpu"
"""Name of the global concurrency limit whose slots are this host's GPUs."""

_ROOT = Path(gsrl_core.__file__).parent
_MODULE_NAME = re.compile(r"^gsrl_core(\.\w+)+$")
# Values are keyed by section; the rest of these cannot change what a stage computes.
_NOT_CODE = {"gsrl_core.config", "gsrl_core.sections", "gsrl_core.errors", "gsrl_core.artifacts"}

_PACKAGES = {
    "PIL": "pillow", "av": "av", "cv2": "opencv-python", "franky": "franky-control", "franky_sim": "franky-sim",
    "gsplat": "gsplat", "mani_skill": "mani_skill", "numba": "numba", "numpy": "numpy", "pinocchio": "pin",
    "pycolmap": "pycolmap", "ruckig": "ruckig", "sapien": "sapien", "scipy": "scipy", "sentencepiece": "sentencepiece",
    "torch": "torch", "transformers": "transformers", "trimesh": "trimesh",
}  # fmt: skip
"""Import name -> distribution, of the packages whose version can change a result."""


def _broke_off(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Try again only when a transfer broke off: a wrong digest or an unknown name stays wrong."""
    return isinstance(state.result(raise_on_failure=False), InterruptedDownloadError)


FETCH: dict[str, Any] = {**STAGE, "retries": 2, "retry_delay_seconds": [2, 10], "retry_condition_fn": _broke_off}
"""Options of tasks that download."""


def stage_key(
    stage: str,
    inputs: Mapping[str, str],
    config: PipelineConfig,
    sections: Iterable[str],
    modules: Iterable[str],
    body: Callable[..., Any] | None = None,
) -> str:
    """The cache key of a stage as 32 hex digits: what it works on, and what works.

    Args:
        stage: its name.
        inputs: digests by name.
        config: the whole configuration.
        sections: names of those that count; with ``sim`` also the code and the files of its task.
        modules: drivers; they count with all that they import and with the versions of the packages they use.
        body: the task's own part; the file that defines it counts.
    """
    parts = [
        stage,
        *(f"{name}={value}" for name, value in sorted(inputs.items())),
        *(f"{name}:{section_digest(getattr(config, name))}" for name in sorted(sections)),
        *([f"task@{task_version(config.sim)}"] if "sim" in set(sections) else []),
        *(f"{module}@{code_version(module)}" for module in sorted(modules)),
        *([f"body@{_file_version(body.__module__)}"] if body else []),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def restricted(config: PipelineConfig, sections: Iterable[str]) -> PipelineConfig:
    """``config`` with every section outside ``sections`` at its defaults: a stage cannot read what its key omits."""
    return PipelineConfig.model_construct(
        **{
            name: getattr(config, name) if name in set(sections) else field.default
            for name, field in PipelineConfig.model_fields.items()
        }
    )


@cache
def code_version(module: str) -> str:
    """Digest of the sources of ``module`` and of all modules of gsrl_core that it imports, directly or not.

    CUDA sources beside them, and the installed versions of the packages in ``_PACKAGES`` that they use, are part of it.
    """
    total = hashlib.sha256()
    closure = sorted(_closure(module))
    for name in closure:
        total.update(f"{name}\0".encode() + _source(name).read_bytes())
    for kernels in sorted({path for name in closure for path in _source(name).parent.glob("*.cu*")}):
        total.update(f"{kernels.name}\0".encode() + kernels.read_bytes())
    for package in sorted({name for part in closure for name in _named(part)} & set(_PACKAGES)):
        total.update(f"{package}=={_installed(_PACKAGES[package])}\0".encode())
    return total.hexdigest()[:16]


def task_version(sim: SimConfig) -> str:
    """Digest of what the configured task is: its options, its code (a user's file too) and the files that it names."""
    from gsrl_core.sim import tasks  # SAPIEN's warnings filter, numpy

    code, task = tasks.code_location(sim.task), tasks.configured_task(sim)
    parts = [
        code_version(code) if isinstance(code, str) else digest_file(code),
        repr(sorted(sim.task_options.items())),
        *(digest_file(file) for file in task.files()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _file_version(module: str) -> str:
    """Digest of the file of a loaded module."""
    return hashlib.sha256(Path(sys.modules[module].__file__).read_bytes()).hexdigest()[:16]


def _closure(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in _NOT_CODE:
            found.add(name)
            waiting.extend(_imported(name))
    return found


def _imported(module: str) -> frozenset[str]:
    """The modules of gsrl_core that ``module`` names."""
    return frozenset(name for name in _named(module) if name.startswith("gsrl_core.") and _exists(name))


@cache
def _named(module: str) -> frozenset[str]:
    """What a module names: in imports at any depth, or as text (workers started by name, packages looked up)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(module).read_text())):
        match node:
            case ast.Import(names=aliases):
                names.update(alias.name for alias in aliases)
                names.update(alias.name.split(".")[0] for alias in aliases)
            case ast.ImportFrom(module=str(parent), names=aliases, level=0):
                names.update([parent, parent.split(".")[0], *(f"{parent}.{alias.name}" for alias in aliases)])
            case ast.Constant(value=str(text)) if _MODULE_NAME.match(text) or text in _PACKAGES:
                names.add(text)
    return frozenset(names)


def _path(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")[1:])


def _exists(module: str) -> bool:
    return _path(module).with_suffix(".py").is_file() or (_path(module) / "__init__.py").is_file()


def _source(module: str) -> Path:
    single = _path(module).with_suffix(".py")
    return single if single.is_file() else _path(module) / "__init__.py"


@contextmanager
def gpu_slots(config: PipelineConfig) -> Iterator[None]:
    """Occupy this host's GPUs for the duration of the block; without a CUDA device there is nothing to occupy.

    The limit is made on first use, with as many slots as there are GPUs; a limit set by hand is respected.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        yield
        return
    from prefect.concurrency.sync import concurrency

    _ensure_limit(count)
    # One process uses one GPU; Ray's actors may be placed on all of them. Leases are renewed; a short outage of the
    # API must not end a training of many hours.
    occupied = count if config.cluster.runtime == "ray" else 1
    with concurrency(GPU_LIMIT, occupy=occupied, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _ensure_limit(slots: int) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=slots))
            except ObjectAlreadyExists:
                return  # another run made it in between
