"""Sizes of the network: pi0.5 and pi0, several widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from gsrl_core.errors import CheckpointError

IMAGE_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's camera slots, in the order of the prefix. A slot without a camera costs nothing here."""

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0
"""Periods of the time embedding."""
LEROBOT_MODES: Mapping[str, str] = {"quantile": "QUANTILES", "mean_std": "MEAN_STD"}
"""Names of the normalisations in lerobot's ``normalization_mapping``."""


@dataclass(frozen=True)
class Pi05Config:
    """Everything that decides the shape of the network and of its inputs. Defaults are the published 3.6 B model."""

    family: Literal["pi05", "pi0"] = "pi05"
    """pi0 has a token of the state before the actions, and time enters with the actions instead of the norms."""
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_depth: int = 27
    vision_heads: int = 16
    vision_mlp: int = 4304
    width: int = 2048
    """Of the language model (the prefix)."""
    depth: int = 18
    """Layers of the language model and of the action expert: they attend jointly, so it is one number."""
    mlp: int = 16384
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    expert_width: int = 1024
    expert_mlp: int = 4096
    vocab_size: int = 257152
    action_dim: int = 32
    """Width that states and actions are padded to."""
    horizon: int = 50
    """Actions in a chunk (H)."""
    max_token_len: int = 200
    discrete_state: bool = True
    """The prompt carries the state as 256-bin integers; without it the network does not see the state at all."""
    normalization: Literal["quantile", "mean_std"] = "quantile"
    """Of states and actions."""
    value_hidden: tuple[int, ...] = (512, 256, 128)
    noise_hidden: tuple[int, ...] = (128, 64)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


PRESETS: Mapping[str, Pi05Config] = {
    "pi05": Pi05Config(),
    "pi05_tiny": Pi05Config(
        image_size=128,
        patch_size=16,
        vision_width=128,
        vision_depth=4,
        vision_heads=4,
        vision_mlp=384,
        width=128,
        depth=4,
        mlp=256,
        heads=4,
        kv_heads=1,
        head_dim=32,
        expert_width=128,
        expert_mlp=256,
        vocab_size=512,
        action_dim=8,
        horizon=5,
        max_token_len=48,
        value_hidden=(256, 128),
        noise_hidden=(64, 64),
    ),
    # 30 M parameters, 5 M of them in the expert, so that PPO's state (weights and two moments) stays near 60 MB.
    "pi05_small": Pi05Config(
        image_size=128,
        patch_size=16,
        vision_width=384,
        vision_depth=8,
        vision_heads=6,
        vision_mlp=1152,
        width=384,
        depth=8,
        mlp=1152,
        heads=4,
        kv_heads=1,
        head_dim=64,
        expert_width=192,
        expert_mlp=512,
        vocab_size=512,
        action_dim=8,
        horizon=5,
        max_token_len=48,
        value_hidden=(256, 128),
        noise_hidden=(64, 64),
    ),
}


