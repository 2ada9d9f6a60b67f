"""The hand's thread against a fake gripper that blocks, is busy and fails as a real one does."""

import threading
import time
from contextlib import contextmanager

import pytest

from gsrl_core.deploy import hand as module
from gsrl_core.deploy.hand import REFUSALS, Hand
from gsrl_core.deploy.limits import SafetyLimits
from gsrl_core.deploy.watchdog import Watchdog
from gsrl_core.errors import SafetyError


class LostError(Exception):
    pass


class Future:
    def __init__(self):
        self.done, self.result = threading.Event(), True

    def wait(self, seconds):
        return self.done.wait(seconds)

    def get(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def end(self, result=True):
        self.result = result
        self.done.set()


class Gripper:
    """Reading takes ``delay``; commands end when the test says so, or at once with ``verdict``."""

    def __init__(self, width=0.08, delay=0.0, verdict=None):
        self.opening, self.delay, self.verdict = width, delay, verdict
        self.sent, self.failure, self.stopped, self.stopping = [], None, False, 0.0

    @property
    def width(self):
        time.sleep(self.delay)
        if self.failure:
            raise self.failure
        return self.opening

    def _start(self, name, width):
        future = Future()
        self.sent.append((name, width, future))
        if self.verdict is not None:
            future.end(self.verdict)
        return future

    def move_async(self, width, speed):
        return self._start("move", width)

    def grasp_async(self, width, speed, force, inner, outer):
        return self._start("grasp", width)

    def stop(self):
        time.sleep(self.stopping)
        self.stopped = True
        self.sent[-1][2].end(LostError("libfranka gripper: command aborted"))


@contextmanager
def running(gripper):
    hand = Hand(gripper, SafetyLimits(), LostError)
    try:
        yield hand
    finally:
        hand.close()


def until(condition, seconds=2.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_neither_reading_nor_wishing_waits_for_the_hand():
    with running(Gripper(delay=0.2)) as hand:
        started = time.perf_counter()
        for _ in range(100):
            assert hand.width == 0.08
            hand.wish(0.0)
        assert time.perf_counter() - started < 0.1


def test_the_newest_wish_is_sent_when_a_busy_hand_is_free():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: len(gripper.sent) == 1)
        gripper.opening = 0.04
        for width in (0.03, 0.05, 0.06):
            hand.wish(width)
        time.sleep(0.1)
        assert len(gripper.sent) == 1
        gripper.sent[0][2].end()
        until(lambda: len(gripper.sent) == 2)
        assert [(name, width) for name, width, _ in gripper.sent] == [("grasp", 0.0), ("move", 0.06)]


def test_a_wish_that_is_fulfilled_is_not_sent_again():
    gripper = Gripper(verdict=True)
    with running(gripper) as hand:
        for width in (0.02, 0.02, 0.021, 9.0):
            hand.wish(width)
            time.sleep(0.08)
        assert [width for _, width, _ in gripper.sent] == [0.02, 0.08]


def test_a_refused_command_is_repeated_and_then_reported():
    gripper = Gripper(verdict=False)
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: hand._problem is not None)
        assert len(gripper.sent) == REFUSALS
        with pytest.raises(SafetyError, match=r"3 commands in a row ended without success, the last to 0\.000 m"):
            hand.wish(0.08)


def test_a_command_that_fails_is_reported_with_its_cause():
    gripper = Gripper(verdict=LostError("libfranka gripper: command aborted"))
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: hand._problem is not None)
        for use in (lambda: hand.width, lambda: hand.wish(0.08)):
            with pytest.raises(SafetyError, match="command aborted"):
                use()


def test_a_hand_that_falls_silent_is_noticed(monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.1)
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.delay = 0.5
        time.sleep(0.2)
        with pytest.raises(SafetyError, match="no state for 0"):
            _ = hand.width
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.failure = LostError("UDP receive: Timeout")
        until(lambda: hand._problem is not None)
        with pytest.raises(SafetyError, match="UDP receive"):
            hand.wish(0.0)


def test_a_width_that_a_picture_would_outrun_is_not_current():
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.delay = 0.8
        time.sleep(0.65)
        with pytest.raises(SafetyError, match="no state for 0"):
            _ = hand.width


def test_a_reading_that_was_only_held_up_here_is_no_lost_hand(monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.1)
    with running(Gripper()) as hand:
        # As if the thread had not run for long: its next reading is on the way.
        with hand._lock:
            hand._stamp = time.monotonic() - 1.0
        assert hand.width == 0.08


def test_limits_that_tolerate_an_older_state_of_the_arm_do_so_of_the_hand():
    gripper = Gripper()
    hand = Hand(gripper, SafetyLimits(max_state_age=1.0), LostError)
    gripper.delay = 0.8
    time.sleep(0.65)
    assert hand.width == 0.08
    hand.close()


def test_halting_withdraws_the_wish_and_stops_moving_fingers():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        hand.wish(0.08)
        hand.halt()
        until(lambda: gripper.stopped)
        time.sleep(0.1)
        assert [width for _, width, _ in gripper.sent] == [0.0]
        assert hand.width == 0.08  # the aborted command is no problem of the hand
        # The next wish counts, also the one that was interrupted.
        hand.wish(0.0)
        until(lambda: len(gripper.sent) == 2)
        assert gripper.sent[1][1] == 0.0


def test_the_width_stays_current_while_a_halt_waits_for_the_command_under_way(monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.1)
    gripper = Gripper()
    gripper.stopping = 0.5
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        hand.halt()
        time.sleep(0.3)
        gripper.opening = 0.04
        time.sleep(0.05)
        assert hand.width == 0.04
    assert gripper.stopped


def test_halting_leaves_a_finished_grasp_alone():
    gripper = Gripper(verdict=True)
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        time.sleep(0.1)
        hand.halt()
        time.sleep(0.1)
        assert not gripper.stopped


def test_closing_stops_a_busy_hand():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
    assert gripper.stopped
    assert not hand._thread.is_alive()


def test_the_watchdog_acts_once_when_it_is_not_fed():
    expired = []
    dog = Watchdog(0.2, lambda: expired.append(True))
    for _ in range(8):
        time.sleep(0.05)
        dog.feed()
    assert dog.waited is None
    until(lambda: expired)
    assert 0.2 < dog.waited < 1.0
    dog.close()
    fed = Watchdog(0.2, lambda: expired.append(True))
    fed.close()
    time.sleep(0.3)
    assert expired == [True]
