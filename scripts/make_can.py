"""Writes the can that PickAndPlace-v0 carries by default (gsrl_core/bundled/objects/can.ply).

uv run python scripts/make_can.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import trimesh

OUT = Path(__file__).parents[1] / "gsrl_core" / "bundled" / "objects" / "can.ply"
RADIUS, HEIGHT, SEGMENTS = 0.026, 0.08, 32
METAL, RED, CREAM = (176, 178, 182), (196, 32, 38), (238, 228, 202)
# (height above the underside, colour of the wall from there up)
BANDS = ((0.0, METAL), (0.006, RED), (0.028, CREAM), (0.052, RED), (0.074, METAL), (HEIGHT, METAL))


def can() -> trimesh.Trimesh:
    """A closed cylinder; rings are doubled where the colour changes."""
    angle = 2 * np.pi * np.arange(SEGMENTS) / SEGMENTS
    circle = RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    here, there = np.arange(SEGMENTS), np.roll(np.arange(SEGMENTS), -1)
    vertices, colors, faces = [], [], []

    def add(points: np.ndarray, color: tuple[int, int, int]) -> int:
        first = sum(map(len, vertices))
        vertices.append(points)
        colors.append(np.tile((*color, 255), (len(points), 1)))
        return first

    def ring(z: float) -> np.ndarray:
        return np.column_stack([circle, np.full(SEGMENTS, z)])

    for (low, color), (high, _) in itertools.pairwise(BANDS):
        a, b = add(ring(low), color), add(ring(high), color)
        faces += [np.stack([a + here, a + there, b + there], 1), np.stack([a + here, b + there, b + here], 1)]
    for z, step in ((0.0, -1), (HEIGHT, 1)):
        edge, middle = add(ring(z), METAL), add(np.array([[0.0, 0.0, z]]), METAL)
        faces.append(np.stack([np.full(SEGMENTS, middle), edge + here, edge + there], 1)[:, ::step])
    return trimesh.Trimesh(np.concatenate(vertices), np.concatenate(faces), process=False,
                           vertex_colors=np.concatenate(colors).astype(np.uint8))  # fmt: skip


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    can().export(OUT, encoding="binary")
    print(OUT, OUT.stat().st_size, "bytes")
