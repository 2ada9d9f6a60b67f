import math

import numpy as np
import pytest
import trimesh

from gsrl_core.geometry import props


def solid(mesh):
    return trimesh.Trimesh(*mesh, process=False)


def test_cube_is_a_closed_40_mm_cube():
    cube = solid(props.cube_mesh())
    assert cube.is_watertight and cube.is_winding_consistent
    assert cube.volume == pytest.approx(0.04**3)
    np.testing.assert_allclose(cube.bounds, [[-0.02] * 3, [0.02] * 3])


def test_plate_is_closed_concave_and_rests_on_the_table():
    plate = solid(props.plate_mesh())
    assert plate.is_watertight and plate.is_winding_consistent and not plate.is_convex and plate.volume > 0
    np.testing.assert_allclose(
        plate.bounds[:, 2] + props.PLATE_ORIGIN_HEIGHT, [0.0, props.PLATE_RIM_HEIGHT], atol=1e-12
    )
    np.testing.assert_allclose(plate.extents[:2], 2 * props.PLATE_RADIUS, rtol=1e-3)


def test_plate_volume_approaches_that_of_the_solid_of_revolution():
    # Pappus: 2 pi * (area * centroid radius) of the wall's cross-section, plus the floor disc.
    r, z = np.array(props._WALL).T
    cross = r * np.roll(z, -1) - np.roll(r, -1) * z
    wall = 2 * math.pi * ((r + np.roll(r, -1)) * cross).sum() / 6
    floor = math.pi * props.PLATE_FLOOR_RADIUS**2 * props.PLATE_FLOOR_THICKNESS
    assert solid(props.plate_mesh(720)).volume == pytest.approx(wall + floor, rel=1e-4)


def test_convex_parts_are_convex_and_fill_the_plate():
    parts = [solid(part) for part in props.plate_convex_parts(48)]
    assert all(part.is_watertight and part.is_convex and part.volume > 0 for part in parts)
    assert sum(part.volume for part in parts) == pytest.approx(solid(props.plate_mesh(48)).volume, rel=1e-9)


def test_a_resting_cube_passes_the_seeds_height_test():
    floor = props.PLATE_FLOOR_THICKNESS - props.PLATE_ORIGIN_HEIGHT
    assert 0.003 < floor + props.CUBE_HALF < 0.07
    assert math.hypot(props.CUBE_HALF, props.CUBE_HALF) < props.PLATE_FLOOR_RADIUS


@pytest.mark.parametrize("make", [props.plate_mesh, props.plate_convex_parts])
def test_too_few_segments_are_refused(make):
    with pytest.raises(ValueError, match="at least 3"):
        make(2)
