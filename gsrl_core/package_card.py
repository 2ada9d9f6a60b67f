"""The texts of a package: model card, installed versions, and the machine that it was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from gsrl_core.deploy import emulator
from gsrl_core.errors import PackageError

_CARD = """---
license: apache-2.0
library_name: openpi
pipeline_tag: robotics
tags: [robotics, franka, fr3, pi0.5, gaussian-splatting]
---

# {name}

A pi0.5 policy for "{instruction}" ({task}) on a Franka FR3 with the Franka Hand, fine-tuned with PPO in a simulation
whose pictures are Gaussian splats of the real bench.

## Acceptance

**Hardware acceptance: not done.** The numbers below are from simulation. The package was checked against an FR3
control-interface emulator, which models neither contact reflexes nor external forces. The safety envelope is software
and not a certified safety function: keep the emergency stop in hand and Desk's safety configuration active. Start with
`--dry-run`.

Known difference to simulation: there, gravity pulls the arm about 13 mm below its target; the FR3 compensates gravity.

## Evaluation

{table}

Success: the object rests, released, where the task wants it. `seed's test`: a looser one. Intervals: Wilson.

## Use

    real2sim2real verify --bundle .
    real2sim2real serve --bundle .
    real2sim2real deploy --bundle . --robot HOST --dry-run
    real2sim2real deploy --bundle . --robot HOST --calibration FILE

The dry run moves nothing; without `--calibration` it assumes the package's camera calibration (`--camera scene` renders
the package's scene where there is no camera). To move, the arm needs the bench's own calibration and a dead-man switch:
the space bar, held down.

`verify` drives the FR3 emulator, which falls behind real time on a busy machine, with wider monitors than
`safety.yaml`: state age {emulated_age:g} s, stream time-out {emulated_stream:g} s, tracking error
x{emulated_tracking:g}. It then requires that the arm followed: {mean_mm:.0f} mm on average, {final_mm:.0f} mm at the
end.

| | |
|---|---|
| camera | `{camera}` {width} x {height} RGB, uint8, key `{image_key}` |
| state | {state_dim} values: {state_meaning}, key `{state_key}` |
| action | {horizon} x 7 at {control_hz:g} Hz: xyz [m], XYZ Euler [rad], gripper [-1, 1]; deltas of the last target |
| precision | {precision}, {denoise_steps} integration steps |
| inference | {infer_ms:.0f} ms median on {machine} |
| safety | {step_mm:.0f} mm and {step_rad} rad per step, {speed} m/s, {force} N, workspace {low} .. {high} m |

`contract.json` is the full contract, `safety.yaml` the limits, `lineage.json` where everything came from.
`sha256sum -c MANIFEST.sha256` checks the files.
"""


def model_card(name: str, facts: Mapping[str, Any], report: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """README.md of a package from its contract, limits, latency and evaluation report."""
    contract, safety, latency = facts["contract"], facts["safety"], facts["latency"]
    card = _CARD.format(
        name=name,
        instruction=contract.instruction,
        task=contract.task,
        table=evaluation_table(report),
        camera=contract.camera.name,
        width=contract.camera.width,
        height=contract.camera.height,
        image_key=contract.camera.key,
        state_dim=contract.state_dim,
        state_meaning=contract.state_meaning,
        state_key=contract.state_key,
        horizon=contract.horizon,
        control_hz=contract.control_hz,
        precision=contract.precision,
        denoise_steps=contract.denoise_steps,
        infer_ms=latency["infer_ms"]["p50"],
        machine=latency["machine"]["processor"],
        step_mm=1000 * safety.max_step_translation,
        step_rad=safety.max_step_rotation,
        speed=safety.max_speed,
        force=safety.max_force,
        low=safety.workspace_min,
        high=safety.workspace_max,
        emulated_age=emulator.STATE_AGE,
        emulated_stream=emulator.STREAM_TIMEOUT,
        emulated_tracking=emulator.TRACKING,
        mean_mm=1000 * emulator.MEAN_FOLLOWING,
        final_mm=1000 * emulator.FINAL_FOLLOWING,
    )
    inputs = "\n".join(f"- {kind}: `{digest}`" for kind, digest in origin["inputs"].items())
    return f"{card}\n## Made from\n\nreal2sim2real {origin['version']}\n\n{inputs}\n"


def evaluation_table(report: Mapping[str, Any]) -> str:
    """The cells of a report as a Markdown table. Raises PackageError when a number is missing."""
    lines = ["| condition | success | interval | episodes | seed test |", "|---|---|---|---|---|"]
    try:
        lines += [
            f"| {cell['name']} | {cell['success_rate']:.1%} | {cell['interval'][0]:.1%} .. {cell['interval'][1]:.1%} "
            f"| {cell['successes']} of {cell['episodes']} | {cell['success_seed_rate']:.1%} |"
            for cell in report["cells"]
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PackageError(f"report.json: a cell lacks or breaks {error}; evaluate the checkpoint again") from error
    return "\n".join(lines)


def installed_requirements(distribution: str) -> str:
    """``name==version`` of everything that ``distribution`` pulls in, as installed here (no hashes).

    Raises:
        PackageError: the project is not installed.
    """
    pinned: dict[str, str] = {}
    waiting = [distribution]
    while waiting:
        name = waiting.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name == distribution:
                raise PackageError(f"{distribution} is not installed in this environment; run `uv sync`") from error
            continue  # an optional or replaced dependency that this environment goes without
        key = found.metadata["Name"].lower().replace("_", "-")
        if key in pinned:
            continue
        pinned[key] = found.version
        requirements = map(Requirement, found.requires or ())
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    del pinned[distribution]
    header = f"# {distribution} on Python {platform.python_version()}, {platform.system()} {platform.machine()}\n"
    return header + "".join(f"{name}=={version}\n" for name, version in sorted(pinned.items()))


def machine_facts() -> dict[str, Any]:
    """What a latency figure needs beside it."""
    cuda = torch.cuda.is_available()
    return {
        "processor": torch.cuda.get_device_name(0) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        # On a busy machine several threads wait for each other; without this the figure cannot be judged.
        "load_average_1min": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