def preset(name: str) -> Pi05Config:
    """The sizes of a named model. Raises CheckpointError for an unknown name."""
    if name not in PRESETS:
        raise CheckpointError(f"unknown model {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]


def config_to_json(config: Pi05Config) -> dict[str, Any]:
    """What config.json holds: the names of openpi's converter, and every size under ``architecture``."""
    return {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        "max_token_len": config.max_token_len,
        "discrete_state_input": config.discrete_state,
        "use_quantile_norm": config.normalization == "quantile",
        "pi05": config.family == "pi05",
        "architecture": dataclasses.asdict(config),
    }


def config_from_json(values: Mapping[str, Any]) -> Pi05Config:
    """Read config.json as written here, by openpi's converter, or by lerobot.

    Raises:
        CheckpointError: unknown architecture key, a value of the wrong type, or a variant of neither pi0.5 nor pi0.
    """
    if "architecture" in values:
        return _from_architecture(values["architecture"])
    allowed = {"paligemma_variant": ("gemma_2b",), "action_expert_variant": ("gemma_300m",), "type": ("pi05", "pi0")}
    for key, legal in allowed.items():
        if values.get(key, legal[0]) not in legal:
            raise CheckpointError(f"config.json: {key} is {values[key]!r}; allowed: {', '.join(map(repr, legal))}")
    old = values.get("type") == "pi0" or values.get("pi05") is False
    known: dict[str, Any] = {
        "family": "pi0" if old else "pi05",
        "action_dim": values.get("action_dim", values.get("max_action_dim", 32)),
        "horizon": values.get("action_horizon", values.get("chunk_size")),
        "max_token_len": values.get("max_token_len", values.get("tokenizer_max_length", 48 if old else 200)),
        "discrete_state": values.get("discrete_state_input", not old),
        "normalization": "quantile" if values.get("use_quantile_norm", not old) else "mean_std",
    }
    if "type" in values:
        known |= _lerobot_settings(values, known["normalization"])
    if known["horizon"] is None:
        raise CheckpointError("config.json: neither action_horizon nor chunk_size is given; add action_horizon")
    return _from_architecture(known)


def _from_architecture(given: Any) -> Pi05Config:
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: architecture must be an object, given {type(given).__name__}")
    fields = {field.name: getattr(PRESETS["pi05"], field.name) for field in dataclasses.fields(Pi05Config)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            raise CheckpointError(f"config.json: unknown architecture key {key!r}; allowed: {', '.join(fields)}")
        values[key] = _checked(key, value, fields[key])
    return dataclasses.replace(PRESETS["pi05"], **values)


def _lerobot_settings(values: Mapping[str, Any], usual: str) -> dict[str, Any]:
    """What only lerobot's config.json says (its PI05Config and PI0Config), as architecture keys."""
    fixed = {"use_relative_actions": False, "min_period": MIN_PERIOD, "max_period": MAX_PERIOD}
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"config.json: {key} is {values[key]!r}; only {only!r} is supported")
    mapping = values.get("normalization_mapping", {})
    if not isinstance(mapping, Mapping) or mapping.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise CheckpointError(f"config.json: normalization_mapping is {mapping!r}; VISUAL must be IDENTITY")
    state, actions = (mapping.get(kind, LEROBOT_MODES[usual]) for kind in ("STATE", "ACTION"))
    names = {mode: name for name, mode in LEROBOT_MODES.items()}
    if state != actions or state not in tuple(names):
        raise CheckpointError(
            f"config.json: normalization_mapping has STATE {state!r} and ACTION {actions!r}; allowed: the same for "
            f"both, {' or '.join(names)}"
        )
    resolution = values.get("image_resolution", (224, 224))
    if not isinstance(resolution, list | tuple) or len(resolution) != 2:
        raise CheckpointError(f"config.json: image_resolution is {resolution!r}; expected [height, width]")
    height, width = resolution
    if height != width:
        raise CheckpointError(f"config.json: image_resolution is {height} x {width}; pictures must be square")
    return {"normalization": names[state], "image_size": height}


def _checked(key: str, value: Any, example: Any) -> Any:
    if isinstance(example, tuple):
        if isinstance(value, list | tuple) and all(type(item) is int and item > 0 for item in value):
            return tuple(value)
        raise CheckpointError(f"config.json: {key} must be a list of positive integers, given {value!r}")
    if isinstance(example, str):
        allowed = get_args(get_type_hints(Pi05Config)[key])
        if value not in allowed:
            raise CheckpointError(f"config.json: {key} is {value!r}; allowed: {', '.join(allowed)}")
        return value
    if type(value) is not type(example) or (type(value) is int and value < 1):
        wanted = "true or false" if isinstance(example, bool) else "a positive integer"
        raise CheckpointError(f"config.json: {key} must be {wanted}, given {value!r}")
    return value
