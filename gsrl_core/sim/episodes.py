"""Runs whole chunks in single worlds and records what happened: the code that a worker process executes."""

from __future__ import annotations

from collections.abc import Mapping

from gsrl_core.sim import task
from gsrl_core.sim.settings import WorldSettings
from gsrl_core.sim.states import PARTS, States
from gsrl_core.sim.world import DivergedError, World


class Episodes:
    """The environments of one process, each a :class:`World`; results go to ``states``."""

    def __init__(self, settings: WorldSettings, states: States) -> None:
        self._settings = settings
        self._states = states
        self._worlds: dict[int, World] = {}

    def reset(self, specs: Mapping[int, task.EpisodeSpec]) -> dict[int, str]:
        """Start the episodes of the given environments. Returns nothing that diverged, as :meth:`step` may."""
        for env, spec in specs.items():
            if env not in self._worlds:
                self._worlds[env] = World(self._settings)
            world = self._worlds[env]
            world.reset(spec)
            for name in ("elapsed", "executed", "success", "success_seed"):
                getattr(self._states, name)[env] = 0
            self._record(env, world, world.verdict())
        return {}

    def step(self, envs: list[int], horizon: int) -> dict[int, str]:
        """Execute the first ``horizon`` actions in each environment, or fewer where success comes earlier.

        Returns:
            Environments whose physics diverged, with the reason; what they recorded then means nothing.

        Raises:
            SimulationError: an action is not finite.
        """
        diverged = {}
        for env in envs:
            self._states.busy[env] = 1
            try:
                self._run_chunk(env, self._worlds[env], horizon)
            except DivergedError as error:
                diverged[env] = str(error)
            self._states.busy[env] = 0
        return diverged

    def _run_chunk(self, env: int, world: World, horizon: int) -> None:
        states = self._states
        actions = states.actions[env, :horizon, : self._settings.action_dim]
        executed = 0
        for action in actions:
            world.step(action)
            executed += 1
            # The parts of success are recorded once, after the chunk.
            verdict = world.verdict(complete=executed == horizon)
            states.success_seed[env] |= verdict.success_seed
            if verdict.success:
                states.success[env] = 1
                break
        states.executed[env] = executed
        states.elapsed[env] += executed
        self._record(env, world, verdict)

    def _record(self, env: int, world: World, verdict: task.Verdict) -> None:
        states = self._states
        states.body_to_world[env] = world.body_poses()
        states.tcp_to_world[env] = world.tcp()
        states.qpos[env] = world.qpos()
        states.qvel[env] = world.qvel()
        states.velocities[env] = world.velocities()
        states.parts[env] = [getattr(verdict, part) for part in PARTS]
