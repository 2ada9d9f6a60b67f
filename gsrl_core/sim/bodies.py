"""Cube, plate and table as PhysX sees them: shapes, mass, and who touches whom.

The lean stepper and the ManiSkill environment both build them from here; neither torch nor ManiSkill is imported.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import sapien
from sapien import physx

from gsrl_core.geometry import props
from gsrl_core.sim import task

TABLE_QUAT = (np.sqrt(0.5), 0.0, -np.sqrt(0.5), 0.0)
"""Turns PhysX's plane, whose normal is x, to face up."""

# SAPIEN's collision groups [a, b, c, d]: two shapes meet where a & b' or a' & b is set, unless c & c' is. Others have
# [1, 1, 0, 0]. So the table and the plate's pieces meet everything but each other, the hull meets only the table, and
# the fingers meet everything but each other: the limits of their joints keep them apart.
_TABLE = [3, 3, 1, 0]
_PIECE = [1, 1, 1, 0]
_HULL = [2, 2, 0, 0]
_FINGER = [1, 1, 2, 0]


def object_entity(name: str, friction: float) -> sapien.Entity:
    """The cube or the plate."""
    component = physx.PhysxRigidDynamicComponent()
    furnish(component, name, friction)
    return _entity(name, component)


def furnish(component: physx.PhysxRigidDynamicComponent, name: str, friction: float) -> None:
    """Give ``component`` the shapes, mass and inertia of the cube or the plate."""
    material = physx.PhysxMaterial(friction, friction, 0.0)
    for shape in _plate_shapes(material) if name == "plate" else [_cube_shape(material)]:
        shape.contact_offset = task.OBJECT_CONTACT_OFFSET
        shape.patch_radius = shape.min_patch_radius = task.OBJECT_PATCH_RADIUS
        component.attach(shape)
    component.mass, component.cmass_local_pose, component.inertia = _inertia(name)


def table_entity() -> sapien.Entity:
    """The plane z = 0, of PhysX's default material."""
    component = physx.PhysxRigidStaticComponent()
    shape = physx.PhysxCollisionShapePlane(material=physx.get_default_material())
    shape.local_pose = sapien.Pose(q=TABLE_QUAT)
    prepare_table(shape)
    component.attach(shape)
    return _entity("table", component)


def prepare_table(shape: physx.PhysxCollisionShape) -> None:
    """Whom the table touches."""
    shape.set_collision_groups(_TABLE)


def prepare_finger(link: physx.PhysxArticulationLinkComponent) -> None:
    """Whom a finger touches. In an empty closed gripper the fingers' own 16 contacts took a sixth of the time."""
    for shape in link.collision_shapes:
        shape.set_collision_groups(_FINGER)


def _cube_shape(material: physx.PhysxMaterial) -> physx.PhysxCollisionShape:
    return physx.PhysxCollisionShapeBox([props.CUBE_HALF] * 3, material)


def _plate_shapes(material: physx.PhysxMaterial) -> list[physx.PhysxCollisionShape]:
    """The plate's convex pieces, which touch everything but the table, and its hull, which touches the table only.

    A body lies on a plane as its convex hull does. The pieces have 68 contact points with the table where the hull has
    4, and the solver spent as long on those as on the robot.
    """
    parts = _plate_parts()
    return [*(_convex(part, material, _PIECE) for part in parts), _convex(np.concatenate(parts), material, _HULL)]


@cache
def _plate_parts() -> list[np.ndarray]:
    """Vertices float32 [V, 3] (m) of each piece; a world is rebuilt often."""
    return [vertices.astype(np.float32) for vertices, _ in props.plate_convex_parts(task.PLATE_SEGMENTS)]


def _convex(vertices: np.ndarray, material: physx.PhysxMaterial, groups: list[int]) -> physx.PhysxCollisionShape:
    shape = physx.PhysxCollisionShapeConvexMesh(vertices=vertices, scale=[1, 1, 1], material=material)
    shape.set_collision_groups(groups)
    return shape


def _inertia(name: str) -> tuple[float, sapien.Pose, np.ndarray]:
    """Mass (kg), centre of mass in the body frame and principal moments [3] (kg m^2)."""
    mass = task.OBJECT_MASS
    if name == "cube":
        return mass, sapien.Pose(), np.full(3, mass * (2 * props.CUBE_HALF) ** 2 / 6)
    disc = mass * props.PLATE_RADIUS**2
    return mass, sapien.Pose([0, 0, task.PLATE_MASS_HEIGHT - props.PLATE_ORIGIN_HEIGHT]), disc / np.array([4, 4, 2])


def _entity(name: str, component: physx.PhysxRigidBaseComponent) -> sapien.Entity:
    component.name = name
    entity = sapien.Entity()
    entity.name = name
    entity.add_component(component)
    return entity
