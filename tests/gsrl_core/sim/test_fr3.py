import xml.etree.ElementTree as ET

import numpy as np
import pinocchio
import pytest
import sapien
import torch
from sapien import physx
from sapien.wrapper.urdf_loader import URDFLoader

from gsrl_core.errors import SimulationError
from gsrl_core.geometry import fr3 as geometry_fr3
from gsrl_core.sim import fr3, kinematics
from gsrl_core.sim.kinematics import ArmKinematics
from gsrl_core.sim.merging import merge_fixed_links
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.urdf import robot_builder
from gsrl_core.sim.world import euler_xyz

BENT = np.array([0.3, 0.5, -0.4, -1.9, 0.6, 2.2, 0.1, 0.03, 0.03])


def build(robot):
    scene = sapien.Scene([physx.PhysxCpuSystem()])
    robot.set_scene(scene)
    return scene, robot.build(fix_root_link=True)


def test_the_prepared_urdf_has_no_visuals_no_massless_frames_and_absolute_meshes(urdf):
    robot = ET.parse(urdf).getroot()
    assert not list(robot.iter("visual"))
    assert {link.get("name") for link in robot.findall("link")} == {*fr3.LINKS, fr3.TCP_LINK}
    meshes = [mesh.get("filename") for mesh in robot.iter("mesh")]
    assert len(meshes) == 9
    assert all(name.startswith("/") and name.endswith("_coll.stl") for name in meshes)


