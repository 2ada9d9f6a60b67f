"""Links that are fixed to one another as one body: PhysX passes every impulse along every link, rigid or not.

Hand and TCP become part of link 7, which saves a twelfth of a step. Nothing else changes: fixed joints of a PhysX
articulation do not give, and what the union no longer collides with (hand with link 6, fingers with link 7) is 30 mm
away or more in every posture, since one joint alone decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import sapien
from sapien import physx
from sapien.wrapper.articulation_builder import ArticulationBuilder, LinkBuilder


@dataclass(frozen=True)
class Frame:
    """A frame that is fixed to a link; read like the link that it was."""

    link: physx.PhysxArticulationLinkComponent
    link_from_frame: sapien.Pose

    @property
    def entity_pose(self) -> sapien.Pose:
        """world_from_frame."""
        return self.link.entity_pose * self.link_from_frame


@dataclass(frozen=True)
class Merged:
    """A robot without fixed joints, and where its former links are."""

    builder: ArticulationBuilder
    frames: Mapping[str, tuple[str, sapien.Pose]]
    """Former link -> the link that it became part of, and its pose there."""

    def located(self, robot: physx.PhysxArticulation) -> dict[str, Frame]:
        """The former links' frames on ``robot``, which ``builder`` built."""
        links = {link.name: link for link in robot.get_links()}
        return {name: Frame(links[link], pose) for name, (link, pose) in self.frames.items()}


def merge_fixed_links(robot: ArticulationBuilder) -> Merged:
    """Join every link whose joint is fixed to its parent. ``robot`` is used up."""
    merged = ArticulationBuilder()
    merged.mimic_joint_records = robot.mimic_joint_records
    homes: dict[str, tuple[LinkBuilder, sapien.Pose]] = {}
    for link in robot.link_builders:  # parents come first
        joint = link.joint_record
        home, pose = homes[link.parent.name] if link.parent else (None, sapien.Pose())
        if home is not None and joint.joint_type == "fixed":
            pose = pose * joint.pose_in_parent * joint.pose_in_child.inv()
            _add(home, link, pose)
        else:
            home, before, pose = merged.create_link_builder(home), pose, sapien.Pose()
            home.set_name(link.name)
            home.set_mass_and_inertia(link._mass, link._cmass_local_pose, link._inertia)
            home.collision_records = link.collision_records
            home.joint_record = replace(joint, pose_in_parent=before * joint.pose_in_parent)
        homes[link.name] = home, pose
    return Merged(merged, {name: (home.name, pose) for name, (home, pose) in homes.items()})


def _add(home: LinkBuilder, link: LinkBuilder, pose: sapien.Pose) -> None:
    """Give the shapes and the mass of ``link``, which is at ``pose`` in ``home``, to ``home``."""
    home.collision_records += [replace(record, pose=pose * record.pose) for record in link.collision_records]
    if link._auto_inertial:  # a bare frame
        return
    parts = [(b._mass, at * b._cmass_local_pose, b._inertia) for b, at in ((home, sapien.Pose()), (link, pose))]
    mass = sum(m for m, _, _ in parts)
    center = sum(m * at.p for m, at, _ in parts) / mass
    tensor = np.zeros((3, 3))
    for m, at, moments in parts:
        axes = at.to_transformation_matrix()[:3, :3].astype(np.float64)
        arm = at.p - center
        tensor += axes @ np.diag(moments) @ axes.T + m * (arm @ arm * np.eye(3) - np.outer(arm, arm))
    moments, axes = np.linalg.eigh(tensor)
    frame = np.eye(4)
    frame[:3, :3], frame[:3, 3] = axes * np.linalg.det(axes), center
    home.set_mass_and_inertia(mass, sapien.Pose(frame), moments)
