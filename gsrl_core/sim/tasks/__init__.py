"""The tasks by name, and a user's own by file: ``StackCube-v0`` or ``path/to/my_task.py:MyTask``.

What :func:`load_task` returns is the same in every process that is given the same reference and options, so these two,
and no objects of classes that the other side may not be able to import, are what crosses to workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gsrl_core.errors import SimulationError
from gsrl_core.sim.task import Task

if TYPE_CHECKING:  # what reads a configuration has it; the workers, which use this module too, are spared it
    from gsrl_core.sections import SimConfig

DEFAULT = "PutCubeOnPlate-v0"
_BUILT_IN = {
    "PutCubeOnPlate-v0": ("put_cube_on_plate", "PutCubeOnPlate"),
    "StackCube-v0": ("stack_cube", "StackCube"),
    "PickAndPlace-v0": ("pick_and_place", "PickAndPlace"),
}
NAMES = tuple(_BUILT_IN)
"""The project's own tasks."""
_FILE_MARK = ".py:"


def load_task(reference: str = DEFAULT, options: Mapping[str, Any] | None = None) -> Task:
    """The task behind ``sim.task`` and ``sim.task_options``.

    Args:
        reference: one of :data:`NAMES`, or ``FILE.py:CLASS`` with a class that extends :class:`Task`.
        options: fields of the class.

    Raises:
        SimulationError: unknown task, no such file or class, or an option that the task does not have or refuses.
    """
    made = _task_class(reference)
    given, fields = dict(options or {}), dataclasses.fields(made) if dataclasses.is_dataclass(made) else ()
    allowed = [field.name for field in fields]
    if unknown := sorted(set(given) - set(allowed)):
        raise SimulationError(
            f"task {reference!r} has no options {unknown}; allowed: {', '.join(allowed) if allowed else 'none'}"
        )
    try:
        return made(**given)
    except TypeError as error:  # a required option is missing, or a method
        raise SimulationError(f"task {reference!r} cannot be made: {error}") from error


def configured_task(sim: SimConfig) -> Task:
    """The task that a configuration names, with its options. Raises as :func:`load_task`."""
    return load_task(sim.task, sim.task_options)


def told_instruction(sim: SimConfig, task: Task) -> str:
    """What the policy is told: the configuration's own words, else those of its ``task``."""
    return sim.instruction or task.instruction


def code_location(reference: str) -> str | Path:
    """What to digest for the code of a task: its module (the project's own) or its file.

    Raises:
        SimulationError: unknown task, or no such file.
    """
    return f"{__name__}.{_BUILT_IN[reference][0]}" if reference in _BUILT_IN else _file_and_class(reference)[0]


def _task_class(reference: str) -> type[Task]:
    if reference in _BUILT_IN:
        module, name = _BUILT_IN[reference]
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    file, name = _file_and_class(reference)
    found = getattr(_module(file), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise SimulationError(f"{file} has no class {name!r} that extends gsrl_core.sim.task.Task")
    return found


def _file_and_class(reference: str) -> tuple[Path, str]:
    path, mark, name = reference.rpartition(_FILE_MARK)
    if not mark or not name.isidentifier():
        raise SimulationError(
            f"task {reference!r} is unknown; known: {', '.join(NAMES)}, or one of your own as FILE.py:CLASS"
        )
    file = Path(f"{path}.py").expanduser()
    if not file.is_file():
        raise SimulationError(f"task {reference!r}: there is no file {file.absolute()}")
    return file, name


def _module(file: Path) -> ModuleType:
    """The file as a module, named by its content: an edited file is read again."""
    name = f"gsrl_task_{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise SimulationError(f"task file {file} cannot be loaded: {type(error).__name__}: {error}") from error
    return sys.modules[name]
