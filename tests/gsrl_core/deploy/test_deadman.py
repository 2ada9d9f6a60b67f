import os
import time

import pytest
from deploy_examples import VirtualClock

from gsrl_core.deploy import deadman
from gsrl_core.deploy.deadman import ARMING, GAP, HeldKey
from gsrl_core.errors import SafetyError


@pytest.fixture
def terminal():
    keyboard, screen = os.openpty()
    yield keyboard, screen
    os.close(keyboard)
    os.close(screen)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time by which the pauses between strokes are told."""
    clock = VirtualClock()
    monkeypatch.setattr(deadman, "time", clock)
    return clock


def until(condition):
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def hold(keyboard, held, clock, key=b" ", count=ARMING + 2):
    """Strokes as a keyboard repeats them, each noticed at once."""
    for _ in range(count):
        clock.sleep(0.06)
        os.write(keyboard, key)
        until(lambda: held._last == clock.now)


@pytest.mark.parametrize("key", [b" ", b"\n"])
def test_a_held_key_permits_and_its_release_withdraws(terminal, clock, key):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        assert not held()
        hold(keyboard, held, clock, key)
        assert held()
        held.wait(0.0)
        clock.sleep(GAP - 0.01)
        assert held()
        clock.sleep(0.02)
        assert not held()


def test_strokes_that_arm_are_repeats_of_one_key_press(terminal, clock):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        for _ in range(ARMING):
            clock.sleep(GAP)
            hold(keyboard, held, clock, count=1)
        assert not held()


def test_one_stroke_is_no_permit(terminal, clock):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        hold(keyboard, held, clock, count=1)
        assert not held()
        with pytest.raises(SafetyError, match="not held within 0 s; nothing was moved"):
            held.wait(0.1)


def test_another_key_withdraws(terminal, clock):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        hold(keyboard, held, clock)
        assert held()
        os.write(keyboard, b"q")
        until(lambda: not held())


def test_what_is_no_terminal_cannot_permit():
    reader, writer = os.pipe()
    with pytest.raises(SafetyError, match="standard input is none"):
        HeldKey(reader)
    os.close(reader)
    os.close(writer)
