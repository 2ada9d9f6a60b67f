"""What a real camera and bench do to a rendered picture: shadow, background, exposure, tone and noise.

Each episode's values are drawn from its seed alone, and each picture's noise from seed, control step and camera, so an
environment shows the same bits whatever the batch around it. What acts on pixels is made of table look-ups, additions,
products and square roots, which give the same bits for every batch size. All that is off is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsrl_core.geometry.camera import Camera
from gsrl_core.geometry.rotation import rigid_motions
from gsrl_core.sections import RealismConfig
from gsrl_core.sim.backgrounds import load_backgrounds
from gsrl_core.sim.passes import passes
from gsrl_core.sim.shadow import ContactShadow
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.scene import Scene

# Distinguishes this stream from those of the start state (0, task.py) and of perturbations (1, perturb.py).
_REALISM_STREAM = 2
_NOISE_STREAM = 3
_NOISE_PLACES = 1 << 22
"""Places at which a picture's noise may begin in the table of normal numbers."""
_FLAT = "random"
_UNCHANGED = (1.0, 1.0)


@dataclass(frozen=True)
class Look:
    """One episode's draw."""

    tone: Tensor
    """float32 [3, 256]: level (0 .. 255, unbounded) that each channel's level becomes."""
    camera_turn: np.ndarray
    """float64 [3]: rotation vector (rad) of the cameras' jitter, as in :class:`gsrl_core.sim.perturb.Episode`."""
    camera_shift: np.ndarray
    """float64 [3]: translation (m)."""
    color: Tensor
    """uint8 [3]: flat background."""
    picture: int
    """Number of the background picture, 0 or more, to be taken modulo their count."""


def draw_look(config: RealismConfig, seed: int) -> Look:
    """The look of the episode ``seed``: always the same for the same seed and ranges."""
    rng = np.random.Generator(np.random.PCG64([_REALISM_STREAM, seed]))
    # Every quantity is drawn whether used or not, so that one knob does not shift the draws of the others.
    exposure = rng.uniform(*config.exposure_range)
    balance = rng.uniform(*config.white_balance_range, 3)
    gamma, contrast = rng.uniform(*config.gamma_range), rng.uniform(*config.contrast_range)
    turn = np.radians(config.camera_turn_deg) * rng.standard_normal(3)
    shift = config.camera_shift * rng.standard_normal(3)
    color, picture = rng.integers(256, size=3), rng.integers(1 << 30)
    return Look(
        tone=torch.from_numpy(tone_table(exposure * balance, gamma, contrast)),
        camera_turn=turn,
        camera_shift=shift,
        color=torch.tensor(color, dtype=torch.uint8),
        picture=int(picture),
    )


def tone_table(gain: np.ndarray, gamma: float, contrast: float) -> np.ndarray:
    """Level that each level becomes: 255 (1/2 + contrast ((gain v / 255)^gamma - 1/2)), float32 [3, 256].

    Args:
        gain: factor of each channel, [3].
        gamma: exponent; above 1 darkens the middle.
        contrast: factor of the distance from middle grey.
    """
    value = (np.arange(256) / 255 * gain[:, None]) ** gamma
    return (255 * (0.5 + contrast * (value - 0.5))).astype(np.float32)


def toned(rgb: Tensor, tables: Tensor) -> Tensor:
    """Levels float32 [b, h, w, 3] of uint8 ``rgb`` [b, h, w, 3] through ``tables`` float32 [b, 3, 256]."""
    start = 256 * torch.arange(3 * len(rgb), device=rgb.device).reshape(-1, 1, 1, 3)
    return torch.take(tables, rgb.long() + start)


def noisy(levels: Tensor, normal: Tensor, read: float, shot: float) -> Tensor:
    """``levels`` (0 .. 255, any shape) with noise of variance read^2 + shot^2 level / 255.

    A level above 255 is saturated and its noise is lost with it in the end, as on a sensor.

    Args:
        levels: float32.
        normal: float32, standard normal numbers of the same shape.
        read: standard deviation at black (levels).
        shot: standard deviation at white without ``read`` (levels).
    """
    variance = levels.clamp(0, 255) * (shot * shot / 255) + read * read
    return levels + variance.sqrt() * normal


def over_background(rgb: Tensor, alpha: Tensor, background: Tensor) -> Tensor:
    """The scene over another background than black.

    Args:
        rgb: uint8 [b, h, w, 3], drawn over black.
        alpha: float32 [b, h, w].
        background: uint8 [b, h, w, 3] or [b, 1, 1, 3].

    Returns:
        uint8 [b, h, w, 3]: rgb + (1 - alpha) background.
    """
    mixed = rgb + (1 - alpha)[..., None] * background
    return mixed.round().clamp(0, 255).to(torch.uint8)


