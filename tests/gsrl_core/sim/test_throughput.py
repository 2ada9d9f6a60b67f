import time

import numpy as np
from sim_helpers import PUT

from gsrl_core.sim.pool import Pool
from gsrl_core.sim.throughput import RANDOM_LIMITS, motions, random_actions


class Watched(Pool):
    """Counts chunks of five; each takes ``delay`` seconds longer."""

    delay, chunks = 0.0, 0

    def step(self, actions, active):
        self.chunks += actions.shape[1] == 5
        time.sleep(self.delay)
        super().step(actions, active)


def test_groups_do_not_wait_for_each_other(quick):
    quick_group, slow_group = Watched(quick, 1, 5, 1), Watched(quick, 1, 5, 1)
    slow_group.delay = 0.05
    rates = dict(motions([quick_group, slow_group], PUT, 5, 10, 0.5))
    assert set(rates) == {"random", "expert"} and min(rates.values()) > 0
    assert quick_group.chunks > 2 * slow_group.chunks > 0
    quick_group.close()
    slow_group.close()


def test_random_actions_fill_their_ranges():
    actions = random_actions(4, 100)
    assert actions.shape == (4, 100, 7) and actions.dtype == np.float32
    high = np.array(RANDOM_LIMITS)
    assert (np.abs(actions).max(axis=(0, 1)) <= high + 1e-6).all()
    assert (np.abs(actions).max(axis=(0, 1)) > 0.9 * high).all()
