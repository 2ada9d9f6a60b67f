"""The ManiSkill side: agent ``my_franka`` and an environment for each task. Importing this module registers them.

Nothing has a visual shape, so ``render_backend="none"`` needs no Vulkan; pictures come from splats (gs_env.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import sapien
import torch
from mani_skill.agents.base_agent import BaseAgent, Keyframe
from mani_skill.agents.controllers import (
    PDEEPoseControllerConfig,
    PDJointPosControllerConfig,
    PDJointPosMimicControllerConfig,
)
from mani_skill.agents.registration import register_agent
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.building import ActorBuilder
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Actor, Pose
from mani_skill.utils.structs.types import DefaultMaterialsConfig, SceneConfig, SimConfig
from sapien import physx
from torch import Tensor

from gsrl_core.sim import bodies, fr3, task
from gsrl_core.sim.objects import ROBOT, TABLE, TaskObject
from gsrl_core.sim.states import PARTS
from gsrl_core.sim.tasks import NAMES, load_task


@register_agent(override=True)
class MyFranka(BaseAgent):
    """The FR3 with the seed's gains and control modes; gravity acts on its links."""

    uid = fr3.ROBOT_UID
    urdf_config: ClassVar = {
        "_materials": {
            "gripper": {
                "static_friction": fr3.FINGER_FRICTION,
                "dynamic_friction": fr3.FINGER_FRICTION,
                "restitution": 0.0,
            }
        },
        "link": {
            name: {
                "material": "gripper",
                "patch_radius": fr3.FINGER_PATCH_RADIUS,
                "min_patch_radius": fr3.FINGER_PATCH_RADIUS,
            }
            for name in fr3.FINGER_LINKS
        },
    }
    keyframes: ClassVar = {"rest": Keyframe(pose=sapien.Pose(), qpos=np.array(fr3.START_QPOS))}

    def _load_articulation(self, initial_pose: sapien.Pose | Pose | None = None) -> None:
        self.urdf_path = str(fr3.prepare_urdf())
        super()._load_articulation(initial_pose)

    @property
    def _controller_configs(self) -> dict[str, Any]:
        gains = {"stiffness": fr3.STIFFNESS, "damping": fr3.DAMPING, "force_limit": fr3.FORCE_LIMIT}
        joint = {"joint_names": list(fr3.ARM_JOINTS), **gains, "normalize_action": False}
        bounds = {"lower": -fr3.DELTA_LIMIT, "upper": fr3.DELTA_LIMIT}
        pose = {
            **joint,
            "pos_lower": -fr3.DELTA_LIMIT,
            "pos_upper": fr3.DELTA_LIMIT,
            "rot_lower": -fr3.DELTA_LIMIT,
            "rot_upper": fr3.DELTA_LIMIT,
            "ee_link": fr3.TCP_LINK,
            "urdf_path": self.urdf_path,
            "frame": "root_translation:root_aligned_body_rotation",
        }
        gripper = PDJointPosMimicControllerConfig(
            list(fr3.FINGER_JOINTS),
            lower=fr3.GRIPPER_LOWER,
            upper=fr3.GRIPPER_UPPER,
            **gains,
            mimic={fr3.FINGER_JOINTS[1]: {"joint": fr3.FINGER_JOINTS[0]}},
        )
        arms = {
            "pd_ee_target_delta_pose": PDEEPoseControllerConfig(**pose, use_target=True),
            "pd_ee_delta_pose": PDEEPoseControllerConfig(**pose),
            "pd_joint_delta_pos": PDJointPosControllerConfig(**joint, **bounds, use_delta=True),
            "pd_joint_pos": PDJointPosControllerConfig(**joint, lower=None, upper=None),
        }
        return {name: {"arm": arm, "gripper": gripper, "balance_passive_force": False} for name, arm in arms.items()}

    def _after_init(self) -> None:
        self.tcp = self.robot.links_map[fr3.TCP_LINK]
        for name in fr3.FINGER_LINKS:
            for link in self.robot.links_map[name]._objs:
                bodies.prepare_finger(link)


class _ObjectBuilder(ActorBuilder):
    """ManiSkill's builder reads convex shapes from files only; ours are made of vertices."""

    thing: TaskObject

    def build_physx_component(self, link_parent: physx.PhysxArticulationLinkComponent | None = None) -> Any:
        component = super().build_physx_component(link_parent)
        for shape in bodies.shapes_of(self.thing):
            component.attach(shape)
        bodies.set_mass(component, self.thing)
        return component


