"""Writes the can that PickAndPlace-v0 carries by default (gsrl_core/bundled/objects/can.ply).

uv run python scripts/make_can.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

OUT = Path(__file__).parents[1] / "gsrl_core" / "bundled" / "objects" / "can.ply"
RADIUS, HEIGHT, SEGMENTS = 0.026, 0.08, 32
METAL, RED, CREAM = (176, 178, 182), (196, 32, 38), (238, 228, 202)
# (height above the underside, colour of the wall from there up)
BANDS = ((0.0, METAL), (0.006, RED), (0.028, CREAM), (0.052, RED), (0.074, METAL), (HEIGHT, METAL))


def can() -> trimesh.Trimesh:
    """A closed cylinder with one colour per face (those of vertices would blend when equal vertices are merged)."""
    angle = 2 * np.pi * np.arange(SEGMENTS) / SEGMENTS
    circle = RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    here, there = np.arange(SEGMENTS), np.roll(np.arange(SEGMENTS), -1)
    vertices = [np.column_stack([circle, np.full(SEGMENTS, z)]) for z, _ in BANDS]
    vertices += [np.array([[0.0, 0.0, 0.0], [0.0, 0.0, HEIGHT]])]
    faces, colors = [], []
    for i, (_, color) in enumerate(BANDS[:-1]):
        a, b = i * SEGMENTS, (i + 1) * SEGMENTS
        faces += [np.stack([a + here, a + there, b + there], 1), np.stack([a + here, b + there, b + here], 1)]
        colors += [color] * (2 * SEGMENTS)
    top, below, above = (len(BANDS) - 1) * SEGMENTS, len(BANDS) * SEGMENTS, len(BANDS) * SEGMENTS + 1
    faces.append(np.stack([np.full(SEGMENTS, below), there, here], 1))
    faces.append(np.stack([np.full(SEGMENTS, above), top + here, top + there], 1))
    colors += [METAL] * (2 * SEGMENTS)
    paint = np.column_stack([colors, np.full(len(colors), 255)]).astype(np.uint8)
    return trimesh.Trimesh(np.concatenate(vertices), np.concatenate(faces), face_colors=paint, process=False)


if __name__ == "__main__":
    OUT.parent.mkdir(parents=True, exist_ok=True)
    can().export(OUT, encoding="binary")
    print(OUT, OUT.stat().st_size, "bytes")
