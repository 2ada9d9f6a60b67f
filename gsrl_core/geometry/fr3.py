"""The Franka FR3 with its hand: where its description is installed, its bodies and its start posture."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from gsrl_core.errors import SceneError
from gsrl_core.geometry.urdf import Robot, load_urdf

LINKS = (*(f"fr3_link{i}" for i in range(8)), "fr3_hand", "fr3_leftfinger", "fr3_rightfinger")
"""Links that are seen, in the order of a scene's bodies."""
START_QPOS = (0.0, 0.259358403, 0.0, -2.28914773, 0.0, 2.51473323, 0.785539902, 0.04, 0.04)
"""Posture at the start of an episode: seven arm joints (rad), two fingers (m)."""


def urdf_path() -> Path:
    """The FR3 URDF inside the installed franky-sim wheel (found without importing it).

    Raises:
        SceneError: franky-sim is not installed or brings no URDF.
    """
    found = importlib.util.find_spec("franky_sim")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "assets" / "fr3.urdf"
        if path.is_file():
            return path
    raise SceneError("the FR3 description (franky_sim/assets/fr3.urdf) is not installed; run `uv sync`")


@cache
def fr3() -> Robot:
    """The FR3's kinematic tree."""
    return load_urdf(urdf_path())
