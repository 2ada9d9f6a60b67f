import numpy as np
import pytest
import torch

from gsrl_core import assemble
from gsrl_core.errors import SceneError
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3
from gsrl_core.geometry.props import cube_mesh, plate_mesh
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.from_mesh import load_mesh
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics, sh_colors
from gsrl_core.splat.ply import write_ply
from gsrl_core.splat.scene import load_scene

BODIES = (*LINKS, "cube", "plate")


def cloud(count=50, center=(0.0, 0.0, 0.0), spread=0.02, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        torch.randn(count, 3, generator=generator) * spread + torch.tensor(center),
        torch.randn(count, 4, generator=generator),
        torch.full((count, 3), -6.0),
        torch.zeros(count),
        colors_to_harmonics(torch.rand(count, 3, generator=generator)),
    )


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    write_ply(folder / "bench.ply", cloud(30))
    scene = assemble.assemble_scene(folder / "bench.ply", folder / "scene", robot_gaussians=2500)
    return scene, folder / "scene"


def test_all_bodies_are_there_and_saved(assembled):
    scene, folder = assembled
    assert scene.names == BODIES and len(scene.part(None)) == 30
    loaded = load_scene(folder)
    assert loaded.names == BODIES and torch.equal(loaded.body, scene.body)
    count = sum(len(scene.part(link)) for link in LINKS)
    assert 2300 <= count <= 2700 and len(scene.part("cube")) == 300 and len(scene.part("plate")) == 1000


@pytest.mark.parametrize("name", BODIES)
def test_each_body_fills_the_bounds_of_its_mesh(assembled, name):
    scene, _ = assembled
    if name in ("cube", "plate"):
        vertices = {"cube": cube_mesh, "plate": plate_mesh}[name]()[0]
    else:
        vertices = np.concatenate([load_mesh(visual.mesh).vertices for visual in fr3().visuals[name]])
    means = scene.part(name).means.numpy()
    low, high = vertices.min(0), vertices.max(0)
    size = (high - low).max()
    assert (means >= low - 1e-4).all() and (means <= high + 1e-4).all()
    assert (np.abs(means.min(0) - low) < 0.12 * size).all() and (np.abs(means.max(0) - high) < 0.12 * size).all()


def test_bodies_stand_where_the_start_posture_puts_them(assembled):
    scene, _ = assembled
    poses = fr3().forward(START_QPOS)
    for link in LINKS:
        torch.testing.assert_close(scene.rest_to_world[scene.index(link)], poses[link])
    assert scene.rest_to_world[scene.index("cube"), :3, 3].tolist() == pytest.approx([0.4, 0.2, 0.02])
    world = scene.posed().means[30:]
    assert world[:, 2].min() > -0.002  # nothing sinks into the table
    assert 0.9 > world[:, 2].max() > 0.6


def test_shells_are_white_joints_dark_and_the_cube_red(assembled):
    scene, _ = assembled

    def colors(name):
        part = scene.part(name)
        return sh_colors(part.harmonics, part.means)

    assert colors("fr3_link1").min(dim=1).values.mean() > 0.7
    brightness = colors("fr3_link5").mean(1)
    assert (brightness < 0.2).float().mean() > 0.1 and (brightness > 0.7).float().mean() > 0.4
    cube = colors("cube")
    assert (cube[:, 0] > 2 * cube[:, 1]).all()


def test_the_robot_is_not_lit_flat(assembled):
    scene, _ = assembled
    part = scene.part("fr3_link2")
    assert sh_colors(part.harmonics, part.means).mean(1).std() > 0.03


def test_too_few_gaussians_and_missing_inputs_are_refused(tmp_path):
    with pytest.raises(SceneError, match="at least 220"):
        assemble.robot_bodies(100)
    with pytest.raises(SceneError, match="cannot be read"):
        assemble.assemble_scene(tmp_path / "gone.ply", tmp_path / "out")
    with pytest.raises(SceneError, match="at least one"):
        assemble.assemble_scene(None, tmp_path / "out")


@pytest.fixture
def gsenv(tmp_path):
    """A small folder in the layout of RLinf/gsenv-assets-v0: a blob of Gaussians on every link, in base coordinates."""
    root = tmp_path / "gsenv" / "assets"
    poses = fr3().forward(START_QPOS)
    for seed, link in enumerate(LINKS):
        path = root / "robot" / "my_franka" / "parts" / f"{link}_3dgs_abs.ply"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ply(path, cloud(20, (0.01, 0.02, 0.03), seed=seed).transformed(poses[link][:3, :3], poses[link][:3, 3]))
    for name in ("cube", "plate"):
        (root / "object" / name).mkdir(parents=True)
        write_ply(root / "object" / name / "object_3dgs_abs.ply", cloud(200, (0.3, -0.2, 0.5), seed=99))
    (root / "object" / "table").mkdir()
    write_ply(root / "object" / "table" / "table_abs.ply", cloud(40))
    return tmp_path / "gsenv"


def test_gsenv_robot_parts_are_moved_into_their_links(gsenv, tmp_path):
    scene = assemble.assemble_scene(None, tmp_path / "out", gsenv=gsenv)
    assert scene.names == BODIES and len(scene.part(None)) == 40
    for seed, link in enumerate(LINKS):
        # RLinf lifts the robot's splats by 20 mm in the base frame.
        rotation = scene.rest_to_world[scene.index(link), :3, :3]
        lift = rotation.T @ torch.tensor([0.0, 0.0, 0.02])
        expected = cloud(20, (0.01, 0.02, 0.03), seed=seed).means + lift
        torch.testing.assert_close(scene.part(link).means, expected, atol=1e-5, rtol=0)


def test_gsenv_objects_are_centred_and_rest_on_their_underside(gsenv):
    bodies = assemble.gsenv_bodies(gsenv, assemble.object_bodies(load_task()))
    cube, plate = bodies["cube"][0].means, bodies["plate"][0].means
    assert cube.mean(0)[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert plate.mean(0)[:2].tolist() == pytest.approx([-0.005, -0.005], abs=1e-6)
    for means in (cube, plate):
        assert torch.quantile(means[:, 2], 0.01).item() == pytest.approx(-0.02, abs=1e-6)
    # The plate is stretched by (0.96, 1, 0.96).
    ratio = (plate.std(0) / cube.std(0)).tolist()
    assert ratio == pytest.approx([0.96, 1.0, 0.96], rel=1e-4)


def test_an_incomplete_gsenv_folder_names_the_missing_file(gsenv, tmp_path):
    (gsenv / "assets" / "robot" / "my_franka" / "parts" / "fr3_hand_3dgs_abs.ply").unlink()
    with pytest.raises(SceneError, match=r"fr3_hand_3dgs_abs\.ply is missing"):
        assemble.assemble_scene(None, tmp_path / "out", gsenv=gsenv)
