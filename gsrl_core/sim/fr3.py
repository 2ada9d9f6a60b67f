"""The FR3 without graphics: names, gains and start pose, and a URDF that SAPIEN loads on a machine without Vulkan.

The source is the URDF of the franky-sim wheel. Imports here stay light: physics workers start from this module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import uuid
import xml.etree.ElementTree as ET
from pathlib import Path

from gsrl_core.errors import SimulationError

ROBOT_UID = "my_franka"
ARM_JOINTS = tuple(f"fr3_joint{i}" for i in range(1, 8))
FINGER_JOINTS = ("fr3_finger_joint1", "fr3_finger_joint2")
FINGER_LINKS = ("fr3_leftfinger", "fr3_rightfinger")
LINKS = (*(f"fr3_link{i}" for i in range(8)), "fr3_hand", *FINGER_LINKS)
"""Links that are visible, in the order of the splat scene's bodies."""
TCP_LINK = "fr3_hand_tcp"

START_QPOS = (0.0, 0.259358403, 0.0, -2.28914773, 0.0, 2.51473323, 0.785539902, 0.04, 0.04)
"""The seed's start configuration: seven joints (rad), two fingers (m)."""

STIFFNESS = 1e3
DAMPING = 1e2
FORCE_LIMIT = 100.0
"""The seed's drive gains, arm and gripper alike. Gravity acts on the links (the seed balances no passive force), so
the arm rests about 13 mm below its target."""
FINGER_FRICTION = 2.0
FINGER_PATCH_RADIUS = 0.1
GRIPPER_LOWER, GRIPPER_UPPER = -0.01, 0.04
"""Finger positions (m) that the normalised gripper actions -1 and +1 ask for; below zero so that thin objects are
pressed."""
DELTA_LIMIT = 0.1
"""Nominal bound of one delta action (m, rad); stated by the action space, not enforced by the controller."""


def source_urdf() -> Path:
    """The FR3 URDF in the installed franky-sim wheel.

    Raises:
        SimulationError: the wheel is missing or laid out differently.
    """
    found = importlib.util.find_spec("franky_sim")
    path = Path(found.origin).parent / "assets" / "fr3.urdf" if found and found.origin else None
    if path is None or not path.is_file():
        raise SimulationError(
            f"the FR3 URDF was not found at {path}; it comes with the package franky-sim==1.0.4 (run `uv sync`)"
        )
    return path


def prepare_urdf(cache: Path | None = None, source: Path | None = None) -> Path:
    """Write the simulation URDF once and return its path (named by content, so that changes never collide).

    Visuals go (no Vulkan), mesh paths become absolute, and links without mass or shape go: accelerometer frames,
    ``base`` and ``fr3_link8``. The hand then hangs on link 7 directly, which also stops the two from colliding.

    Args:
        cache: folder to write to; by default ``cache/fr3`` under ``$GSRL_HOME``.
        source: URDF to start from; by default that of the franky-sim wheel.

    Raises:
        SimulationError: the source cannot be read.
    """
    source = source or source_urdf()
    if cache is None:
        from gsrl_core.artifacts import gsrl_home  # pydantic; workers are handed the finished path instead

        cache = gsrl_home() / "cache" / "fr3"
    content = _simulation_urdf(source)
    path = cache / f"fr3-{hashlib.sha256(content).hexdigest()[:16]}.urdf"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _simulation_urdf(source: Path) -> bytes:
    try:
        robot = ET.parse(source).getroot()
    except (OSError, ET.ParseError) as error:
        raise SimulationError(f"the URDF {source} cannot be read ({error}); reinstall franky-sim") from error
    keep = {*LINKS, TCP_LINK}
    for link in robot.findall("link"):
        if link.get("name") not in keep:
            robot.remove(link)
        for visual in link.findall("visual"):
            link.remove(visual)
        for mesh in link.iter("mesh"):
            mesh.set("filename", os.fspath(source.parent / mesh.get("filename", "")))
    for joint in robot.findall("joint"):
        parent, child = joint.find("parent"), joint.find("child")
        if parent is None or child is None:
            continue
        if child.get("link") == "fr3_hand":
            # fr3_link8 is 107 mm along z of link 7 without a turn: its offset moves into the hand's joint.
            parent.set("link", "fr3_link7")
            origin = joint.find("origin")
            origin.set("xyz", "0 0 0.107")
        elif child.get("link") not in keep or parent.get("link") not in keep:
            robot.remove(joint)
    missing = keep - {link.get("name") for link in robot.findall("link")}
    if missing:
        raise SimulationError(f"the URDF {source} has no links {sorted(missing)}; franky-sim==1.0.4 is expected")
    return ET.tostring(robot, encoding="utf-8", xml_declaration=True)
