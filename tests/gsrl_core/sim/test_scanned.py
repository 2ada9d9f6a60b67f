"""Objects from files: shapes, mass properties, frames, and what is refused."""

import numpy as np
import pytest
import torch
import trimesh
from sim_helpers import PoseRasterizer, blobs, empty_scene, sim_config

from gsrl_core.assemble import object_bodies
from gsrl_core.errors import SimulationError
from gsrl_core.sim import scanned, task
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.tasks import load_task
from gsrl_core.splat.ply import write_ply


def rotation(quat):
    return trimesh.transformations.quaternion_matrix(quat)[:3, :3]


@pytest.fixture
def wedge(tmp_path):
    """A solid without symmetry, off its file's origin, in millimetres."""
    corners = [[10, 5, 0], [70, 5, 0], [70, 45, 0], [10, 45, 0], [10, 5, 30], [40, 45, 20]]
    mesh = trimesh.convex.convex_hull(np.array(corners, dtype=float))
    mesh.export(tmp_path / "wedge.obj")
    return tmp_path / "wedge.obj"


def test_mass_properties_are_those_of_the_uniform_solid(wedge):
    thing = scanned.object_from_file("wedge", wedge, scale=0.001, mass=0.3)
    solid = trimesh.load_mesh(wedge)
    solid.apply_scale(0.001)
    solid.density = 0.3 / solid.volume
    middle = solid.bounds.mean(axis=0)
    np.testing.assert_allclose(thing.center, solid.center_mass - middle, atol=1e-8)
    axes = rotation(thing.axes)
    inertia = axes @ np.diag(thing.inertia) @ axes.T
    np.testing.assert_allclose(inertia, solid.moment_inertia, rtol=1e-5, atol=1e-11)
    assert scanned.half_height(thing) == pytest.approx(0.015)


def test_pieces_stay_apart_and_share_the_mass(tmp_path):
    """A dumbbell of two cubes: its hull would fill the gap between them."""
    left, right = trimesh.creation.box((0.02,) * 3), trimesh.creation.box((0.02,) * 3)
    left.apply_translation([-0.03, 0, 0.01])
    right.apply_translation([0.03, 0, 0.01])
    trimesh.util.concatenate([left, right]).export(tmp_path / "dumbbell.ply")
    file = tmp_path / "dumbbell.ply"
    thing = scanned.object_from_file("dumbbell", file, parts=file, mass=0.2)
    assert [len(hull) for hull in thing.hulls] == [8, 8]
    # Two cubes of 0.1 kg at 30 mm from the axis: m (a^2 / 6 + 2 d^2 / 2).
    expected = sorted([0.2 * 0.02**2 / 6, *[0.2 * (0.02**2 / 6 + 0.03**2)] * 2])
    np.testing.assert_allclose(sorted(thing.inertia), expected, rtol=1e-6)
    assert len(scanned.object_from_file("hull", file).hulls) == 1


def test_round_objects_are_held_at_any_angle_and_long_ones_across():
    can = load_task("PickAndPlace-v0").bodies[0]
    held = scanned.grasp(can)
    assert held.turns == 0 and held.width == pytest.approx(0.052, abs=5e-4)


@pytest.mark.parametrize("angle", [0.0, 0.5, -1.2])
def test_the_fingers_close_across_the_narrow_side(tmp_path, angle):
    bar = trimesh.creation.box((0.12, 0.03, 0.03))
    bar.apply_transform(trimesh.transformations.rotation_matrix(angle, [0, 0, 1]))
    bar.export(tmp_path / "bar.obj")
    held = scanned.grasp(scanned.object_from_file("bar", tmp_path / "bar.obj"))
    assert held.turns == 2 and held.width == pytest.approx(0.03, abs=1e-3)
    assert abs((held.angle - angle + np.pi / 2) % np.pi - np.pi / 2) < 0.02


