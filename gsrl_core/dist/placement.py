"""Which process runs which role on which device, from the seed's placement strings.

    component_placement: {"env,rollout": "0-3", "actor": "4-7:0-3"}

A key names roles; a value is ``resources[:processes]``, several of them separated by commas. Resources are device
numbers ``3``, ranges ``0-3`` (both ends included) or ``all``. Processes are numbered from 0 without gaps; if left out,
each device gets one. ``0:0-1`` puts two processes on device 0, ``0-3:0-1`` gives two processes two devices each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gsrl_core.errors import PlacementError

ROLES = ("env", "rollout", "actor")

Devices = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """For every role its processes by rank, each with the devices it may use."""

    env: tuple[Devices, ...]
    rollout: tuple[Devices, ...]
    actor: tuple[Devices, ...]

    @property
    def collocated(self) -> bool:
        """One set of processes does everything: weights and rollouts never leave them."""
        return self.env == self.rollout == self.actor

    @property
    def collectors(self) -> tuple[Devices, ...]:
        """Devices of the processes that simulate and infer: first that of rendering, then that of the policy."""
        return tuple((env[0], rollout[0]) for env, rollout in zip(self.env, self.rollout, strict=True))


def parse_placement(component_placement: Mapping[str, str], device_count: int) -> Placement:
    """Read placement strings for a machine (or cluster) with ``device_count`` devices.

    Args:
        component_placement: roles -> resources, see the module's text.
        device_count: GPUs; a machine without any counts as one device, its CPU.

    Raises:
        PlacementError: a role is unknown, missing or given twice; a string cannot be read; a device does not exist;
            the numbers of processes do not fit each other.
    """
    placed = {role: _processes(text, device_count) for role, text in check_roles(component_placement).items()}
    placement = Placement(**placed)
    _check_counts(placement)
    return placement


def check_roles(component_placement: Mapping[str, str]) -> dict[str, str]:
    """Role -> resources, every role once, whatever devices there are. Raises PlacementError."""
    placed: dict[str, str] = {}
    for key, text in component_placement.items():
        for role in (part.strip() for part in key.split(",")):
            if role not in ROLES:
                raise PlacementError(f"unknown role {role!r} in component_placement; roles: {', '.join(ROLES)}")
            if role in placed:
                raise PlacementError(f"component_placement places {role!r} twice; name every role once")
            placed[role] = str(text)
    missing = [role for role in ROLES if role not in placed]
    if missing:
        raise PlacementError(f"component_placement does not place {', '.join(missing)}; roles: {', '.join(ROLES)}")
    return placed


def _check_counts(placement: Placement) -> None:
    collectors, learners = len(placement.env), len(placement.actor)
    if collectors != len(placement.rollout):
        raise PlacementError(
            f"{collectors} env processes but {len(placement.rollout)} rollout processes; each environment process "
            "has its own copy of the policy beside it, so give both roles equally many"
        )
    if max(collectors, learners) % min(collectors, learners):
        raise PlacementError(
            f"{collectors} env processes and {learners} actor processes: one number must be a multiple of the other, "
            "so that rollouts can be dealt evenly"
        )


def _processes(text: str, device_count: int) -> tuple[Devices, ...]:
    processes: dict[int, Devices] = {}
    for segment in text.split(","):
        resources_text, separator, ranks_text = segment.strip().partition(":")
        devices = _devices(resources_text.strip(), text, device_count)
        first = len(processes)
        ranks = _range(ranks_text, text) if separator else tuple(range(first, first + len(devices)))
        if len(ranks) % len(devices) and len(devices) % len(ranks):
            raise PlacementError(
                f"placement {text!r}: {len(devices)} devices and {len(ranks)} processes in {segment.strip()!r}; one "
                "number must be a multiple of the other"
            )
        for index, rank in enumerate(ranks):
            if rank in processes:
                raise PlacementError(f"placement {text!r} names process {rank} twice")
            processes[rank] = _share(devices, index, len(ranks))
    if sorted(processes) != list(range(len(processes))):
        raise PlacementError(f"placement {text!r}: processes are {sorted(processes)}; number them from 0 without gaps")
    return tuple(processes[rank] for rank in range(len(processes)))


def _share(devices: Devices, index: int, count: int) -> Devices:
    if count >= len(devices):
        return (devices[index // (count // len(devices))],)
    each = len(devices) // count
    return devices[index * each : (index + 1) * each]


def _devices(text: str, whole: str, device_count: int) -> Devices:
    existing = max(1, device_count)
    what = "0 (the CPU)" if device_count == 0 else f"0-{existing - 1}" if existing > 1 else "0"
    devices = tuple(range(existing)) if text == "all" else _range(text, whole)
    beyond = [device for device in devices if device >= existing]
    if beyond:
        raise PlacementError(f"placement {whole!r} asks for device {beyond[0]}; devices here: {what}; or write 'all'")
    return devices


def _range(text: str, whole: str) -> Devices:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise PlacementError(f"placement {whole!r}: cannot read {text!r}; write a number, a range a-b, or 'all'")
    return tuple(range(int(match[1]), int(match[2] or match[1]) + 1))
