"""Frames per second of the batched renderer beside the seed's method, in one run on one GPU.

    PYTHONPATH=. python benchmarks/render.py [--no-baseline] [--environments 1 64 256] [--stages] [--sizes] [--pictures]

640 x 480, 150,000 foreground splats over a cached background of 300,000; transforms, composite and uint8 included;
poses are on the device, as physics leaves them, and so are our pictures (the baseline's are on the host, as the
seed's). Two cameras: the same and a 320 x 240 wrist view in which table and room move too. Jitter: the camera has a
pose of its own in each environment, given anew in every frame, as an environment with camera jitter does; the picture
of table and room is cached for each up to 129 environments, and drawn live for more. Times are medians of wall clock
around one render and a device synchronisation.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import render_reference
import render_scene
from render_baseline import SeedRenderer

from gsrl_core.geometry.camera import Camera
from gsrl_core.sim.supersample import averaged
from gsrl_core.splat.cuda.recording import Recording
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.raster_gsplat import GsplatRasterizer
from gsrl_core.splat.raster_numba import NumbaRasterizer
from gsrl_core.splat.scene import Scene

GIB = 1 << 30
SETS = 4
"""Sets of poses that the timed frames go through."""


def seconds(draw: Callable[[Tensor], object], poses: list[Tensor], repeats: int, warm_up: int = 3) -> float:
    """Median time of one frame."""
    times = []
    for i in range(warm_up + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        draw(poses[i % len(poses)])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak(reserve: Callable[[], float]) -> tuple[float, float]:
    """Result of ``reserve`` and the largest device memory in use meanwhile (GiB)."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = reserve()
    return result, torch.cuda.max_memory_allocated() / GIB


def ours(scene: Scene, environments: int, wrist: bool, recorded: bool) -> tuple[float, float]:
    """Seconds per vectorised frame and peak memory (GiB)."""
    sets = [render_scene.poses(environments, seed).cuda() for seed in range(SETS)]
    moved = {id(poses): {"wrist": render_scene.wrist(poses)} if wrist else {} for poses in sets}

    def measure() -> float:
        rasterizer, fixed = CudaRasterizer(), {"third": render_scene.third_person()}
        if recorded:
            cameras = fixed | moved[id(sets[0])]
            recording = Recording(rasterizer, scene, sets[0], cameras, moving=tuple(moved[id(sets[0])]))
            return seconds(lambda p: recording(p, moved[id(p)]), sets, 20)
        return seconds(lambda p: rasterizer.render(scene, p, fixed | moved[id(p)]), sets, 20)

    return peak(measure)


def jittered(scene: Scene, environments: int) -> tuple[float, float]:
    """As :func:`ours` for a camera that stands a little elsewhere in each environment."""
    sets = [render_scene.poses(environments, seed).cuda() for seed in range(SETS)]
    camera = render_scene.jittered(environments)

    def measure() -> float:
        rasterizer = CudaRasterizer()
        return seconds(lambda p: rasterizer.render(scene, p, {"third": camera.select(slice(None))}), sets, 20)

    return peak(measure)


def baseline(scene: Scene, environments: int) -> tuple[float, float]:
    """Seconds per vectorised frame and peak memory (GiB) of the seed's method."""
    sets = [render_scene.poses(environments, seed).cuda() for seed in range(2)]
    few = environments >= 64

    def measure() -> float:
        renderer = SeedRenderer(scene, render_scene.third_person(), environments)
        return seconds(renderer, sets, 3 if few else 9, 1 if few else 3)

    return peak(measure)


def stages(scene: Scene, environments: int, wrist: bool) -> None:
    """Print the device time of every kernel of one vectorised frame."""
    from torch.profiler import ProfilerActivity, profile

    poses, rasterizer = render_scene.poses(environments).cuda(), CudaRasterizer()

    def draw() -> None:  # a new object each time, so that the wrist camera counts as moving
        cameras = {"third": render_scene.third_person()} | ({"wrist": render_scene.wrist(poses)} if wrist else {})
        rasterizer.render(scene, poses, cameras)

    for _ in range(3):
        draw()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        draw()
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    text = ", ".join(
        f"{row.key.split('(')[0].removeprefix('void ')} {row.self_device_time_total / 1e3:.3f}" for row in rows[:9]
    )
    print(f"stages at {environments}{' with wrist' if wrist else ''}, ms: {text}")


