"""The ManiSkill side: agent ``my_franka`` and environment ``PutCubeOnPlate-v0``. Importing this module registers both.

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

from gsrl_core.sim import fr3, task
from gsrl_core.sim.bodies import TABLE_QUAT, furnish, prepare_finger, prepare_table


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
                prepare_finger(link)


class _ObjectBuilder(ActorBuilder):
    """Cube or plate, by name. ManiSkill's builder reads convex shapes from files, but the plate's are vertices."""

    def build_physx_component(self, link_parent: physx.PhysxArticulationLinkComponent | None = None) -> Any:
        component = super().build_physx_component(link_parent)
        furnish(component, self.name, task.OBJECT_FRICTION)
        return component


@register_env(task.TASK, max_episode_steps=task.MAX_EPISODE_STEPS, override=True)
class PutCubeOnPlate(BaseEnv):
    """Put the cube on the plate: strict ``success`` (on the plate, released, at rest) beside the seed's looser test.

    The start depends on the episode seed alone; unseeded resets draw one from ManiSkill's main generator.
    """

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
        table.add_plane_collision(sapien.Pose(q=TABLE_QUAT))
        table.set_initial_pose(sapien.Pose())
        self.table = table.build_static("table")
        for body in self.table._bodies:
            for shape in body.collision_shapes:
                prepare_table(shape)
        self.cube = self._add_object("cube", task.CUBE_CENTER)
        self.plate = self._add_object("plate", task.PLATE_CENTER)

    def _add_object(self, name: str, position: tuple[float, ...]) -> Actor:
        builder = _ObjectBuilder().set_scene(self.scene)
        builder.set_initial_pose(sapien.Pose(position))
        return builder.build(name)

    def _load_lighting(self, options: dict) -> None:
        """Nothing is drawn here."""

    def _initialize_episode(self, env_idx: Tensor, options: dict) -> None:
        seeds = np.asarray(self._episode_seed).reshape(-1)[env_idx.cpu().numpy()]
        starts = [task.start_state(task.EpisodeSpec(int(seed))) for seed in seeds]

        def stacked(field: str) -> Tensor:
            values = np.stack([getattr(start, field) for start in starts])
            return torch.as_tensor(values, dtype=torch.float32, device=self.device)

        self.agent.robot.set_pose(sapien.Pose())
        self.agent.reset(stacked("qpos"))
        self.cube.set_pose(Pose.create_from_pq(stacked("cube")))
        self.plate.set_pose(Pose.create_from_pq(stacked("plate")))
        self._before_control_step()

    def _before_control_step(self) -> None:
        self._cubes_before = self.cube.pose.to_transformation_matrix().cpu().numpy()

    def evaluate(self) -> dict[str, Tensor]:
        """Strict ``success``, ``success_seed`` and the parts of strict success, bool [num_envs] each."""
        plate_force, other_force = self._cube_forces()
        plates, cubes = (body.pose.to_transformation_matrix().cpu().numpy() for body in (self.plate, self.cube))
        verdicts = []
        for i in range(self.num_envs):
            speed, spin = task.mean_speeds(self._cubes_before[i], cubes[i], self.control_timestep)
            state = task.ObjectState(
                cube_position=cubes[i, :3, 3],
                plate_position=plates[i, :3, 3],
                plate_up=plates[i, :3, 2],
                cube_speed=speed,
                cube_spin=spin,
                cube_on_plate=bool(plate_force[i]),
                cube_elsewhere=bool(other_force[i]),
            )
            verdicts.append(task.judge(state))
        names = ("success", "success_seed", "inside", "resting", "released", "still")
        return {
            name: torch.tensor([getattr(v, name) for v in verdicts], dtype=torch.bool, device=self.device)
            for name in names
        }

    def _cube_forces(self) -> tuple[Tensor, Tensor]:
        """Whether the plate, and whether the robot or the table, presses on the cube: bool [num_envs] each."""

        def presses(other: Any) -> Tensor:
            return torch.linalg.norm(self.scene.get_pairwise_contact_forces(self.cube, other), dim=-1) > 0

        links = [self.agent.robot.links_map[name] for name in (*fr3.LINKS[-3:], fr3.LINKS[7])]
        elsewhere = torch.stack([presses(other) for other in (*links, self.table)]).any(dim=0)
        return presses(self.plate), elsewhere

    def compute_sparse_reward(self, obs: Any, action: Tensor, info: dict) -> Tensor:
        """+1 while strictly successful."""
        return info["success"].float()

    def get_language_instruction(self) -> list[str]:
        """One sentence per environment."""
        return [task.INSTRUCTION] * self.num_envs
