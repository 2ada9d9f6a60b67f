"""The model card of a checkpoint made by supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gsrl_core.policy.config import Pi05Config


def model_card(
    sizes: Pi05Config, facts: Mapping[str, Any], settings: Mapping[str, Any], command: str, digest: str
) -> str:
    """README.md of a checkpoint; ``digest`` is that of the demonstrations, ``command`` what was typed."""
    made = f"Made by:\n\n    {command}\n" if command else ""
    name = "pi0" if sizes.family == "pi0" else "pi0.5"
    loss = facts["held_out_loss"]
    measured = "too few episodes to hold any out" if loss is None else f"held-out flow-matching loss {loss:.4f}"
    listed = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    return f"""---
library_name: real2sim2real
pipeline_tag: robotics
license: apache-2.0
---

# {name} for PutCubeOnPlate, {facts["parameters"] / 1e6:.1f} M parameters

Flow-matching policy ({name} architecture, openpi key names) for a Franka FR3, trained by supervised fine-tuning on
{facts["episodes"]} scripted demonstrations ({facts["frames"]} frames, sha256 {digest[:16]}) rendered from 3D Gaussians.

{made}
- horizon {sizes.horizon}, picture {sizes.image_size} px, state in the prompt: {sizes.discrete_state}
- {facts["steps"]} steps, {measured}
{listed}

Simulation only: it has never moved a real robot. Use it behind the safety envelope of the package it is released in.
"""
