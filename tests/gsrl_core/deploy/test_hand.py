"""The hand's thread against a fake gripper that blocks, is busy and fails as a real one does."""

import threading
import time
from contextlib import contextmanager

import pytest
from deploy_examples import VirtualClock

from gsrl_core.deploy import hand as module
from gsrl_core.deploy import watchdog
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


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time by which the hand's thread and the watchdog tell how old something is."""
    clock = VirtualClock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


class Gripper:
    """Readings and stops can be held up; commands end when the test says so, or at once with ``verdict``."""

    def __init__(self, width=0.08, verdict=None):
        self.opening, self.verdict = width, verdict
        self.sent, self.failure, self.stopped, self.readings = [], None, False, 0
        self.readable, self.stoppable = threading.Event(), threading.Event()
        self.silent, self.stopping = threading.Event(), threading.Event()
        self.release()

    @property
    def width(self):
        self.readings += 1
        if not self.readable.is_set():
            self.silent.set()
            self.readable.wait(60.0)
        if self.failure:
            raise self.failure
        return self.opening

    def fall_silent(self):
        """From here on readings do not end; returns when one is waiting."""
        self.readable.clear()
        assert self.silent.wait(30.0)

    def release(self):
        self.readable.set()
        self.stoppable.set()

    def serve(self):
        """Returns when the hand's thread has done all that it does with what it was told so far."""
        read = self.readings
        # One reading may have begun before, and what follows it too; the one after the next begins after that.
        until(lambda: self.readings >= read + 2)

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
        self.stopping.set()
        self.stoppable.wait(60.0)
        self.stopped = True
        self.sent[-1][2].end(LostError("libfranka gripper: command aborted"))


@contextmanager
def running(gripper, limits=None):
    hand = Hand(gripper, limits or SafetyLimits(), LostError)
    try:
        yield hand
    finally:
        gripper.release()
        hand.close()


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_neither_reading_nor_wishing_waits_for_the_hand():
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.fall_silent()
        readings = gripper.readings
        for _ in range(100):
            assert hand.width == 0.08
            hand.wish(0.0)
        assert gripper.readings == readings
        assert not gripper.sent


def test_the_newest_wish_is_sent_when_a_busy_hand_is_free():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: len(gripper.sent) == 1)
        gripper.opening = 0.04
        for width in (0.03, 0.05, 0.06):
            hand.wish(width)
        gripper.serve()
        assert len(gripper.sent) == 1
        gripper.sent[0][2].end()
        until(lambda: len(gripper.sent) == 2)
        assert [(name, width) for name, width, _ in gripper.sent] == [("grasp", 0.0), ("move", 0.06)]


def test_a_wish_that_is_fulfilled_is_not_sent_again():
    gripper = Gripper(verdict=True)
    with running(gripper) as hand:
        for width in (0.02, 0.02, 0.021, 9.0):
            hand.wish(width)
            gripper.serve()
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


def test_a_hand_that_falls_silent_is_noticed(clock):
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.fall_silent()
        clock.sleep(0.39)
        assert hand.width == 0.08
        clock.sleep(0.02)
        with pytest.raises(SafetyError, match=r"no state for 0\.4"):
            _ = hand.width


def test_a_hand_whose_connection_is_lost_says_so():
    gripper = Gripper()
    with running(gripper) as hand:
        gripper.failure = LostError("UDP receive: Timeout")
        until(lambda: hand._problem is not None)
        with pytest.raises(SafetyError, match="UDP receive"):
            hand.wish(0.0)


def test_a_reading_that_was_only_held_up_here_is_no_lost_hand(clock, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 30.0)  # what the thread needs for a reading is up to the machine
    with running(Gripper()) as hand:
        # As if the thread had not run for long: its next reading is on the way.
        with hand._lock:
            hand._stamp = clock.now - 1.0
        assert hand.width == 0.08


def test_limits_that_tolerate_an_older_state_of_the_arm_do_so_of_the_hand(clock):
    gripper = Gripper()
    with running(gripper, SafetyLimits(max_state_age=1.0)) as hand:
        gripper.fall_silent()
        clock.sleep(0.99)
        assert hand.width == 0.08
        clock.sleep(0.02)
        with pytest.raises(SafetyError, match=r"no state for 1\.0"):
            _ = hand.width


def test_halting_withdraws_the_wish_and_stops_moving_fingers():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        hand.wish(0.08)
        hand.halt()
        until(lambda: gripper.stopped)
        gripper.serve()
        assert [width for _, width, _ in gripper.sent] == [0.0]
        assert hand.width == 0.08  # the aborted command is no problem of the hand
        # The next wish counts, also the one that was interrupted.
        hand.wish(0.0)
        until(lambda: len(gripper.sent) == 2)
        assert gripper.sent[1][1] == 0.0


def test_the_width_stays_current_while_a_halt_waits_for_the_command_under_way(clock):
    gripper = Gripper()
    gripper.stoppable.clear()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        hand.halt()
        assert gripper.stopping.wait(30.0)
        clock.sleep(10.0)
        gripper.opening = 0.04
        gripper.serve()
        assert hand.width == 0.04
        assert not gripper.stopped
    assert gripper.stopped


def test_halting_leaves_a_finished_grasp_alone():
    gripper = Gripper(verdict=True)
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
        gripper.serve()
        hand.halt()
        gripper.serve()
    assert not gripper.stopping.is_set()


def test_closing_stops_a_busy_hand():
    gripper = Gripper()
    with running(gripper) as hand:
        hand.wish(0.0)
        until(lambda: gripper.sent)
    assert gripper.stopped
    assert not hand._thread.is_alive()


def test_the_watchdog_acts_once_when_it_is_not_fed(clock):
    expired = []
    dog = Watchdog(0.2, lambda: expired.append(True))
    for _ in range(8):
        clock.sleep(0.19)
        time.sleep(0.05)  # it looks every 40 ms
        dog.feed()
    assert dog.waited is None
    clock.sleep(0.21)
    until(lambda: expired)
    assert dog.waited == pytest.approx(0.21)
    dog.close()
    fed = Watchdog(0.2, lambda: expired.append(True))
    fed.close()
    clock.sleep(1.0)
    assert not fed._thread.is_alive()
    assert expired == [True]
