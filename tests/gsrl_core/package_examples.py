"""A small scene and a small random policy, packaged; shared by the tests of packages."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gsrl_core.config import load
from gsrl_core.geometry.fr3 import LINKS, START_QPOS, fr3
from gsrl_core.package import build_package
from gsrl_core.splat.gaussians import Gaussians
from gsrl_core.splat.scene import Scene, save_scene

sys.path.insert(0, str(Path(__file__).parent / "policy"))
from policy_examples import SMALL, make_folder

SIZES = replace(SMALL, horizon=5)
REPORT = {
    "cells": [
        {
            "name": "nominal",
            "success_rate": 0.5,
            "interval": [0.402, 0.598],
            "successes": 48,
            "episodes": 96,
            "success_seed_rate": 0.625,
        }
    ]
}


def cloud(count, size, seed, color):
    generator = torch.Generator().manual_seed(seed)
    means = (torch.rand(count, 3, generator=generator) - 0.5) * torch.tensor(size)
    harmonics = torch.zeros(count, 1, 3)
    harmonics[:, 0] = (torch.tensor(color) - 0.5) / 0.2821 + 0.3 * torch.randn(count, 3, generator=generator)
    quats = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(count, 1)
    return Gaussians(means, quats, torch.full((count, 3), math.log(0.012)), torch.full((count,), 3.0), harmonics)


def make_scene(folder):
    poses = fr3().forward(START_QPOS)
    bodies = {
        name: (cloud(60, (0.1, 0.1, 0.2), i, (0.8, 0.8, 0.8)), torch.as_tensor(poses[name]).float())
        for i, name in enumerate(LINKS)
    }
    for name, position, color in (
        ("cube", (0.4, 0.2, 0.02), (0.8, 0.1, 0.1)),
        ("plate", (0.45, 0.0, 0.02), (0.9,) * 3),
    ):
        pose = torch.eye(4)
        pose[:3, 3] = torch.tensor(position)
        bodies[name] = (cloud(80, (0.04, 0.04, 0.04), 50, color), pose)
    save_scene(folder, Scene.from_parts(cloud(800, (1.2, 1.2, 0.02), 99, (0.5, 0.35, 0.2)), bodies))
    return folder


def make_inputs(root, tokenizer):
    """Folders checkpoint, scene and evaluation below ``root``."""
    (root / "evaluation").mkdir(parents=True)
    (root / "evaluation" / "report.json").write_text(json.dumps(REPORT))
    make_scene(root / "scene")
    # Every weight matters and motions are small, as the envelope wants them.
    make_folder(root / "checkpoint", SIZES, tokenizer=tokenizer, action_spread=0.01, everywhere=True)
    return root


def make_bundle(root, out, **overrides):
    """Package the inputs below ``root``."""
    build_package(
        root / "checkpoint",
        root / "scene",
        root / "evaluation",
        out,
        load("laptop", overrides),
        {"mlflow_run": "0123"},
    )
    return out
