import math

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3, urdf_path
from gsrl_core.geometry.urdf import load_urdf


def test_two_link_arm_by_hand(tmp_path):
    (tmp_path / "arm.urdf").write_text("""<robot name="arm"><link name="a"/><link name="b"/><link name="c"/>
      <joint name="slide" type="prismatic"><parent link="b"/><child link="c"/><origin xyz="1 0 0"/>
        <axis xyz="0 0 2"/></joint>
      <joint name="turn" type="revolute"><parent link="a"/><child link="b"/><origin xyz="0 0 1" rpy="0 0 0"/>
        <axis xyz="0 0 1"/></joint></robot>""")
    robot = load_urdf(tmp_path / "arm.urdf")
    assert robot.moving == ("turn", "slide")
    poses = robot.forward([math.pi / 2, 0.25])
    assert poses["c"][:3, 3].tolist() == pytest.approx([0.0, 1.0, 1.25], abs=1e-6)
    assert poses["c"][:3, 0].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    with pytest.raises(SceneError, match="2 needed"):
        robot.forward([0.0])


def test_fr3_at_zero_stands_at_the_sum_of_its_link_lengths():
    # Franka's Denavit-Hartenberg parameters: 0.333 + 0.316 + 0.384 - 0.107 - 0.1034 high, 0.088 forward.
    pose = fr3().forward([0.0] * 9)["fr3_hand_tcp"]
    assert pose[:3, 3].tolist() == pytest.approx([0.088, 0.0, 0.333 + 0.316 + 0.384 - 0.107 - 0.1034], abs=1e-5)
    assert pose[:3, 2].tolist() == pytest.approx([0.0, 0.0, -1.0], abs=1e-5)


def test_fr3_agrees_with_the_denavit_hartenberg_chain():
    # Craig's convention, rows (a, d, alpha) of https://frankarobotics.github.io/docs/control_parameters.html.
    rows = [(0, 0.333, 0), (0, 0, -1), (0, 0.316, 1), (0.0825, 0, 1), (-0.0825, 0.384, -1), (0, 0, 1), (0.088, 0, 1)]
    expected = torch.eye(4, dtype=torch.float64)
    for (a, d, quarter), q in zip(rows, START_QPOS, strict=False):
        ca, sa, cq, sq = math.cos(quarter * math.pi / 2), math.sin(quarter * math.pi / 2), math.cos(q), math.sin(q)
        expected = expected @ torch.tensor(
            [[cq, -sq, 0, a], [sq * ca, cq * ca, -sa, -d * sa], [sq * sa, cq * sa, ca, d * ca], [0, 0, 0, 1]],
            dtype=torch.float64,
        )
    torch.testing.assert_close(fr3().forward(START_QPOS)["fr3_link7"], expected.float(), atol=1e-6, rtol=0)


def test_open_fingers_are_80_mm_apart_and_mirrored():
    poses = fr3().forward(START_QPOS)
    left, right = poses["fr3_leftfinger"], poses["fr3_rightfinger"]
    assert (left[:3, 3] - right[:3, 3]).norm().item() == pytest.approx(0.08, abs=1e-6)
    torch.testing.assert_close(left[:3, 1], -right[:3, 1], atol=1e-6, rtol=0)


def test_every_seen_link_has_a_visual_mesh():
    assert set(LINKS) == set(fr3().visuals)
    assert urdf_path().is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not xml", "not a readable URDF"),
        ("<robot><link name='a'/><link name='b'/></robot>", "exactly one root"),
        (
            "<robot><link name='a'/><joint name='j' type='fixed'><parent link='zz'/><child link='b'/></joint></robot>",
            "do not exist",
        ),
        (
            "<robot><link name='a'/><link name='b'/><joint name='j' type='floating'><parent link='a'/>"
            "<child link='b'/></joint></robot>",
            "floating",
        ),
        (
            "<robot><link name='a'><visual><geometry><mesh filename='gone.dae'/></geometry></visual></link></robot>",
            "does not exist",
        ),
        ("<robot><link name='a'><visual><geometry><box size='1 1 1'/></geometry></visual></link></robot>", "mesh"),
    ],
)
def test_broken_descriptions_are_refused(tmp_path, text, message):
    (tmp_path / "robot.urdf").write_text(text)
    with pytest.raises(SceneError, match=message):
        load_urdf(tmp_path / "robot.urdf")
