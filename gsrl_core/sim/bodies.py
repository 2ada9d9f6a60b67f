"""A task's objects and the table as SAPIEN bodies; the lean stepper and the ManiSkill environment build the same."""

from __future__ import annotations

import numpy as np
import sapien
from sapien import physx

from gsrl_core.sim import task
from gsrl_core.sim.objects import TABLE, TaskObject

TABLE_QUAT = (np.sqrt(0.5), 0.0, -np.sqrt(0.5), 0.0)
"""Turns PhysX's plane, whose normal is x, to face up."""


def shapes_of(thing: TaskObject, friction_scale: float = 1.0) -> list[physx.PhysxCollisionShape]:
    """New collision shapes of an object, ready to attach."""
    friction = thing.friction * friction_scale
    material = physx.PhysxMaterial(friction, friction, 0.0)
    boxes = [] if thing.box is None else [physx.PhysxCollisionShapeBox(thing.box, material)]
    hulls = [
        physx.PhysxCollisionShapeConvexMesh(vertices=hull, scale=[1, 1, 1], material=material) for hull in thing.hulls
    ]
    for shape in (*boxes, *hulls):
        prepare_shape(shape)
    return [*boxes, *hulls]


def prepare_shape(shape: physx.PhysxCollisionShape) -> None:
    """Contact settings of all objects' shapes."""
    shape.contact_offset = task.OBJECT_CONTACT_OFFSET
    shape.patch_radius = shape.min_patch_radius = task.OBJECT_PATCH_RADIUS


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
    component.attach(shape)
    return _entity(TABLE, component)


def _entity(name: str, component: physx.PhysxRigidBaseComponent) -> sapien.Entity:
    component.name = name
    entity = sapien.Entity()
    entity.name = name
    entity.add_component(component)
    return entity
