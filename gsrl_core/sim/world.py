"""One environment's physics without ManiSkill's per-step overhead: SAPIEN bodies, drive targets, ``px.step``.

It reproduces the ``env.step`` of maniskill.py (tests compare the two) and imports neither torch nor ManiSkill, so
that a worker process starts in under a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sapien
from sapien import physx

from gsrl_core.errors import SimulationError
from gsrl_core.sim import bodies, fr3, task
from gsrl_core.sim.kinematics import ArmKinematics
from gsrl_core.sim.merging import Frame, merge_fixed_links
from gsrl_core.sim.objects import ROBOT, TABLE
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.urdf import robot_builder


class DivergedError(SimulationError):
    """The numbers of one environment's physics are no longer finite; its episode is lost, others are not concerned."""


@dataclass
class _Bodies:
    """Handles into the current SAPIEN scene."""

    system: physx.PhysxCpuSystem
    scene: sapien.Scene
    robot: physx.PhysxArticulation
    joints: list[physx.PhysxArticulationJoint]
    visible: list[Frame | physx.PhysxRigidDynamicComponent]
    tcp: Frame
    table: physx.PhysxRigidStaticComponent
    objects: dict[str, physx.PhysxRigidDynamicComponent]


class World:
    """Robot, table, the task's objects. Every reset builds a fresh PhysX scene (1 ms), so no episode leaves a trace."""

    def __init__(self, settings: WorldSettings) -> None:
        self.settings = settings
        self._substeps = settings.sim_hz // settings.control_hz
        configure_physx(settings.solver_iterations)
        self._robot = merge_fixed_links(robot_builder(settings.urdf))
        self._kinematics = ArmKinematics(settings.urdf)
        self._task = settings.load_task()
        self._bodies: _Bodies | None = None
        self._target = np.eye(4)
        self._before: dict[str, np.ndarray] = {}

    # ------------------------------------------------------------------ episode
    def reset(self, spec: task.EpisodeSpec) -> None:
        """Start the episode that ``spec`` describes."""
        start = self._task.start(spec)
        self._bodies = self._build(spec, start)
        self._before = self._object_poses()
        self.set_qpos(start.qpos)

    def set_qpos(self, qpos: np.ndarray) -> None:
        """Put the robot at ``qpos`` [9] (rad, m), at rest, and hold it there."""
        bodies = self._scene()
        bodies.robot.set_qpos(qpos)
        bodies.robot.set_qvel(np.zeros(9))
        self._drive(qpos)
        self._target = bodies.tcp.entity_pose.to_transformation_matrix().astype(np.float64)

    def place(self, body: str, position: np.ndarray, quat: np.ndarray | None = None) -> None:
        """Put an object at ``position`` [3] (m) turned by ``quat`` [4] (wxyz, default not), at rest."""
        component = self._scene().objects[body]
        component.entity_pose = sapien.Pose(position, (1, 0, 0, 0) if quat is None else quat)
        component.set_linear_velocity(np.zeros(3))
        component.set_angular_velocity(np.zeros(3))
        self._before = self._object_poses()

    def step(self, action: np.ndarray) -> None:
        """Execute one control step of ``action`` [action_dim] in control units (m, rad; gripper in [-1, 1]).

        Raises:
            SimulationError: the action is not finite.
            DivergedError: the physics is no longer finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if not np.isfinite(action).all():
            raise SimulationError(f"action {action} is not finite; the policy diverged")
        self._drive(self._joint_targets(action))
        self._before = self._object_poses()
        system = self._scene().system
        for _ in range(self._substeps):
            system.step()
        if not np.isfinite(self.qpos()).all():
            raise DivergedError("the robot's joints are not finite: the physics diverged; raise sim_hz")

    def _joint_targets(self, action: np.ndarray) -> np.ndarray:
        qpos = self.qpos().astype(np.float64)
        arm = self._arm_targets(action[:-1], qpos)
        finger = fr3.GRIPPER_LOWER + (np.clip(action[-1], -1, 1) + 1) / 2 * (fr3.GRIPPER_UPPER - fr3.GRIPPER_LOWER)
        return np.concatenate([arm, [finger, finger]])

    def _arm_targets(self, command: np.ndarray, qpos: np.ndarray) -> np.ndarray:
        mode = self.settings.control_mode
        if mode == "pd_joint_pos":
            return command
        if mode == "pd_joint_delta_pos":
            return qpos[:7] + command
        if mode == "pd_ee_delta_pose":
            self._target = self.tcp().astype(np.float64)
        # root_translation:root_aligned_body_rotation, as in ManiSkill: p += dp, R = Rx Ry Rz R, in base axes.
        self._target[:3, 3] += command[:3]
        self._target[:3, :3] = euler_xyz(command[3:]) @ self._target[:3, :3]
        solution = self._kinematics.solve(self._target, qpos)
        return qpos[:7] if solution is None else solution

    def _drive(self, targets: np.ndarray) -> None:
        for joint, target in zip(self._scene().joints, targets, strict=True):
            joint.set_drive_target(target)

    # ------------------------------------------------------------------ state
    def qpos(self) -> np.ndarray:
        """Float32 [9]: joints (rad), fingers (m)."""
        return self._scene().robot.get_qpos()

    def qvel(self) -> np.ndarray:
        """Float32 [9]: rad/s, m/s."""
        return self._scene().robot.get_qvel()

    def tcp(self) -> np.ndarray:
        """base_from_tcp, float32 [4, 4]."""
        return self._scene().tcp.entity_pose.to_transformation_matrix()

    def body_poses(self) -> np.ndarray:
        """world_from_body of :func:`gsrl_core.sim.task.body_names`, float32 [M, 4, 4]."""
        return np.stack([body.entity_pose.to_transformation_matrix() for body in self._scene().visible])

    def velocities(self) -> np.ndarray:
        """Float32 [K, 6]: of the task's objects, linear (m/s) and angular (rad/s)."""
        objects = self._scene().objects.values()
        return np.stack([np.concatenate([b.linear_velocity, b.angular_velocity]) for b in objects])

    def verdict(self, *, complete: bool = True) -> task.Verdict:
        """Success and its parts, now; for ``complete`` see :meth:`gsrl_core.sim.task.Task.judge`."""
        poses = self._object_poses()

        def speeds(name: str) -> tuple[float, float]:
            return task.mean_speeds(self._before[name], poses[name], 1 / self.settings.control_hz)

        return self._task.judge(task.ObjectsNow(poses, speeds, self._pressing), complete=complete)

    def _object_poses(self) -> dict[str, np.ndarray]:
        objects = self._scene().objects
        return {name: body.entity_pose.to_transformation_matrix() for name, body in objects.items()}

    def _pressing(self, name: str) -> frozenset[str]:
        """What presses on an object; see :class:`gsrl_core.sim.task.ObjectsNow`."""
        scene = self._scene()
        known, body = {**scene.objects, TABLE: scene.table}, scene.objects[name]
        pressing = set()
        for contact in scene.system.get_contacts():
            if body not in contact.bodies:
                continue
            # Points within the contact offset are listed too; only those that transmit force touch.
            if not any(np.any(point.impulse) for point in contact.points):
                continue
            others = [other for other, touched in known.items() if other != name and touched in contact.bodies]
            pressing.update(others or [ROBOT])
        return frozenset(pressing)

    def _scene(self) -> _Bodies:
        if self._bodies is None:
            raise SimulationError("the environment has no episode yet; call reset first")
        return self._bodies

    # ------------------------------------------------------------------ building
    def _build(self, spec: task.EpisodeSpec, start: task.StartState) -> _Bodies:
        configure_physx(self.settings.solver_iterations)
        system = physx.PhysxCpuSystem()
        system.timestep = 1.0 / self.settings.sim_hz
        scene = sapien.Scene([system])
        robot = self._robot.builder.set_scene(scene).build(fix_root_link=True)
        joints = robot.get_active_joints()
        for joint in joints:
            joint.set_drive_properties(fr3.STIFFNESS, fr3.DAMPING, force_limit=fr3.FORCE_LIMIT, mode="force")
            joint.set_friction(0.0)
        links = {link.name: link for link in robot.get_links()}
        for name in fr3.FINGER_LINKS:
            _make_grippy(links[name], fr3.FINGER_FRICTION * spec.friction_scale)
            bodies.prepare_finger(links[name])
        table = bodies.table()
        scene.add_entity(table)
        objects = {}
        for thing in self.settings.objects:
            entity, objects[thing.name] = bodies.free_body(thing, spec.friction_scale)
            placed = start.objects[thing.name]
            entity.pose = sapien.Pose(placed[:3], placed[3:])
            scene.add_entity(entity)
        frames = self._robot.located(robot)
        visible = [*(frames[name] for name in fr3.LINKS), *objects.values()]
        ground = table.find_component_by_type(physx.PhysxRigidStaticComponent)
        return _Bodies(system, scene, robot, joints, visible, frames[fr3.TCP_LINK], ground, objects)


