"""A small URDF reader for SAPIEN: what the prepared FR3 file contains (boxes, convex meshes, four joint types).

SAPIEN's own loader does the same and more, but imports scipy, trimesh and networkx: two seconds in every worker. Tests
hold the two against each other.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import sapien
from sapien.wrapper.articulation_builder import ArticulationBuilder, LinkBuilder, MimicJointRecord

from gsrl_core.errors import SimulationError

# A revolute joint with limits must not wrap at 2 pi.
_JOINT_TYPES = {"revolute": "revolute_unwrapped", "prismatic": "prismatic", "fixed": "fixed"}


def robot_builder(urdf: Path) -> ArticulationBuilder:
    """A builder that adds the robot of ``urdf``, its root fixed, to any scene it is given.

    Raises:
        SimulationError: the file cannot be read or uses something that this reader does not know.
    """
    try:
        robot = ET.parse(urdf).getroot()
    except (OSError, ET.ParseError) as error:
        raise SimulationError(f"the URDF {urdf} cannot be read ({error}); delete it, it is written anew") from error
    links = {link.get("name"): link for link in robot.findall("link")}
    joints = robot.findall("joint")
    children = {joint.find("child").get("link") for joint in joints}
    roots = [name for name in links if name not in children]
    if len(roots) != 1:
        raise SimulationError(f"{urdf}: a robot has one root link, found {roots}")
    builder = ArticulationBuilder()
    stack = [(roots[0], None, None)]
    while stack:
        name, joint, parent = stack.pop()
        link = builder.create_link_builder(parent)
        link.set_name(name)
        _add_body(link, links[name])
        if joint is None:
            link.set_joint_properties("fixed", [], sapien.Pose(), sapien.Pose())
        else:
            _add_joint(builder, link, joint)
        below = [(j.find("child").get("link"), j, link) for j in joints if j.find("parent").get("link") == name]
        stack.extend(reversed(below))
    return builder


def _add_body(builder: LinkBuilder, link: ET.Element) -> None:
    inertial = link.find("inertial")
    if inertial is not None:
        entry = inertial.find("inertia")
        xx, xy, xz, yy, yz, zz = (float(entry.get(k, "0")) for k in ("ixx", "ixy", "ixz", "iyy", "iyz", "izz"))
        moments, axes = np.linalg.eigh([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        frame = np.eye(4)
        frame[:3, :3] = axes * np.linalg.det(axes)
        mass = float(inertial.find("mass").get("value"))
        builder.set_mass_and_inertia(mass, _origin(inertial) * sapien.Pose(frame), moments)
    for collision in link.findall("collision"):
        shape = collision.find("geometry")[0]
        if shape.tag == "box":
            builder.add_box_collision(_origin(collision), _vector(shape.get("size")) / 2)
        elif shape.tag == "mesh":
            builder.add_convex_collision_from_file(shape.get("filename"), _origin(collision))
        else:
            raise SimulationError(f"link {link.get('name')}: collision shape <{shape.tag}>; allowed: box, mesh")


def _add_joint(builder: ArticulationBuilder, link: LinkBuilder, joint: ET.Element) -> None:
    kind = joint.get("type")
    if kind not in _JOINT_TYPES:
        raise SimulationError(f"joint {joint.get('name')} is {kind!r}; allowed: {', '.join(_JOINT_TYPES)}")
    limit, axis = joint.find("limit"), joint.find("axis")
    limits = [] if kind == "fixed" else [[float(limit.get("lower")), float(limit.get("upper"))]]
    # PhysX joints move about the x axis of their frame.
    turn = sapien.Pose(_frame_along(np.array([1.0, 0, 0]) if axis is None else _vector(axis.get("xyz"))))
    link.set_joint_name(joint.get("name"))
    link.set_joint_properties(_JOINT_TYPES[kind], limits, _origin(joint) * turn, turn)
    mimic = joint.find("mimic")
    if mimic is not None:
        factor, offset = float(mimic.get("multiplier", "1")), float(mimic.get("offset", "0"))
        builder.mimic_joint_records.append(MimicJointRecord(joint.get("name"), mimic.get("joint"), factor, offset))


def _frame_along(axis: np.ndarray) -> np.ndarray:
    """A transform [4, 4] whose x axis is ``axis`` [3]."""
    axis = axis / np.linalg.norm(axis)
    helper = np.array([0.0, 0, 1]) if abs(axis[0]) > 0.9 else np.array([1.0, 0, 0])
    second = np.cross(axis, helper)
    second /= np.linalg.norm(second)
    frame = np.eye(4)
    frame[:3, :3] = np.column_stack([axis, second, np.cross(axis, second)])
    return frame


def _origin(element: ET.Element) -> sapien.Pose:
    origin = element.find("origin")
    if origin is None:
        return sapien.Pose()
    roll, pitch, yaw = _vector(origin.get("rpy", "0 0 0"))
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    pose = np.eye(4)
    # Rz(yaw) Ry(pitch) Rx(roll)
    pose[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    pose[:3, 3] = _vector(origin.get("xyz", "0 0 0"))
    return sapien.Pose(pose)


def _vector(text: str) -> np.ndarray:
    return np.array([float(value) for value in text.split()])