class Realism:
    """The switches of one environment, acting on its pictures on the device."""

    def __init__(
        self, config: RealismConfig, scene: Scene, rays: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        """Prepare what is on.

        Args:
            config: strengths and ranges.
            scene: its bodies throw shadows.
            rays: of every camera, float32 [h, w, 2] (``CameraRig.rays``).
            device: where pictures are.

        Raises:
            SimulationError: the folder of backgrounds cannot be used.
        """
        self._config = config
        self._device = torch.device(device)
        self._rays = {name: ray.to(self._device) for name, ray in rays.items()}
        self._shadow = ContactShadow(scene, config.shadow) if config.shadow else None
        self._pictures: dict[str, Tensor] = {}
        if config.background not in (None, _FLAT):
            folder = Path(config.background).expanduser()
            self._pictures = {
                name: load_backgrounds(folder, *ray.shape[:2]).to(self._device) for name, ray in rays.items()
            }
        ranges = (config.exposure_range, config.white_balance_range, config.gamma_range, config.contrast_range)
        self._tones = any(values != _UNCHANGED for values in ranges)
        self._noise = None
        if config.read_noise or config.shot_noise:
            # One table for all pictures: drawing for each environment apart would cost a launch for each.
            size = _NOISE_PLACES + max(3 * ray[..., 0].numel() for ray in rays.values())
            generator = torch.Generator().manual_seed(_NOISE_STREAM)
            self._noise = torch.randn(size, generator=generator).to(self._device)
        self._seeds = np.zeros(0, np.uint64)

    @property
    def needs_extras(self) -> bool:
        """Whether depth, alpha and body id are needed."""
        return self._shadow is not None or self._config.background is not None

    def begin(self, seeds: Sequence[int]) -> Tensor:
        """Draw the looks of new episodes; the cameras' jitter, float32 [B, 4, 4]."""
        looks = [draw_look(self._config, seed) for seed in seeds]
        self._seeds = np.array(seeds, np.uint64)
        self._tables = torch.stack([look.tone for look in looks]).to(self._device)
        self._colors = torch.stack([look.color for look in looks]).to(self._device)
        self._chosen = torch.tensor([look.picture for look in looks], device=self._device)
        return rigid_motions([look.camera_turn for look in looks], [look.camera_shift for look in looks])

    def on_scene(self, name: str, frames: Frames, camera: Camera, body_to_world: Tensor, envs: Tensor) -> Tensor:
        """What changes before the light reaches the camera: shadow and background.

        Args:
            name: of the camera.
            frames: its pictures of b environments, with extras if they are needed.
            camera: where they were taken from, 1 or b poses.
            body_to_world: [b, M, 4, 4] in the scene's order.
            envs: int64 [b] on the CPU, which environments of the batch these are.

        Returns:
            uint8 [b, h, w, 3]; the very tensor of ``frames`` if nothing is on.
        """
        rgb = frames.rgb
        if self._shadow is not None:
            rgb = self._shadow.darken(rgb, frames, camera, self._rays[name], body_to_world)
        if self._config.background is not None and frames.alpha is not None:
            rgb = self._with_background(name, rgb, frames.alpha, envs.to(self._device))
        return rgb

    def on_sensor(self, name: str, rgb: Tensor, elapsed: np.ndarray, envs: Tensor) -> Tensor:
        """What the camera does: exposure, white balance, gamma, contrast, noise.

        Args:
            name: of the camera.
            rgb: uint8 [b, h, w, 3].
            elapsed: [b] control steps since the reset; each has noise of its own.
            envs: int64 [b] on the CPU.

        Returns:
            uint8 [b, h, w, 3]; the very tensor ``rgb`` if nothing is on.
        """
        if not self._tones and self._noise is None:
            return rgb
        places = noise_places(self._seeds[envs.numpy()], elapsed, list(self._rays).index(name))
        on_device, out = envs.to(self._device), torch.empty_like(rgb)
        for part in passes(rgb, rgb[0].numel()):
            levels = toned(rgb[part], self._tables[on_device[part]]) if self._tones else rgb[part].float()
            if self._noise is not None:
                normal = _windows(self._noise, places[part], levels[0].numel()).view_as(levels)
                levels = noisy(levels, normal, self._config.read_noise, self._config.shot_noise)
            out[part] = levels.round().clamp(0, 255).to(torch.uint8)
        return out

    def _with_background(self, name: str, rgb: Tensor, alpha: Tensor, envs: Tensor) -> Tensor:
        out = torch.empty_like(rgb)
        for part in passes(rgb, rgb[0].numel()):
            if self._pictures:
                pictures = self._pictures[name]
                behind = pictures[self._chosen[envs[part]] % len(pictures)]
            else:
                behind = self._colors[envs[part], None, None]
            out[part] = over_background(rgb[part], alpha[part], behind)
        return out


def noise_places(seeds: np.ndarray, elapsed: np.ndarray, camera: int) -> np.ndarray:
    """Where the noise of each picture begins in the table, int64 [b] in 0 .. 2^22 - 1.

    A hash (the mixing of splitmix64, Steele et al. 2014) of seeds [b], control steps [b] and the camera's number,
    because a random generator for each picture would cost more than drawing it.
    """
    mixed = np.zeros(len(seeds), np.uint64)
    for value in (seeds, elapsed, np.full(len(seeds), camera)):
        mixed = (mixed ^ value.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed % np.uint64(_NOISE_PLACES)).astype(np.int64)


def _windows(table: Tensor, places: np.ndarray, length: int) -> Tensor:
    # [b, length] stretches of a table.
    return torch.stack([table[place : place + length] for place in places.tolist()])
