"""The scene that the render benchmarks draw: an FR3-shaped robot of capsules, a cube, a plate, a table and a room.

Made to cost what the scene did by which the targets were set: there, of 150,000 foreground splats 42,000 were in the
third-person view and touched 133,000 tiles; here 46,000 and 135,000 (``python benchmarks/render_scene.py`` counts them
on the CPU, for six sets of poses).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.geometry.rotation import make_rigid, rotvec_to_matrix
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.harmonics import colors_to_harmonics
from gsrl_core.splat.scene import Scene

LINKS = {  # name -> axis from, axis to, radius (m) in the link's frame
    "fr3_link0": ((-0.05, 0, 0.05), (0, 0, 0.2), 0.09),
    "fr3_link1": ((0, 0, -0.19), (0, 0, 0), 0.065),
    "fr3_link2": ((0, 0, 0), (0, -0.19, 0), 0.065),
    "fr3_link3": ((0, 0, -0.12), (0.08, 0, 0), 0.06),
    "fr3_link4": ((0, 0, 0), (-0.08, 0.12, 0), 0.06),
    "fr3_link5": ((0, 0, -0.26), (0, 0.03, 0), 0.055),
    "fr3_link6": ((0, 0, 0), (0.088, 0, 0.02), 0.05),
    "fr3_link7": ((0, 0, 0), (0, 0, 0.1), 0.045),
    "fr3_hand": ((0, -0.09, 0.03), (0, 0.09, 0.03), 0.035),
    "fr3_leftfinger": ((0, 0, 0), (0, 0, 0.045), 0.012),
    "fr3_rightfinger": ((0, 0, 0), (0, 0, 0.045), 0.012),
}
# Modified Denavit-Hartenberg parameters of the FR3's joints (Franka's documentation): a, d (m), alpha (rad).
JOINTS = (
    (0.0, 0.333, 0.0), (0.0, 0.0, -math.pi / 2), (0.0, 0.316, math.pi / 2), (0.0825, 0.0, math.pi / 2),
    (-0.0825, 0.384, -math.pi / 2), (0.0, 0.0, math.pi / 2), (0.088, 0.0, math.pi / 2),
)  # fmt: skip
REST = (0.0, math.pi / 8, 0.0, -5 * math.pi / 8, 0.0, 3 * math.pi / 4, math.pi / 4)
NAMES = (*LINKS, "cube", "plate")


def scene(foreground: int = 150_000, background: int = 300_000, coefficients: int = 1, seed: int = 0) -> Scene:
    """A scene of that many splats.

    Args:
        foreground: splats of robot, cube and plate together.
        background: splats of table and room.
        coefficients: 1 or 16 spherical-harmonic coefficients for each channel.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    areas = {name: 2 * math.pi * r * (math.dist(a, b) + 2 * r) for name, (a, b, r) in LINKS.items()}
    areas |= {"cube": 6 * 0.04**2, "plate": 2 * math.pi * 0.1**2}
    total = sum(areas.values())
    bodies = {}
    for name, area in areas.items():
        count = round(foreground * area / total)
        if name == list(areas)[-1]:
            count = foreground - sum(len(part) for part, _ in bodies.values())
        points = _points(name, count, generator)
        bodies[name] = (_splats(points, 0.0026, coefficients, generator), torch.eye(4))
    table = torch.rand(background // 2, 3, generator=generator) * torch.tensor([1.6, 1.6, 0.01])
    table = table - torch.tensor([0.3, 0.8, 0.02])
    room = _box(background - len(table), generator) * torch.tensor([4.0, 4.0, 2.5]) + torch.tensor([0.0, 0.0, 0.5])
    static = Gaussians.concatenate(
        [_splats(table, 0.004, coefficients, generator), _splats(room, 0.016, coefficients, generator)]
    )
    return Scene.from_parts(static, bodies)


def poses(count: int, seed: int = 1) -> Tensor:
    """body_to_world, float32 [count, M, 4, 4], of random joint positions and objects on the table."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.tensor(REST) + 0.2 * torch.randn(count, 7, generator=generator)
    frames, at = [torch.eye(4).repeat(count, 1, 1)], torch.eye(4).repeat(count, 1, 1)
    for joint, (a, d, alpha) in enumerate(JOINTS):
        turn_x = make_rigid(rotvec_to_matrix(torch.tensor([alpha, 0.0, 0.0])), torch.tensor([a, 0.0, 0.0]))
        turn_z = rotvec_to_matrix(torch.nn.functional.pad(q[:, joint, None], (2, 0)))
        at = at @ turn_x @ make_rigid(turn_z, torch.tensor([0.0, 0.0, d]).expand(count, 3))
        frames.append(at)
    hand = at @ make_rigid(rotvec_to_matrix(torch.tensor([0.0, 0.0, -math.pi / 4])), torch.tensor([0.0, 0.0, 0.107]))
    frames.append(hand)
    frames += [hand @ make_rigid(torch.eye(3), torch.tensor([0.0, side, 0.0584])) for side in (0.03, -0.03)]
    for height in (0.02, 0.005):
        place = torch.rand(count, 3, generator=generator) * torch.tensor([0.25, 0.4, 0.0])
        yaw = torch.rand(count, generator=generator) * 6.28
        frames.append(
            make_rigid(
                rotvec_to_matrix(torch.nn.functional.pad(yaw[:, None], (2, 0))),
                place + torch.tensor([0.35, -0.2, height]),
            )
        )
    return torch.stack(frames, dim=1).contiguous()


def third_person() -> Camera:
    """One fixed 640 x 480 camera that looks down at table, gripper and forearm."""
    view = look_at(torch.tensor([[1.2, 0.2, 0.6]]), torch.tensor([[0.55, 0.0, 0.05]]))
    return Camera(view, intrinsics(700.0, 700.0, 318.0, 243.0)[None], 640, 480)


def jittered(count: int, turn: float = 0.02, shift: float = 0.01, seed: int = 2) -> Camera:
    """:func:`third_person`, turned (rad) and moved (m) a little differently in each of ``count`` environments."""
    generator, camera = torch.Generator().manual_seed(seed), third_person()
    turns, shifts = (size * torch.randn(count, 3, generator=generator) for size in (turn, shift))
    view = make_rigid(rotvec_to_matrix(turns), shifts) @ camera.world_to_camera
    return Camera(view.contiguous(), camera.K.repeat(count, 1, 1), camera.width, camera.height)


def wrist(body_to_world: Tensor) -> Camera:
    """A 320 x 240 camera on each environment's hand, which looks along the fingers."""
    mount = look_at(torch.tensor([0.08, 0.0, -0.03]), torch.tensor([0.0, 0.0, 0.15]), up=(0.0, 1.0, 0.0))
    view = mount.to(body_to_world) @ torch.linalg.inv(body_to_world[:, NAMES.index("fr3_hand")])
    K = intrinsics(230.0, 230.0, 160.0, 120.0).to(view)
    return Camera(view.contiguous(), K.repeat(len(view), 1, 1), 320, 240)


def _points(name: str, count: int, generator: torch.Generator) -> Tensor:
    if name == "cube":
        return 0.04 * _box(count, generator)
    if name == "plate":
        radius = 0.1 * torch.rand(count, 1, generator=generator).sqrt()
        angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
        height = 0.01 * torch.rand(count, 1, generator=generator)
        return torch.cat([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    start, end, radius = LINKS[name]
    along = torch.rand(count, 1, generator=generator)
    axis = torch.tensor(start) * (1 - along) + torch.tensor(end) * along
    return axis + radius * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)


def _box(count: int, generator: torch.Generator) -> Tensor:
    """Points on the surface of the unit cube around the origin."""
    points = torch.rand(count, 3, generator=generator) - 0.5
    face = torch.randint(0, 6, (count,), generator=generator)
    points[torch.arange(count), face % 3] = (face // 3) - 0.5
    return points


def _splats(points: Tensor, size: float, coefficients: int, generator: torch.Generator) -> Gaussians:
    count = len(points)
    scales = math.log(size) + 0.5 * torch.randn(count, 3, generator=generator)
    stripes = 0.5 + 0.4 * torch.sin(points @ torch.tensor([[40.0, 9, 3], [5, 60, 14], [31, 22, 80]]))
    harmonics = torch.zeros(count, coefficients, 3)
    harmonics[:, :1] = colors_to_harmonics(stripes)
    harmonics[:, 1:] = 0.1 * torch.randn(count, coefficients - 1, 3, generator=generator)
    opacities = 0.5 + 1.5 * torch.randn(count, generator=generator)
    return Gaussians(points.float(), torch.randn(count, 4, generator=generator), scales, opacities, harmonics)


def _count() -> None:
    """Print what one frame costs, counted on the CPU."""
    from gsrl_core.splat.composite_numba import project_bodies
    from gsrl_core.splat.picture_numba import camera_arrays
    from gsrl_core.splat.raster_numba import NumbaRasterizer

    rasterizer, body_to_world = NumbaRasterizer(), poses(6)
    rasterizer._load(scene())
    assert rasterizer._bodies is not None
    for name, camera in (("third person", third_person()), ("wrist", wrist(body_to_world))):
        found = []
        for i in range(len(body_to_world)):
            view, K = (t[i if len(camera) > 1 else 0] for t in (camera.world_to_camera, camera.K))
            views = (view.double() @ body_to_world[i].double())[:, :3].contiguous().numpy()
            lens, size = camera_arrays(view, K)[1], (camera.width, camera.height)
            entries = project_bodies(*rasterizer._bodies, rasterizer._body_first, views, lens, *size)[2]
            found.append((len(set(entries.tolist())), len(entries)))
        visible, entries = torch.tensor(found).float().mean(0).tolist()
        print(f"{name}: {visible:,.0f} visible foreground splats, {entries:,.0f} tile entries")


if __name__ == "__main__":
    _count()
