"""Parity vectors: observations with fixed noise and the actions that the policy gave for them when it was packaged.

A fresh process, another machine or another build of the libraries must reproduce them within the tolerance of the
precision; without fixed noise the comparison would mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gsrl_core.deploy.camera import SimulatedCamera
from gsrl_core.deploy.contract import Contract
from gsrl_core.deploy.kinematics import tcp_pose
from gsrl_core.deploy.limits import Array
from gsrl_core.deploy.robot import RobotState
from gsrl_core.deploy.service import SEED_KEY, PolicyService
from gsrl_core.errors import PackageError
from gsrl_core.interfaces import Rasterizer
from gsrl_core.splat.scene import Scene

FILE = "vectors.safetensors"
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-3}
"""Largest difference of any action value (m, rad, gripper share); bfloat16 has 8 bits of mantissa."""

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Placement:
    """Where arm and objects are in one observation, and the seed of the policy's noise."""

    q: Array
    """[7] rad."""
    fingers: tuple[float, float]
    """m."""
    objects: Mapping[str, Array]
    """base_from_body [4, 4]."""
    seed: int


@dataclass(frozen=True)
class Vectors:
    """N observations and what they must give."""

    images: NDArray[np.uint8]
    """[N, h, w, 3] RGB."""
    states: NDArray[np.float32]
    """[N, S]."""
    seeds: NDArray[np.int64]
    """[N]."""
    actions: NDArray[np.float32]
    """[N, H, 7]."""

    def request(self, i: int, contract: Contract) -> dict[str, Any]:
        """The i-th request."""
        return {
            contract.camera.key: self.images[i],
            contract.state_key: self.states[i],
            contract.prompt_key: contract.instruction,
            SEED_KEY: int(self.seeds[i]),
        }


def transform(pose: Array) -> Array:
    """base_from_body [4, 4] of ``pose`` [7]: position (m), quaternion wxyz."""
    w, axis = pose[3], pose[4:]
    turn = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    base_from_body = np.eye(4)
    base_from_body[:3, :3] += 2 * (w * turn + turn @ turn)
    base_from_body[:3, 3] = pose[:3]
    return base_from_body


def make_vectors(
    service: PolicyService,
    contract: Contract,
    scene: Scene,
    rasterizer: Rasterizer,
    placements: Sequence[Placement],
) -> Vectors:
    """Render the placements and record the policy's answers."""
    images, states, actions = [], [], []
    for placement in placements:
        width = placement.fingers[0] + placement.fingers[1]
        state = RobotState(placement.q, np.zeros(7), tcp_pose(placement.q), np.zeros(6), width, 0.0)
        camera = SimulatedCamera(scene, rasterizer, contract.camera, lambda s=state: s, placement.objects)
        request = {
            contract.camera.key: camera.read().rgb,
            contract.state_key: state.observation.astype(np.float32),
            contract.prompt_key: contract.instruction,
            SEED_KEY: placement.seed,
        }
        images.append(request[contract.camera.key])
        states.append(request[contract.state_key])
        actions.append(service.infer(request)["actions"])
    seeds = np.array([placement.seed for placement in placements], np.int64)
    return Vectors(np.stack(images), np.stack(states), seeds, np.stack(actions))


def check_vectors(answer: Answer, vectors: Vectors, contract: Contract) -> dict[str, float]:
    """Ask for every vector and compare; returns the largest difference and the tolerance.

    Raises:
        PackageError: a chunk of another shape, values that are not finite, or a difference beyond the tolerance.
    """
    tolerance = TOLERANCE[contract.precision]
    worst = 0.0
    for i in range(len(vectors.seeds)):
        given = np.asarray(answer(vectors.request(i, contract))["actions"])
        wanted = vectors.actions[i]
        if given.shape != wanted.shape:
            raise PackageError(f"parity vector {i}: the policy gave a chunk of {given.shape}, expected {wanted.shape}")
        difference = float(np.abs(given - wanted).max())
        if not difference <= tolerance:
            raise PackageError(
                f"parity vector {i}: actions differ by {difference:.2e} (tolerance {tolerance:.0e} for "
                f"{contract.precision}); weights, libraries or preprocessing are not those of the package"
            )
        worst = max(worst, difference)
    return {"max_difference": worst, "tolerance": tolerance}


def color_sensitivity(answer: Answer, vectors: Vectors, contract: Contract) -> float:
    """Largest change of an action when red and blue are swapped: parity sees a BGR mix-up if it is above tolerance."""
    worst = 0.0
    for i in range(len(vectors.seeds)):
        request = vectors.request(i, contract)
        request[contract.camera.key] = np.ascontiguousarray(vectors.images[i][..., ::-1])
        worst = max(worst, float(np.abs(np.asarray(answer(request)["actions"]) - vectors.actions[i]).max()))
    return worst


def save_vectors(folder: Path, vectors: Vectors) -> None:
    """Write vectors.safetensors (bit-exact)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "images": vectors.images,
        "states": vectors.states,
        "seeds": vectors.seeds,
        "actions": vectors.actions,
    }
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / FILE)


def load_vectors(folder: Path, contract: Contract) -> Vectors:
    """Read them back. Raises PackageError when they are missing or do not fit the contract."""
    try:
        tensors = load_file(folder / FILE)
        vectors = Vectors(**{name: tensors[name] for name in ("images", "states", "seeds", "actions")})
    except (OSError, SafetensorError, KeyError) as error:
        raise PackageError(f"{folder / FILE}: no readable parity vectors ({error}); package again") from error
    count = len(vectors.seeds)
    shapes = {
        "images": (vectors.images, (count, *contract.camera.shape)),
        "states": (vectors.states, (count, contract.state_dim)),
        "actions": (vectors.actions, (count, contract.horizon, contract.action.dim)),
    }
    wrong = [
        f"{name} {value.shape} instead of {shape}" for name, (value, shape) in shapes.items() if value.shape != shape
    ]
    if wrong or not count:
        raise PackageError(
            f"{folder / FILE} does not fit the contract: {', '.join(wrong) or 'no vectors'}; package again"
        )
    return vectors


def measure_latency(service: PolicyService, vectors: Vectors, contract: Contract, samples: int) -> dict[str, Any]:
    """Milliseconds per chunk over ``samples`` requests after one warm-up; without network and camera."""
    warm_up = service.warm_up()
    times = []
    for i in range(samples):
        started = time.perf_counter()
        service.infer(vectors.request(i % len(vectors.seeds), contract))
        times.append(1000.0 * (time.perf_counter() - started))
    p50, p95 = np.percentile(times, [50, 95])
    return {
        "infer_ms": {"p50": float(p50), "p95": float(p95), "max": max(times)},
        "warm_up_ms": warm_up,
        "samples": samples,
        "includes": "preprocessing and policy; neither network nor camera",
    }
