import os
import time

import pytest

from gsrl_core.deploy.deadman import ARMING, GAP, HeldKey
from gsrl_core.errors import SafetyError


@pytest.fixture
def terminal():
    keyboard, screen = os.openpty()
    yield keyboard, screen
    os.close(keyboard)
    os.close(screen)


def hold(keyboard, key=b" ", count=ARMING + 2):
    for _ in range(count):
        os.write(keyboard, key)
        time.sleep(0.06)


@pytest.mark.parametrize("key", [b" ", b"\n"])
def test_a_held_key_permits_and_its_release_withdraws(terminal, key):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        assert not held()
        hold(keyboard, key)
        assert held()
        held.wait(0.0)
        time.sleep(GAP + 0.1)
        assert not held()


def test_one_stroke_is_no_permit(terminal):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        hold(keyboard, count=1)
        assert not held()
        with pytest.raises(SafetyError, match="not held within 0 s; nothing was moved"):
            held.wait(0.1)


def test_another_key_withdraws(terminal):
    keyboard, screen = terminal
    with HeldKey(screen) as held:
        hold(keyboard)
        assert held()
        hold(keyboard, b"q", count=1)
        assert not held()


def test_what_is_no_terminal_cannot_permit():
    reader, writer = os.pipe()
    with pytest.raises(SafetyError, match="standard input is none"):
        HeldKey(reader)
    os.close(reader)
    os.close(writer)