def configure_physx(solver_iterations: int) -> None:
    """Set the process-wide defaults that new shapes, bodies and scenes take (ManiSkill sets its own in between)."""
    physx.set_shape_config(contact_offset=task.CONTACT_OFFSET, rest_offset=0.0)
    physx.set_body_config(
        solver_position_iterations=solver_iterations,
        solver_velocity_iterations=task.SOLVER_VELOCITY_ITERATIONS,
        sleep_threshold=task.SLEEP_THRESHOLD,
    )
    physx.set_scene_config(
        gravity=np.array([0.0, 0.0, -9.81]),
        bounce_threshold=task.BOUNCE_THRESHOLD,
        enable_pcm=True,
        enable_tgs=True,
        enable_ccd=False,
        enable_enhanced_determinism=False,
        enable_friction_every_iteration=True,
        cpu_workers=0,
    )
    physx.set_default_material(task.TABLE_FRICTION, task.TABLE_FRICTION, 0.0)


def euler_xyz(angles: np.ndarray) -> np.ndarray:
    """Rx(a) Ry(b) Rz(c), [3, 3], of angles [3] (rad): ManiSkill's "XYZ" convention."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    return np.array(
        [
            [cb * cc, -cb * sc, sb],
            [ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb],
            [sa * sc - ca * sb * cc, sa * cc + ca * sb * sc, ca * cb],
        ]
    )


def _make_grippy(link: physx.PhysxArticulationLinkComponent, friction: float) -> None:
    material = physx.PhysxMaterial(friction, friction, 0.0)
    for shape in link.collision_shapes:
        shape.physical_material = material
        shape.patch_radius = shape.min_patch_radius = fr3.FINGER_PATCH_RADIUS
