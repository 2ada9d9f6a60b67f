"""A scene: static Gaussians in the robot base frame and rigid bodies that physics moves."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.ply import read_ply, write_ply

FORMAT = "real2sim2real.scene/1"


@dataclass(frozen=True)
class Scene:
    """Gaussians with the body that each belongs to."""

    gaussians: Gaussians
    """Static ones in the base frame (= world); each body's in the body's own frame."""
    body: Tensor
    """int16 [N]: index into ``names``, -1 for the static part."""
    names: tuple[str, ...]
    """Names of the M bodies."""
    rest_to_world: Tensor
    """float32 [M, 4, 4]: where each body was when captured; the pose for display without physics."""

    def __post_init__(self) -> None:
        n, m = len(self.gaussians), len(self.names)
        if self.body.shape != (n,) or self.body.dtype != torch.int16:
            raise SceneError(f"scene: body is {self.body.dtype} {tuple(self.body.shape)}, must be int16 [{n}]")
        if self.rest_to_world.shape != (m, 4, 4):
            raise SceneError(f"scene: rest_to_world {tuple(self.rest_to_world.shape)} must be [{m}, 4, 4]")
        if len(set(self.names)) != m:
            raise SceneError(f"scene: body names {self.names} must be distinct")
        if n and (self.body.min() < -1 or self.body.max() >= m):
            raise SceneError(f"scene: body indices must lie in -1 .. {m - 1}")

    def part(self, name: str | None) -> Gaussians:
        """The Gaussians of one body in its own frame, or the static part (``None``).

        Raises:
            SceneError: no body has this name.
        """
        return self.gaussians.select(self.body == (-1 if name is None else self.index(name)))

    def index(self, name: str) -> int:
        """Position of a body in ``names``.

        Raises:
            SceneError: no body has this name.
        """
        if name not in self.names:
            raise SceneError(f"scene: no body {name!r}; bodies: {', '.join(self.names) or 'none'}")
        return self.names.index(name)

    def to(self, device: torch.device | str) -> Scene:
        """The same scene with tensors on ``device``."""
        return Scene(self.gaussians.to(device), self.body.to(device), self.names, self.rest_to_world.to(device))

    def posed(self, body_to_world: Tensor | None = None) -> Gaussians:
        """All Gaussians in the world frame, bodies at ``body_to_world`` [M, 4, 4] (default: where captured)."""
        poses = self.rest_to_world if body_to_world is None else body_to_world
        moved = [self.part(None)]
        moved += [
            self.part(name).transformed(pose[:3, :3], pose[:3, 3]) for name, pose in zip(self.names, poses, strict=True)
        ]
        return Gaussians.concatenate(moved)

    @staticmethod
    def from_parts(static: Gaussians, bodies: Mapping[str, tuple[Gaussians, Tensor]]) -> Scene:
        """A scene from the static part and ``name -> (Gaussians in the body frame, rest_to_world [4, 4])``."""
        parts = [static, *(gaussians for gaussians, _ in bodies.values())]
        body = torch.cat([torch.full((len(part),), i - 1, dtype=torch.int16) for i, part in enumerate(parts)])
        poses = [pose.to(torch.float32) for _, pose in bodies.values()]
        rest_to_world = torch.stack(poses) if poses else torch.zeros(0, 4, 4)
        return Scene(Gaussians.concatenate(parts), body, tuple(bodies), rest_to_world)


def save_scene(folder: Path, scene: Scene) -> None:
    """Write static.ply, one <name>.ply per body and scene.json (last, so that a folder with it is complete).

    Raises:
        SceneError: a body name cannot be a file name.
    """
    for name in scene.names:
        if name == "static" or not name or any(c in name for c in "/\\\0") or name.startswith("."):
            raise SceneError(f"scene: body name {name!r} cannot be a file name; use letters, digits, _ and -")
    folder.mkdir(parents=True, exist_ok=True)
    write_ply(folder / "static.ply", scene.part(None))
    for name in scene.names:
        write_ply(folder / f"{name}.ply", scene.part(name))
    description = {
        "format": FORMAT,
        "static": "static.ply",
        "bodies": [
            {"name": name, "file": f"{name}.ply", "rest_to_world": pose.tolist()}
            for name, pose in zip(scene.names, scene.rest_to_world, strict=True)
        ],
    }
    temporary = folder / f".scene.json.{uuid.uuid4().hex}"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(temporary, folder / "scene.json")  # noqa: PTH105 - atomic, unlike a plain write


def load_scene(folder: Path) -> Scene:
    """Read a scene folder (CPU tensors).

    Raises:
        SceneError: no scene.json, unknown format, a body without pose, a missing or broken splat file.
    """
    description_path = folder / "scene.json"
    if not description_path.is_file():
        raise SceneError(f"{folder} is not a scene: scene.json is missing; make one with `real2sim2real run` or scene")
    try:
        description = json.loads(description_path.read_text())
        if description["format"] != FORMAT:
            raise SceneError(f"{description_path}: format {description['format']!r}; this version reads {FORMAT!r}")
        bodies = {
            item["name"]: (read_ply(folder / item["file"]), torch.tensor(item["rest_to_world"]).reshape(4, 4))
            for item in description["bodies"]
        }
        static = read_ply(folder / description["static"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SceneError(f"{description_path} is broken ({type(error).__name__}: {error}); build it again") from error
    return Scene.from_parts(static, bodies)