def test_the_expert_takes_a_concave_object_by_one_of_its_pieces(tmp_path):
    """An L, whose bounding box has its middle beside it."""
    long, short = trimesh.creation.box((0.09, 0.025, 0.03)), trimesh.creation.box((0.025, 0.05, 0.03))
    short.apply_translation([0.0325, 0.0375, 0])
    file = tmp_path / "ell.ply"
    trimesh.util.concatenate([long, short]).export(file)
    options = {"mesh": str(file), "parts": str(file), "noun": "ell"}
    played = load_task("PickAndPlace-v0", options)
    held = scanned.grasp(played.bodies[0])
    assert held.width == pytest.approx(0.025, abs=1e-3)
    assert np.ptp(played.bodies[0].hulls[0], axis=0)[0] == pytest.approx(0.09)
    sim = sim_config(task="PickAndPlace-v0", task_options=options, num_envs=10, workers=2)
    expert = played.expert()
    with make_env(sim, empty_scene(task.body_names(played)), PoseRasterizer()) as env:
        env.reset(range(10))
        while True:
            step = env.step_chunk(expert(env.privileged())[:, None])
            if (step.terminated | step.truncated).all():
                break
    assert step.success.sum() >= 9


def test_fine_meshes_are_reduced_without_shrinking(tmp_path):
    trimesh.creation.icosphere(subdivisions=4, radius=0.03).export(tmp_path / "ball.ply")
    thing = scanned.object_from_file("ball", tmp_path / "ball.ply")
    assert len(thing.hulls[0]) <= scanned.MOST_VERTICES
    np.testing.assert_allclose(np.ptp(thing.hulls[0], axis=0), 0.06, atol=1e-4)


@pytest.fixture
def scan(tmp_path):
    """Splats of a box 30 x 20 x 40 mm that stands at (1, 2, 0), and one that floats far away."""
    grid = torch.cartesian_prod(*(torch.linspace(-h, h, 9) for h in (0.015, 0.01, 0.02)))
    means = torch.cat([grid + torch.tensor([1.0, 2.0, 0.02]), torch.tensor([[1.0, 2.5, 0.3]])])
    write_ply(tmp_path / "scan.ply", blobs(means, [0.002] * 3, [0.2, 0.6, 0.3]))
    return tmp_path / "scan.ply"


def test_a_scan_alone_gives_shape_and_looks(scan):
    played = load_task("PickAndPlace-v0", {"splat": str(scan), "noun": "wooden block"})
    thing = played.bodies[0]
    assert thing.name == "wooden_block" and "wooden block" in played.instruction
    np.testing.assert_allclose(np.ptp(thing.hulls[0], axis=0), [0.03, 0.02, 0.04], atol=1e-4)
    gaussians, rest = object_bodies(played)["wooden_block"]
    np.testing.assert_allclose(gaussians.means[:-1].mean(dim=0), 0, atol=1e-4)
    # It stands on the table where episodes start.
    low = gaussians.means[:-1, 2].min() + rest[2, 3]
    assert float(low) == pytest.approx(0, abs=1e-4)
    assert played.files() == (scan,)


def test_the_looks_of_a_mesh_lie_on_its_shape(wedge):
    played = load_task("PickAndPlace-v0", {"mesh": str(wedge), "scale": 0.001})
    means = object_bodies(played)["can"][0].means.numpy()
    corners = played.bodies[0].hulls[0]
    assert (means >= corners.min(axis=0) - 1e-3).all() and (means <= corners.max(axis=0) + 1e-3).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh": "/nowhere/mug.obj"}, "mug.obj cannot be read: No such file"),
        ({"mesh": "WEDGE"}, "measures 60000 x 40000 x 30000 mm; choose a scale"),
        ({"mesh": "WEDGE", "scale": 0.0025}, "100 mm wide at its narrowest, the hand holds 75 mm"),
        ({"mesh": "WEDGE", "scale": 0.0018, "goal": "plate"}, "on the plate; choose a smaller scale"),
        ({"mesh": "FLAT"}, "flat or empty"),
        ({"mesh": "TEXT"}, "not a readable mesh|has no triangles"),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, wedge, options, said):
    flat = trimesh.Trimesh([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]], [[0, 1, 2]])
    flat.export(tmp_path / "flat.ply")
    (tmp_path / "text.obj").write_text("nothing")
    files = {"WEDGE": str(wedge), "FLAT": str(tmp_path / "flat.ply"), "TEXT": str(tmp_path / "text.obj")}
    options = options | {"mesh": files.get(options["mesh"], options["mesh"])}
    with pytest.raises(SimulationError, match=said):
        task.check_task(load_task("PickAndPlace-v0", options))


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "box.ply"
    sizes = []
    for size in (0.02, 0.03):
        trimesh.creation.box((size,) * 3).export(file)
        file.touch()
        sizes.append(scanned.half_height(scanned.object_from_file("box", file)))
    assert sizes == pytest.approx([0.01, 0.015])
