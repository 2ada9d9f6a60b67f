"""A task's objects and the table as SAPIEN bodies; the lean stepper and the ManiSkill environment build the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sapien
from sapien import physx

from gsrl_core.sim import task
from gsrl_core.sim.objects import TABLE, TaskObject

TABLE_QUAT = (np.sqrt(0.5), 0.0, -np.sqrt(0.5), 0.0)
"""Turns PhysX's plane, whose normal is x, to face up."""

# SAPIEN's collision groups [a, b, c, d]: two shapes meet where a & b' or a' & b is set, unless c & c' is. Others have
# [1, 1, 0, 0]. So the table and the pieces of concave objects meet everything but each other, the hull of such an
# object meets only the table, and the fingers meet everything but each other: the limits of their joints keep them
# apart.
_TABLE = [3, 3, 1, 0]
_PIECE = [1, 1, 1, 0]
_HULL = [2, 2, 0, 0]
_FINGER = [1, 1, 2, 0]


def shapes_of(thing: TaskObject, friction_scale: float = 1.0) -> list[physx.PhysxCollisionShape]:
    """New collision shapes of an object, ready to attach."""
    friction = thing.friction * friction_scale
    material = physx.PhysxMaterial(friction, friction, 0.0)
    shapes = [] if thing.box is None else [physx.PhysxCollisionShapeBox(thing.box, material)]
    if thing.box is None and len(thing.hulls) > 1:
        shapes += _concave(thing.hulls, material)
    else:
        shapes += [_convex(hull, material) for hull in thing.hulls]
    for shape in shapes:
        shape.contact_offset = task.OBJECT_CONTACT_OFFSET
        shape.patch_radius = shape.min_patch_radius = task.OBJECT_PATCH_RADIUS
    return shapes


def _concave(pieces: Sequence[np.ndarray], material: physx.PhysxMaterial) -> list[physx.PhysxCollisionShape]:
    """Convex pieces, which touch everything but the table, and the hull of all of them, which touches the table only.

    A body lies on a plane as its convex hull does. The plate's pieces have 68 contact points with the table where its
    hull has 4, and the solver spent as long on those as on the robot.
    """
    shapes = [_convex(piece, material) for piece in pieces]
    for shape in shapes:
        shape.set_collision_groups(_PIECE)
    hull = _convex(np.concatenate(pieces), material)
    hull.set_collision_groups(_HULL)
    return [*shapes, hull]


def _convex(vertices: np.ndarray, material: physx.PhysxMaterial) -> physx.PhysxCollisionShape:
    return physx.PhysxCollisionShapeConvexMesh(vertices=vertices, scale=[1, 1, 1], material=material)


def prepare_table(shape: physx.PhysxCollisionShape) -> None:
    """Whom the table touches."""
    shape.set_collision_groups(_TABLE)


def prepare_finger(link: physx.PhysxArticulationLinkComponent) -> None:
    """Whom a finger touches. In an empty closed gripper the fingers' own 16 contacts took a sixth of the time."""
    for shape in link.collision_shapes:
        shape.set_collision_groups(_FINGER)


def set_mass(component: physx.PhysxRigidDynamicComponent, thing: TaskObject) -> None:
    """Mass, its centre, moments of inertia and whether it moves at all."""
    component.mass = thing.mass
    component.cmass_local_pose = sapien.Pose(thing.center, thing.axes)
    component.inertia = thing.inertia
    component.kinematic = thing.fixed


def free_body(thing: TaskObject, friction_scale: float) -> tuple[sapien.Entity, physx.PhysxRigidDynamicComponent]:
    """A new entity of an object, not in a scene yet, and its body."""
    component = physx.PhysxRigidDynamicComponent()
    for shape in shapes_of(thing, friction_scale):
        component.attach(shape)
    set_mass(component, thing)
    return _entity(thing.name, component), component


def table() -> sapien.Entity:
    """The table: a plane of the default material at z = 0."""
    component = physx.PhysxRigidStaticComponent()
    shape = physx.PhysxCollisionShapePlane(material=physx.get_default_material())
    shape.local_pose = sapien.Pose(q=TABLE_QUAT)
    prepare_table(shape)
    component.attach(shape)
    return _entity(TABLE, component)


def _entity(name: str, component: physx.PhysxRigidBaseComponent) -> sapien.Entity:
    component.name = name
    entity = sapien.Entity()
    entity.name = name
    entity.add_component(component)
    return entity
