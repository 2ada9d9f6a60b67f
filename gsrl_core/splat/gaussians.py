"""A set of 3D Gaussians as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gsrl_core.errors import SceneError
from gsrl_core.geometry.rotation import matrix_to_quat, quat_multiply, quat_to_matrix
from gsrl_core.splat.harmonics import rotate_harmonics, sh_degree


@dataclass(frozen=True)
class Gaussians:
    """N Gaussians of one frame: float32 tensors on one device."""

    means: Tensor
    """[N, 3] centres (m)."""
    quats: Tensor
    """[N, 4] wxyz, rotation from the Gaussian's axes to the frame; normalised where they are used."""
    log_scales: Tensor
    """[N, 3] natural logarithm of the standard deviations (m) along the Gaussian's axes."""
    logit_opacities: Tensor
    """[N] opacity before the sigmoid."""
    harmonics: Tensor
    """[N, K, 3] spherical-harmonic coefficients, K in {1, 4, 9, 16}; see :mod:`gsrl_core.splat.harmonics`."""

    def __post_init__(self) -> None:
        n = self.means.shape[0]
        given = [tuple(t.shape) for t in (self.means, self.quats, self.log_scales, self.logit_opacities)]
        if given != [(n, 3), (n, 4), (n, 3), (n,)] or self.harmonics.shape[:1] + self.harmonics.shape[2:] != (n, 3):
            raise SceneError(
                f"Gaussians: shapes {given} and {tuple(self.harmonics.shape)} must be means [N, 3], quats [N, 4], "
                "log_scales [N, 3], logit_opacities [N], harmonics [N, K, 3]"
            )
        sh_degree(self.harmonics.shape[1])

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int:
        """Degree of the harmonics, 0 to 3."""
        return sh_degree(self.harmonics.shape[1])

    def select(self, index: Tensor | slice) -> Gaussians:
        """The Gaussians chosen by a bool mask [N], int64 indices or a slice."""
        return Gaussians(*(tensor[index] for tensor in self.tensors()))

    def to(self, device: torch.device | str) -> Gaussians:
        """The same Gaussians with tensors on ``device``."""
        return Gaussians(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(means, quats, log_scales, logit_opacities, harmonics): the argument order of the rasterisers."""
        return self.means, self.quats, self.log_scales, self.logit_opacities, self.harmonics

    def with_sh_degree(self, degree: int) -> Gaussians:
        """The same Gaussians with harmonics cut to, or padded with zeros up to, ``degree``."""
        count = (degree + 1) ** 2
        sh_degree(count)
        kept = self.harmonics[:, :count]
        padding = kept.new_zeros(len(self), count - kept.shape[1], 3)
        return Gaussians(*self.tensors()[:4], torch.cat([kept, padding], dim=1))

    def transformed(self, rotation: Tensor, translation: Tensor, scale: float = 1.0) -> Gaussians:
        """The Gaussians moved by ``x -> scale * rotation @ x + translation``; harmonics turn, log scales grow.

        Args:
            rotation: [3, 3].
            translation: [3] (m).
            scale: positive.

        Raises:
            SceneError: ``scale`` is not positive.
        """
        if not scale > 0:
            raise SceneError(f"Gaussians: scale {scale} must be positive (a mirror image is not a similarity)")
        rotation, translation = rotation.to(self.means), translation.to(self.means)
        return Gaussians(
            means=scale * (self.means @ rotation.T) + translation,
            quats=quat_multiply(matrix_to_quat(rotation), self.quats),
            log_scales=self.log_scales + math.log(scale),
            logit_opacities=self.logit_opacities,
            harmonics=rotate_harmonics(self.harmonics, rotation),
        )

    def stretched(self, factors: Tensor) -> Gaussians:
        """The Gaussians scaled along the frame's axes by ``factors`` [3]; covariances follow, harmonics do not change.

        Raises:
            SceneError: a factor is not positive.
        """
        if not bool((factors > 0).all()):
            raise SceneError(f"Gaussians: stretch factors {factors.tolist()} must be positive")
        factors = factors.to(self.means)
        axes = factors[:, None] * quat_to_matrix(self.quats) * self.log_scales.exp()[:, None, :]
        rotation, scales, _ = torch.linalg.svd(axes)
        rotation = rotation * torch.linalg.det(rotation)[:, None, None].sign()  # -R spans the same ellipsoid
        return Gaussians(
            means=factors * self.means,
            quats=matrix_to_quat(rotation),
            log_scales=scales.log(),
            logit_opacities=self.logit_opacities,
            harmonics=self.harmonics,
        )

    @staticmethod
    def concatenate(parts: Sequence[Gaussians]) -> Gaussians:
        """All Gaussians of ``parts`` in order; lower degrees are padded to the highest.

        Raises:
            SceneError: ``parts`` is empty.
        """
        if not parts:
            raise SceneError("Gaussians.concatenate: no parts given; use Gaussians.empty() for an empty set")
        degree = max(part.sh_degree for part in parts)
        columns = zip(*(part.with_sh_degree(degree).tensors() for part in parts), strict=True)
        return Gaussians(*(torch.cat(column) for column in columns))

    @staticmethod
    def empty(degree: int = 0) -> Gaussians:
        """No Gaussians, with harmonics of ``degree``."""
        shapes = ((0, 3), (0, 4), (0, 3), (0,), (0, (degree + 1) ** 2, 3))
        return Gaussians(*(torch.zeros(shape) for shape in shapes))