def test_preparing_twice_gives_the_same_file_and_leaves_no_other(tmp_path):
    first = fr3.prepare_urdf(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert fr3.prepare_urdf(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [first]


def test_a_broken_source_is_named(tmp_path):
    broken = tmp_path / "fr3.urdf"
    broken.write_text("<robot><link name='base'/>")
    with pytest.raises(SimulationError, match=r"fr3\.urdf"):
        fr3.prepare_urdf(tmp_path, broken)
    broken.write_text("<robot><link name='fr3_link0'/></robot>")
    with pytest.raises(SimulationError, match="fr3_link1"):
        fr3.prepare_urdf(tmp_path, broken)


def test_the_removed_frames_move_no_link(urdf):
    """Forward kinematics of the prepared file against the wheel's own URDF, read by SAPIEN's loader."""
    loader = URDFLoader()
    loader.set_scene(sapien.Scene([physx.PhysxCpuSystem()]))
    text = fr3.source_urdf().read_text()
    bare = urdf.with_name("bare.urdf")
    robot = ET.fromstring(text)
    for link in robot.findall("link"):
        for part in [*link.findall("visual"), *link.findall("collision")]:
            link.remove(part)
    bare.write_bytes(ET.tostring(robot))
    _original_scene, original = build(loader.load_file_as_articulation_builder(str(bare)))
    _scene, prepared = build(robot_builder(urdf))
    for articulation in (original, prepared):
        articulation.set_qpos(BENT)
    there = {link.name: link.entity_pose.to_transformation_matrix() for link in original.get_links()}
    for link in prepared.get_links():
        np.testing.assert_allclose(link.entity_pose.to_transformation_matrix(), there[link.name], atol=2e-6)
    assert sum(link.mass for link in prepared.get_links()) == pytest.approx(
        sum(link.mass for link in original.get_links()), rel=1e-6
    )


def test_the_reader_agrees_with_sapiens_loader(urdf):
    loader = URDFLoader()
    loader.set_scene(sapien.Scene([physx.PhysxCpuSystem()]))
    _a, expected = build(loader.load_file_as_articulation_builder(str(urdf)))
    _b, ours = build(robot_builder(urdf))
    assert [j.name for j in ours.get_active_joints()] == [j.name for j in expected.get_active_joints()]
    np.testing.assert_allclose(ours.get_qlimits(), expected.get_qlimits())
    for mine, theirs in zip(ours.get_links(), expected.get_links(), strict=True):
        assert mine.name == theirs.name
        assert mine.mass == pytest.approx(theirs.mass)
        np.testing.assert_allclose(sorted(mine.inertia), sorted(theirs.inertia), rtol=1e-4)
        np.testing.assert_allclose(mine.cmass_local_pose.p, theirs.cmass_local_pose.p, atol=1e-7)
        assert len(mine.collision_shapes) == len(theirs.collision_shapes)
        for a, b in zip(mine.collision_shapes, theirs.collision_shapes, strict=True):
            assert type(a) is type(b)
            np.testing.assert_allclose(
                a.local_pose.to_transformation_matrix(), b.local_pose.to_transformation_matrix(), atol=1e-6
            )


def test_merged_links_are_where_they_were_and_weigh_what_they_weighed(urdf):
    merged = merge_fixed_links(robot_builder(urdf))
    _a, whole = build(robot_builder(urdf))
    _b, robot = build(merged.builder)
    assert len(robot.get_links()) == len(whole.get_links()) - 2
    for articulation in (whole, robot):
        articulation.set_qpos(BENT)
    frames = merged.located(robot)
    for link in whole.get_links():
        there = frames[link.name].entity_pose.to_transformation_matrix()
        np.testing.assert_allclose(there, link.entity_pose.to_transformation_matrix(), atol=2e-6)
    # Gravity's torques tell masses and their centres, velocities after a push also the moments of inertia.
    for articulation in (whole, robot):
        articulation.set_qvel(np.linspace(-1, 1, 9))
    forces = [articulation.compute_passive_force() for articulation in (whole, robot)]
    np.testing.assert_allclose(forces[1], forces[0], atol=1e-3)
    assert sum(len(link.collision_shapes) for link in robot.get_links()) == sum(
        len(link.collision_shapes) for link in whole.get_links()
    )


def test_names_and_posture_are_those_of_the_splat_scene():
    assert fr3.LINKS == geometry_fr3.LINKS
    assert fr3.START_QPOS == geometry_fr3.START_QPOS


def test_inverse_kinematics_reaches_targets_and_agrees_with_maniskills_setting(urdf):
    from sapien.wrapper.pinocchio_model import PinocchioModel

    arm = ArmKinematics(urdf)
    reference = PinocchioModel(urdf.read_text(), [0, 0, -9.81])
    reference.set_joint_order([*fr3.ARM_JOINTS, *fr3.FINGER_JOINTS])
    reference.set_link_order([fr3.TCP_LINK])
    rng = np.random.default_rng(0)
    for _ in range(10):
        start = np.array(fr3.START_QPOS)
        start[:7] += rng.normal(0, 0.1, 7)
        goal = arm.tcp(start)
        goal[:3, 3] += rng.uniform(-0.06, 0.06, 3)
        goal[:3, :3] = euler_xyz(rng.uniform(-0.1, 0.1, 3)) @ goal[:3, :3]
        solution = arm.solve(goal, start)
        np.testing.assert_allclose(arm.tcp([*solution, 0, 0]), goal, atol=1.1e-4)
        theirs, success, _ = reference.compute_inverse_kinematics(
            0, sapien.Pose(goal), initial_qpos=start, active_qmask=np.array([1] * 7 + [0] * 2), max_iterations=100
        )
        assert success
        assert np.abs(solution - theirs[:7]).max() < 0.03


def test_too_far_is_what_no_joints_reach_and_no_iteration_finds(urdf):
    arm, rng = ArmKinematics(urdf), np.random.default_rng(0)

    def goal(pose):
        return pinocchio.SE3(pose) * arm._tcp_from_joint

    for _ in range(500):
        assert not arm._is_too_far(goal(arm.tcp([*rng.uniform(-3, 3, 7), 0, 0])))
    start, far = np.array(fr3.START_QPOS), 0
    for _ in range(60):
        pose = arm.tcp(start)
        pose[:3, 3] += rng.normal(0, 0.25, 3)
        pose[:3, :3] = euler_xyz(rng.uniform(-0.5, 0.5, 3)) @ pose[:3, :3]
        if arm._is_too_far(goal(pose)):
            far += 1
            assert arm._iterate(goal(pose), start, kinematics._FAST) is None
            assert arm._iterate(goal(pose), start, kinematics._MANISKILL) is None
    assert far > 10


def test_an_unreachable_target_has_no_solution(urdf):
    arm = ArmKinematics(urdf)
    goal = arm.tcp(np.array(fr3.START_QPOS))
    goal[0, 3] = 2.0
    assert arm.solve(goal, np.array(fr3.START_QPOS)) is None


def test_euler_angles_follow_maniskills_convention():
    from mani_skill.utils.geometry.rotation_conversions import euler_angles_to_matrix

    angles = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 3))
    for row in angles:
        expected = euler_angles_to_matrix(torch.tensor(row), "XYZ").numpy()
        np.testing.assert_allclose(euler_xyz(row), expected, atol=1e-12)


def test_settings_name_what_is_allowed(urdf):
    with pytest.raises(SimulationError, match="pd_ee_target_delta_pose"):
        WorldSettings(urdf, control_mode="pd_ee_delta_position")
    with pytest.raises(SimulationError, match="multiple"):
        WorldSettings(urdf, sim_hz=95)
