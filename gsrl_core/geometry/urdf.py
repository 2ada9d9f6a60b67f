"""Just enough URDF: forward kinematics and visual meshes, without a physics engine."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix, rpy_to_matrix

_MOVING = ("revolute", "continuous", "prismatic")


@dataclass(frozen=True)
class Joint:
    """One joint: ``parent_from_child = origin @ motion(axis, q)``."""

    name: str
    kind: str
    parent: str
    child: str
    origin: Tensor
    """float64 [4, 4]."""
    axis: Tensor
    """float64 [3], unit length, in the child's frame."""


@dataclass(frozen=True)
class Visual:
    """One visual mesh of a link."""

    mesh: Path
    link_from_mesh: Tensor
    """float64 [4, 4]."""
    scale: tuple[float, float, float]


@dataclass(frozen=True)
class Robot:
    """A kinematic tree."""

    root: str
    joints: tuple[Joint, ...]
    """Every joint after the one that carries its parent; moving ones among them in file order."""
    visuals: dict[str, tuple[Visual, ...]]
    """Link name -> its visual meshes; links without any are absent."""

    @property
    def moving(self) -> tuple[str, ...]:
        """Names of the joints that take a position, in the order of ``q`` (mimic joints included)."""
        return tuple(joint.name for joint in self.joints if joint.kind in _MOVING)

    def forward(self, q: Sequence[float]) -> dict[str, Tensor]:
        """Poses base_from_link, float32 [4, 4], of all links at joint positions ``q`` (rad or m, order of ``moving``).

        Raises:
            SceneError: ``q`` has the wrong length.
        """
        if len(q) != len(self.moving):
            raise SceneError(f"urdf: {len(q)} joint positions given, {len(self.moving)} needed: {self.moving}")
        position = dict(zip(self.moving, q, strict=True))
        poses = {self.root: torch.eye(4, dtype=torch.float64)}
        for joint in self.joints:
            poses[joint.child] = poses[joint.parent] @ joint.origin @ _motion(joint, position.get(joint.name, 0.0))
        return {link: pose.float() for link, pose in poses.items()}


def load_urdf(path: Path) -> Robot:
    """Read links, joints and visual meshes; mesh paths are taken relative to the URDF's folder.

    Raises:
        SceneError: not a URDF, an unsupported joint type, no single root, or a mesh file missing.
    """
    try:
        tree = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as error:
        raise SceneError(f"{path}: not a readable URDF ({error})") from error
    links = [link.get("name", "") for link in tree.iter("link")]
    joints = [_joint(path, element) for element in tree.findall("joint")]
    children = {joint.child for joint in joints}
    roots = [link for link in links if link not in children]
    if len(roots) != 1:
        raise SceneError(f"{path}: a robot needs exactly one root link, found {roots}")
    visuals = {
        link.get("name", ""): tuple(_visual(path, visual) for visual in link.findall("visual"))
        for link in tree.iter("link")
        if link.find("visual") is not None
    }
    return Robot(roots[0], _from_root(path, roots[0], joints), visuals)


def _from_root(path: Path, root: str, joints: list[Joint]) -> tuple[Joint, ...]:
    reached, ordered, waiting = {root}, [], list(joints)
    while waiting:
        ready = next((joint for joint in waiting if joint.parent in reached), None)
        if ready is None:
            raise SceneError(f"{path}: joints {[joint.name for joint in waiting]} hang on links that do not exist")
        waiting.remove(ready)
        ordered.append(ready)
        reached.add(ready.child)
    return tuple(ordered)


def _joint(path: Path, element: ET.Element) -> Joint:
    name, kind = element.get("name", ""), element.get("type", "")
    parent, child = element.find("parent"), element.find("child")
    if kind not in (*_MOVING, "fixed") or parent is None or child is None:
        raise SceneError(f"{path}: joint {name!r} of type {kind!r}; allowed: {', '.join(_MOVING)}, fixed")
    axis_element = element.find("axis")
    axis = _numbers(axis_element, "xyz", "1 0 0")
    return Joint(
        name, kind, parent.get("link", ""), child.get("link", ""), _origin(element), axis / axis.norm().clamp_min(1e-12)
    )


def _visual(path: Path, element: ET.Element) -> Visual:
    mesh = element.find("geometry/mesh")
    if mesh is None:
        raise SceneError(f"{path}: a visual without a mesh; only mesh visuals can be turned into splats")
    file = path.parent / mesh.get("filename", "").removeprefix("file://")
    if not file.is_file():
        raise SceneError(f"{path}: visual mesh {file} does not exist; reinstall the package that brings the URDF")
    x, y, z = _numbers(mesh, "scale", "1 1 1").tolist()
    return Visual(file, _origin(element), (x, y, z))


def _origin(element: ET.Element) -> Tensor:
    origin = element.find("origin")
    return make_rigid(rpy_to_matrix(_numbers(origin, "rpy", "0 0 0")), _numbers(origin, "xyz", "0 0 0"))


def _numbers(element: ET.Element | None, name: str, default: str) -> Tensor:
    text = default if element is None else element.get(name, default)
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def _motion(joint: Joint, position: float) -> Tensor:
    zero = torch.zeros(3, dtype=torch.float64)
    if joint.kind == "prismatic":
        return make_rigid(torch.eye(3, dtype=torch.float64), joint.axis * position)
    return make_rigid(rotvec_to_matrix(joint.axis * position), zero)
