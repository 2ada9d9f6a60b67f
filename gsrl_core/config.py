"""Presets and overrides of the typed configuration (its values are described in ``sections``).

A preset is a YAML file in ``configs/``, or a file of your own, that holds differences only (``base: full``). Machine
facts (addresses, tokens, folders) are environment variables, never configuration.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from gsrl_core.errors import ConfigError
from gsrl_core.sections import PipelineConfig, Section, absolute_files

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PRESETS = ("full", "one-gpu", "cluster", "laptop", "stack-cube", "pick-and-place")
_SUFFIXES = (".yaml", ".yml")


class _Values(yaml.SafeLoader):
    """YAML in which 1e-5 and 2e4 are numbers, as everywhere else; YAML 1.1 wants a dot in them."""


_Values.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


FOLDER_COMMANDS = ("demos", "sft")
"""Sections of the commands of these names: no stage of the pipeline reads them, so no flow accepts their keys."""


def config_dir() -> Path:
    """The folder of presets: package data of an installed wheel, else ``configs/`` of the checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def load(preset: str = "laptop", overrides: Mapping[str, Any] | None = None) -> PipelineConfig:
    """Build a configuration from a preset and dotted overrides, such as ``{"ppo.learning_rate": 1e-5}``.

    ``preset`` is a name, or the path of a YAML file whose ``base`` is one.

    Raises:
        ConfigError: unknown preset, file or key (with the nearest legal names), or a value out of range.
    """
    return apply_overrides(_expanded(preset), overrides or {})


def apply_overrides(config: PipelineConfig, overrides: Mapping[str, Any]) -> PipelineConfig:
    """Replace single values by dotted key; all are checked together afterwards. Raises ConfigError."""
    tree = config.model_dump(mode="json")
    for key, value in overrides.items():
        _assign(tree, key, value)
    return _validated(tree, "the overrides")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Read ``key=value`` texts of the command line; values are YAML (numbers, lists, ``null``). Raises ConfigError."""
    overrides: dict[str, Any] = {}
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {text!r}: expected key=value, for example --set ppo.learning_rate=1e-5")
        try:
            overrides[key.strip()] = yaml.load(value, _Values)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is not valid YAML ({error})") from error
    return overrides


def as_parameters(preset: str) -> dict[str, Any]:
    """A Prefect build step: the fully expanded preset as plain JSON, because deployment parameters merge shallowly."""
    return {"config": load(preset).model_dump(mode="json")}


def section_digest(*sections: Section) -> str:
    """A stable text of the given sections, to key caches with."""
    return json.dumps([section.model_dump(mode="json") for section in sections], sort_keys=True)


def _expanded(preset: str) -> PipelineConfig:
    # A file of the user's may change while this process lives.
    return _built(preset) if preset.endswith(_SUFFIXES) else _named(preset)


def _built(preset: str) -> PipelineConfig:
    return _validated(_tree(preset, ()), f"preset {preset!r}")


_named = cache(_built)


def _tree(preset: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if preset in seen:
        raise ConfigError(f"presets refer to each other in a circle: {' -> '.join((*seen, preset))}")
    differences = _differences(preset)
    base = differences.pop("base", None)
    return _merged(_tree(base, (*seen, preset)) if base else {}, differences)


def _differences(preset: str) -> dict[str, Any]:
    if not preset.endswith(_SUFFIXES):
        if preset not in PRESETS:
            raise ConfigError(f"unknown preset {preset!r}; {_nearest(preset, PRESETS)}, or a YAML file of your own")
        return yaml.safe_load((config_dir() / f"{preset.replace('-', '_')}.yaml").read_text()) or {}
    path = Path(preset).expanduser()
    try:
        tree = yaml.load(path.read_text(), _Values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"preset file {preset} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not all(key == "base" or isinstance(tree[key], dict) for key in tree):
        raise ConfigError(f"preset file {preset} must hold sections with values, such as `sim: {{num_envs: 8}}`")
    if "base" not in tree:
        raise ConfigError(f"preset file {preset} must name the preset that it changes, such as `base: laptop`")
    if "sim" in tree:
        tree["sim"] = absolute_files(tree["sim"], path.parent)
    return tree


def _merged(base: dict[str, Any], differences: dict[str, Any]) -> dict[str, Any]:
    return {**base, **{section: {**base.get(section, {}), **values} for section, values in differences.items()}}


def _validated(tree: dict[str, Any], source: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(map(_problem, error.errors()))}") from error


def _problem(item: ErrorDetails) -> str:
    """One line of what pydantic found. Relations are found in a whole section; they name the values themselves."""
    where = f"{'.'.join(map(str, item['loc']))}: " if item["loc"] else ""
    given = "" if isinstance(item["input"], Mapping | BaseModel) else f" (given: {item['input']!r})"
    return f"{where}{item['msg'].removeprefix('Value error, ')}{given}"


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = tree
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if not path or not isinstance(node, dict) or last not in node:
        raise ConfigError(f"unknown key {key!r}; {_nearest(key, _legal_keys())}")
    node[last] = value


def _legal_keys(section: type[BaseModel] = PipelineConfig, prefix: str = "") -> tuple[str, ...]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            keys += _legal_keys(type(field.default), f"{prefix}{name}.")
        elif prefix:
            keys.append(prefix + name)
    return tuple(keys)


def _nearest(given: str, legal: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(given, legal, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"allowed: {', '.join(legal)}"
