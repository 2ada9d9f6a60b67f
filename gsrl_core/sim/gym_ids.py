"""The gym ids of the tasks; importing this module registers them.

No import is needed where the id carries it, as it may in RLinf's YAML:
``gym.make("gsrl_core.sim.gym_ids:GSEnv-PutCubeOnPlate-v0")``.
"""

from __future__ import annotations

import gymnasium

from gsrl_core.sim.tasks import NAMES, load_task


def register(reference: str) -> str:
    """Register ``GSEnv-<name>`` for a task (``FILE.py:CLASS`` for one of your own) and return this id."""
    env_id = f"GSEnv-{load_task(reference).name}"
    gymnasium.register(
        env_id,
        entry_point="gsrl_core.sim.gym_adapter:GSEnvAdapter",  # torch and the rasterisers, when one is made
        disable_env_checker=True,
        order_enforce=False,
        kwargs={"task_reference": reference},
    )
    return env_id


for _name in NAMES:
    register(_name)
