"""Measurements of the pipeline's hot parts on this machine; each result is one flat dictionary."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from gsrl_core.artifacts import Store
from gsrl_core.assemble import object_bodies, robot_bodies
from gsrl_core.embodiment import SplatEmbodiment, default_device
from gsrl_core.errors import ConfigError
from gsrl_core.hub import fetch_checkpoint
from gsrl_core.interfaces import NullReporter, Observation
from gsrl_core.sections import PipelineConfig
from gsrl_core.sim.task import Task
from gsrl_core.sim.tasks import configured_task
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene, save_scene

_STATIC_GAUSSIANS = 30_000
_RASTER_GAUSSIANS, _RASTER_SIZE = 60_000, (640, 480)
_SECONDS = 5.0


def measure(what: str, config: PipelineConfig) -> Iterator[dict[str, Any]]:
    """Measure one of the parts below at the sizes of ``config``. Raises ConfigError for another name."""
    parts: dict[str, Callable[[PipelineConfig], dict[str, Any]]] = {
        "raster": raster,
        "render": render,
        "physics": physics,
        "policy": policy,
        "iteration": iteration,
    }
    if what not in parts:
        raise ConfigError(f"bench {what!r}; allowed: {', '.join(parts)}")
    yield {"bench": what, **parts[what](config), **_machine()}


def raster(config: PipelineConfig) -> dict[str, Any]:
    """Milliseconds of one picture on the CPU with nothing cached, and of one step of a fit (picture and gradients).

    60,000 Gaussians of harmonic degree 3 at 640x480, whatever ``config`` says, so that figures compare.
    """
    from gsrl_core.geometry.camera import intrinsics, look_at
    from gsrl_core.splat.raster_numba import rasterize

    width, height = _RASTER_SIZE
    view, K = look_at(torch.tensor([0.1, -0.4, 0.7]), torch.tensor([0.4, 0.0, 0.0])), intrinsics(600, 600, 320, 240)
    bench = _random_bench(_RASTER_GAUSSIANS, sh_degree=3)
    leaves = [tensor.clone().requires_grad_() for tensor in bench.tensors()]

    def picture() -> None:
        with torch.no_grad():
            rasterize(*bench.tensors(), view, K, width, height, torch.zeros(3))

    def step() -> None:
        rasterize(*leaves, view, K, width, height, torch.zeros(3))[0].sum().backward()

    return {
        "gaussians": _RASTER_GAUSSIANS,
        "pixels": [width, height],
        "ms_forward": 1000 * _seconds_per_call(picture),
        "ms_forward_backward": 1000 * _seconds_per_call(step),
    }


def render(config: PipelineConfig) -> dict[str, Any]:
    """Frames per second of the splat renderer: the robot moving over a bench, every environment, every camera.

    Averaging (``sim.render_supersample``) and the lens are included.
    """
    from gsrl_core.sim.cameras import CameraRig
    from gsrl_core.splat.raster import make_rasterizer

    device, count = default_device(), config.sim.num_envs
    scene = synthetic_scene(configured_task(config.sim)).to(device)
    rasterizer = make_rasterizer(config.sim.rasterizer, device)
    poses = scene.rest_to_world.repeat(count, 1, 1, 1)
    poses[..., 2, 3] += 0.05 * torch.rand(count, 1, generator=torch.Generator().manual_seed(0)).to(device)
    rig = CameraRig(config.sim.cameras, config.sim.render_downscale, config.sim.render_supersample)
    still = torch.eye(4).expand(count, 4, 4)
    cameras = rig.cameras(poses.cpu(), still)

    def draw() -> None:
        for name, frames in rasterizer.render(scene, poses, cameras).items():
            rig.finished(name, frames)

    seconds = _seconds_per_call(draw)
    return {
        "gaussians": len(scene.body),
        "environments": count,
        "pixels": [list(size)[::-1] for size in rig.sizes().values()],
        "pixels_drawn": [[camera.width, camera.height] for camera in cameras.values()],
        "rasterizer": type(rasterizer).__name__,
        "ms_per_frame": 1000 * seconds / (count * len(cameras)),
        "frames_per_s": count * len(cameras) / seconds,
    }


def physics(config: PipelineConfig) -> dict[str, Any]:
    """Environment steps (control steps) per second of the physics alone, in random and in expert-like motion."""
    from gsrl_core.sim.gs_env import make_physics
    from gsrl_core.sim.pool import worker_count
    from gsrl_core.sim.throughput import motions

    sim, chunk, stages = config.sim, config.policy.action_chunk, config.cluster.pipeline_stage_num
    each = sim.num_envs // stages
    figures: dict[str, Any] = {"environments": sim.num_envs, "stages": stages, "chunk": chunk}
    figures["workers"] = stages * worker_count(sim.workers, each)
    figures |= {name: getattr(sim, name) for name in ("sim_hz", "control_hz", "solver_iterations")}
    with ExitStack() as simulations:
        groups = [simulations.enter_context(closing(make_physics(sim, each))) for _ in range(stages)]
        for name, rate in motions(groups, configured_task(config.sim), chunk, sim.max_episode_steps, _SECONDS):
            figures[f"env_steps_per_s_{name}"] = rate
    return figures


def policy(config: PipelineConfig) -> dict[str, Any]:
    """Action chunks per second of the configured checkpoint in exploration."""
    device, count = default_device(), config.sim.num_envs
    with _inputs(config) as (checkpoint, _):
        agent = SplatEmbodiment(checkpoint, Path(), config).make_policy(device)
    scale = config.sim.render_downscale
    rgb = {
        c.name: torch.zeros(count, c.height // scale, c.width // scale, 3, dtype=torch.uint8, device=device)
        for c in config.sim.cameras
    }
    words = (configured_task(config.sim).instruction,) * count
    observation = Observation(rgb, torch.zeros(count, 9, device=device), words)
    generator = torch.Generator(device).manual_seed(0)
    seconds = _seconds_per_call(lambda: agent.act(observation, generator, explore=True))
    return {"batch": count, "ms_per_batch": 1000 * seconds, "chunks_per_s": count / seconds}


def iteration(config: PipelineConfig) -> dict[str, Any]:
    """Seconds of one PPO iteration (the second of two, so that compilation is not counted)."""
    from gsrl_core.finetune import finetune

    ppo = config.ppo.model_copy(update={"iterations": 2})
    two = config.model_copy(update={"ppo": ppo})
    with _inputs(config) as (checkpoint, folder):
        save_scene(folder / "scene", synthetic_scene(configured_task(config.sim)))
        finetune(checkpoint, folder / "scene", folder / "out", folder / "work", two, NullReporter())
        history = json.loads((folder / "out" / "training.json").read_text())["history"]
    times = {key: value for key, value in history[-1].items() if key.startswith("time/")}
    return {"episodes": ppo.rollout_epochs * config.sim.num_envs, **times}


def synthetic_scene(task: Task, seed: int = 0) -> Scene:
    """A bench of random Gaussians under the robot and the task's objects."""
    return Scene.from_parts(_random_bench(_STATIC_GAUSSIANS, 0, seed), robot_bodies() | object_bodies(task))