def pictures(name: str, scene: Scene) -> None:
    """Print how far our pictures are from gsplat's and from the CPU rasteriser's, four environments each."""
    poses, views = render_scene.poses(4), {"third": render_scene.third_person()}
    views["wrist"] = render_scene.wrist(poses)
    alone = {n: (scene.part(n), pose) for n, pose in zip(scene.names, scene.rest_to_world, strict=True)}
    bodies = Scene.from_parts(Gaussians.empty(), alone)
    ours, gsplat, cpu = CudaRasterizer(), GsplatRasterizer(), NumbaRasterizer()
    for what, drawn, expected in (
        ("bodies alone, to gsplat", bodies, gsplat.render(bodies, poses, views)),
        ("bodies alone, to the CPU", bodies, cpu.render(bodies, poses, views)),
        ("all, to gsplat's contributions", scene, None),
        ("all, to raster_gsplat's quick rule of hiding", scene, gsplat.render(scene, poses, views)),
        ("all, to the CPU", scene, cpu.render(scene, poses, views)),
    ):
        for view, frames in ours.render(drawn, poses, views).items():
            other = expected[view].rgb if expected else render_reference.render(drawn, poses, views[view])
            error = (frames.rgb.int().cpu() - other.int().cpu()).abs()
            psnr = 10 * math.log10(255**2 / max(float(error.float().square().mean()), 1e-9))
            beyond = int((error > 2).sum())
            print(f"{name}, {view}: {what}: {psnr:.1f} dB, max {int(error.max())}, {beyond} of {error.numel()} above 2")


def sizes(scene: Scene, environments: int) -> None:
    """Print what a picture of 160 x 120 costs: drawn at its size, or larger and averaged, and how near that is."""
    poses, rasterizer, full = render_scene.poses(environments).cuda(), CudaRasterizer(), render_scene.third_person()
    finest = None
    for n in (4, 3, 2, 1):
        camera = full.scaled(n / 4)

        def draw(camera: Camera = camera, n: int = n) -> Tensor:
            return averaged(rasterizer.render(scene, poses, {"c": camera})["c"], n).rgb

        took, seen = seconds(lambda _, draw=draw: draw(), [poses], 20), draw().float()
        finest = seen if finest is None else finest
        near = 10 * math.log10(255**2 / max(float((seen - finest).square().mean()), 1e-9))
        size, rate = f"{camera.width} x {camera.height}", environments / took
        print(f"160 x 120 from {size}, {environments} envs: {rate:.0f} frames/s, {near:.1f} dB to the finest")


def row(what: str, count: int, took: float, memory: float, base: float | None) -> None:
    """Print one row of the table: seconds for a frame of ``count`` environments, GiB, and the baseline's seconds."""
    ratio = f"{base / took:7.1f}" if base else ""
    print(f"{what:38} {count:4} {took * 1e3:9.3f} {count / took:9.0f} {memory:6.2f} {ratio}", flush=True)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--stages", action="store_true", help="also print the kernels' times")
    parser.add_argument("--sizes", action="store_true", help="also what small pictures cost and lose")
    parser.add_argument("--pictures", action="store_true", help="also compare pictures with gsplat and the CPU")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    scenes = {"degree 0": render_scene.scene(), "degree 3": render_scene.scene(coefficients=16)}
    print(f"{'what':38} {'envs':>4} {'ms':>9} {'frames/s':>9} {'GiB':>6} {'ratio':>7}")
    for count in options.environments:
        base = None
        if not options.no_baseline:
            base, memory = baseline(scenes["degree 0"], count)
            row("seed method (baseline)", count, base, memory, base)
        for name, scene in scenes.items():
            for wrist in (False, True):
                for recorded in (False, True):
                    what = f"ours, {name}{', + wrist' if wrist else ''}{', CUDA graph' if recorded else ''}"
                    row(what, count, *ours(scene, count, wrist, recorded), None if wrist else base)
            row(f"ours, {name}, jitter", count, *jittered(scene, count), base)
    if options.sizes:
        sizes(scenes["degree 0"], max(options.environments))
    if options.pictures:
        for name, scene in scenes.items():
            pictures(name, scene)
    if options.stages:
        for wrist in (False, True):
            for count in options.environments:
                stages(scenes["degree 0"], count, wrist)


if __name__ == "__main__":
    main()