class TaskEnv(BaseEnv):
    """One task: strict ``success`` beside the looser ``success_seed``. Subclasses are made by :func:`env_class`.

    The start depends on the episode seed alone; unseeded resets draw one from ManiSkill's main generator.
    """

    task: task.Task
    SUPPORTED_ROBOTS: ClassVar = [fr3.ROBOT_UID]
    SUPPORTED_REWARD_MODES = ("sparse", "none")

    def __init__(
        self,
        *args: Any,
        robot_uids: str = fr3.ROBOT_UID,
        render_backend: str = "none",
        reconfiguration_freq: int = 1,
        **kwargs: Any,
    ) -> None:
        # A scene that has been stepped keeps contact caches that a reset does not clear; rebuilding it at every reset
        # makes an episode independent of those before it.
        super().__init__(
            *args,
            robot_uids=robot_uids,
            render_backend=render_backend,
            reconfiguration_freq=reconfiguration_freq,
            **kwargs,
        )

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(
            sim_freq=task.SIM_HZ,
            control_freq=task.CONTROL_HZ,
            scene_config=SceneConfig(
                contact_offset=task.CONTACT_OFFSET,
                solver_position_iterations=task.SOLVER_POSITION_ITERATIONS,
                solver_velocity_iterations=task.SOLVER_VELOCITY_ITERATIONS,
                bounce_threshold=task.BOUNCE_THRESHOLD,
                sleep_threshold=task.SLEEP_THRESHOLD,
            ),
            default_materials_config=DefaultMaterialsConfig(task.TABLE_FRICTION, task.TABLE_FRICTION, 0.0),
        )

    def _load_agent(self, options: dict) -> None:
        super()._load_agent(options, sapien.Pose())

    def _load_scene(self, options: dict) -> None:
        table = self.scene.create_actor_builder()
        table.add_plane_collision(sapien.Pose(q=bodies.TABLE_QUAT))
        table.set_initial_pose(sapien.Pose())
        self.table = table.build_static(TABLE)
        for body in self.table._bodies:
            for shape in body.collision_shapes:
                bodies.prepare_table(shape)
        start = self.task.start(task.EpisodeSpec(0)).objects
        self.objects = {thing.name: self._add_object(thing, start[thing.name]) for thing in self.task.bodies}

    def _add_object(self, thing: TaskObject, placed: np.ndarray) -> Actor:
        builder = _ObjectBuilder().set_scene(self.scene)
        builder.thing = thing
        builder.set_initial_pose(sapien.Pose(placed[:3], placed[3:]))
        return builder.build_kinematic(thing.name) if thing.fixed else builder.build(thing.name)

    def _load_lighting(self, options: dict) -> None:
        """Nothing is drawn here."""

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        seeds = np.asarray(self._episode_seed).reshape(-1)[env_idx.cpu().numpy()]
        starts = [self.task.start(task.EpisodeSpec(int(seed))) for seed in seeds]

        def stacked(rows: list[np.ndarray]) -> Tensor:
            return torch.as_tensor(np.stack(rows), dtype=torch.float32, device=self.device)

        self.agent.robot.set_pose(sapien.Pose())
        self.agent.reset(stacked([start.qpos for start in starts]))
        for name, actor in self.objects.items():
            placed = stacked([start.objects[name] for start in starts])
            actor.set_pose(Pose.create_from_pq(placed[:, :3], placed[:, 3:]))
        self._before_control_step()

    def _before_control_step(self) -> None:
        self._before = self._object_poses()

    def _object_poses(self) -> dict[str, np.ndarray]:
        return {name: actor.pose.to_transformation_matrix().cpu().numpy() for name, actor in self.objects.items()}

    def evaluate(self) -> dict[str, Tensor]:
        """Strict ``success``, ``success_seed`` and the parts of strict success, bool [num_envs] each."""
        poses, pressed = self._object_poses(), self._presses(self.task.moved)

        def judged(env: int) -> task.Verdict:
            def speeds(name: str) -> tuple[float, float]:
                return task.mean_speeds(self._before[name][env], poses[name][env], self.control_timestep)

            def pressing(name: str) -> frozenset[str]:
                forces = pressed if name == self.task.moved else self._presses(name)
                return frozenset(other for other, presses in forces.items() if presses[env])

            now = {name: pose[env] for name, pose in poses.items()}
            return self.task.judge(task.ObjectsNow(now, speeds, pressing))

        verdicts = [judged(env) for env in range(self.num_envs)]
        return {
            name: torch.tensor([getattr(v, name) for v in verdicts], dtype=torch.bool, device=self.device)
            for name in ("success", "success_seed", *PARTS)
        }

    def _presses(self, name: str) -> dict[str, Tensor]:
        """What presses on an object: name of another object, ``table`` or ``robot`` -> bool [num_envs]."""

        def presses(other: Any) -> Tensor:
            forces = self.scene.get_pairwise_contact_forces(self.objects[name], other)
            return (torch.linalg.norm(forces, dim=-1) > 0).cpu()

        links = [self.agent.robot.links_map[link] for link in fr3.LINKS]
        robot = torch.stack([presses(link) for link in links]).any(dim=0)
        others = {other: presses(actor) for other, actor in self.objects.items() if other != name}
        return {**others, TABLE: presses(self.table), ROBOT: robot}

    def compute_sparse_reward(self, obs: Any, action: Tensor, info: dict) -> Tensor:
        """+1 while strictly successful."""
        return info["success"].float()

    def get_language_instruction(self) -> list[str]:
        """One sentence per environment."""
        return [self.task.instruction] * self.num_envs


def env_class(made: task.Task) -> type[TaskEnv]:
    """The environment class of a task."""
    return type(made.name.partition("-")[0], (TaskEnv,), {"task": made})


for _name in NAMES:
    register_env(_name, max_episode_steps=task.MAX_EPISODE_STEPS, override=True)(env_class(load_task(_name)))