def _random_bench(count: int, sh_degree: int, seed: int = 0) -> Gaussians:
    """A table top of ``count`` random flat Gaussians that overlap about as those of a fit do."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([-0.3, -0.7, -0.02]), torch.tensor([1.0, 0.7, 0.0])
    area = float((high - low)[:2].prod())
    scales = math.sqrt(area / count) * torch.tensor([1.0, 0.7, 0.2]) * (0.5 + torch.rand(count, 1, generator=generator))
    return Gaussians(
        means=low + (high - low) * torch.rand(count, 3, generator=generator),
        quats=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=-1),
        log_scales=scales.log(),
        logit_opacities=torch.randn(count, generator=generator) + 1,
        harmonics=0.3 * torch.randn(count, (sh_degree + 1) ** 2, 3, generator=generator),
    )


@contextmanager
def _inputs(config: PipelineConfig) -> Iterator[tuple[Path, Path]]:
    """The configured checkpoint, and a scratch folder."""
    settings = config.policy
    artifact = fetch_checkpoint(settings.checkpoint, settings.revision, settings.sha256, Store(), NullReporter())
    with tempfile.TemporaryDirectory(prefix="gsrl-bench-") as folder:
        yield artifact.path, Path(folder)


def _seconds_per_call(call: Callable[[], object]) -> float:
    call()  # compile, fill caches
    _wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        call()
        calls += 1
    _wait()
    return (time.perf_counter() - start) / calls


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "gpu": gpu, "platform": platform.platform(), "torch": torch.__version__}
