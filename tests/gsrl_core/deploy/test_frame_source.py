"""The video camera against a fake device with a driver's queue: full, it keeps the oldest pictures."""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from deploy_examples import VirtualClock, make_contract

from gsrl_core.deploy import camera as module
from gsrl_core.deploy.camera import CameraCalibration, VideoCamera
from gsrl_core.errors import SafetyError

PERIOD = 0.04


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time by which pictures are stamped and their age is told."""
    clock = VirtualClock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Device:
    """Takes a picture when the test says so, whose blue value is its number; the queue holds four, then drops."""

    def __init__(self, clock, size=(48, 64), stamped=True, decoding=0.0):
        self.clock, self.size, self.stamped, self.decoding = clock, size, stamped, decoding
        self.queue, self.changed = deque(), threading.Condition()
        self.taken, self.released, self.last = [], False, None
        self.waiting, self.ended = False, False
        self.failure = None

    def take(self):
        """One picture, a PERIOD after the one before."""
        with self.changed:
            self.clock.sleep(PERIOD)
            self.taken.append(self.clock.now)
            if len(self.queue) < 4:
                self.queue.append(len(self.taken) - 1)
            self.changed.notify_all()

    def film(self, count, given_up=lambda: False):
        """As many pictures, each when the one before has been fetched and kept."""
        for _ in range(count):
            self.take()
            with self.changed:
                deadline = time.monotonic() + 30.0
                while not (self.waiting and not self.queue) and not given_up():
                    assert time.monotonic() < deadline, "nobody fetches the pictures"
                    self.changed.wait(0.01)

    def end(self, failure=None):
        """No more pictures: waiting for one fails, or the driver's waiting runs out."""
        with self.changed:
            self.failure, self.ended = failure, True
            self.changed.notify_all()

    def set(self, key, value):
        return True

    def get(self, key):
        return 1000.0 * self.taken[self.last] if self.stamped else 0.0

    def grab(self):
        with self.changed:
            self.waiting = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.queue or self.ended, 60.0)
            self.waiting = False
            if self.failure:
                raise self.failure
            if not self.queue:
                return False
            self.last = self.queue.popleft()
        return True

    def retrieve(self):
        self.clock.sleep(self.decoding)
        picture = np.zeros((*self.size, 3), np.uint8)
        picture[..., 0] = self.last  # blue of BGR
        return True, picture

    def release(self):
        self.released = True


def opened(device, measured=None):
    """A camera on the device, which films meanwhile."""
    contract = make_contract().camera
    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(VideoCamera, 7, measured, contract, open_capture=lambda _: device)
        while not opening.done():
            device.film(1, opening.done)
        return opening.result()


def close(camera, device):
    device.end()
    camera.close()
    assert device.released


def measured(width=64, height=48):
    return CameraCalibration(width, height, np.eye(3), np.eye(4))


@pytest.mark.parametrize("stamped", [True, False])
def test_a_picture_is_the_newest_and_its_stamp_is_when_it_was_taken(clock, stamped):
    device = Device(clock, stamped=stamped)
    for _ in range(8):  # the queue is full of old pictures
        device.take()
    camera = opened(device, measured())
    for _ in range(3):
        device.film(6)  # the policy thinks
        picture = camera.read()
        number = int(picture.rgb[0, 0, 2])
        assert number == len(device.taken) - 1
        assert picture.stamp == pytest.approx(device.taken[number], abs=1e-6)
    assert picture.rgb.shape == (24, 32, 3)
    close(camera, device)


def test_without_a_stamp_of_the_driver_decoding_does_not_make_a_picture_younger(clock):
    device = Device(clock, stamped=False, decoding=0.6 * PERIOD)
    camera = opened(device, measured())
    device.film(3)
    picture = camera.read()
    assert picture.stamp == device.taken[int(picture.rgb[0, 0, 2])]
    close(camera, device)


@pytest.mark.parametrize("stamped", [True, False])
def test_what_was_queued_while_the_device_was_opened_is_thrown_away(clock, stamped):
    device = Device(clock, stamped=stamped)
    for _ in range(8):
        device.take()
    queued_until = clock.now
    camera = opened(device, measured())
    assert device.taken[int(camera.read().rgb[0, 0, 2])] > queued_until
    close(camera, device)


def test_what_goes_wrong_in_the_thread_is_the_cause_that_the_reader_sees(clock):
    device = Device(clock)
    camera = opened(device, measured())
    device.end(MemoryError("no buffer"))
    camera._thread.join(30.0)
    with pytest.raises(SafetyError, match="no buffer") as raised:
        camera.read()
    assert raised.value.__cause__ is device.failure
    close(camera, device)


def test_a_device_that_never_waits_does_not_make_the_thread_spin(clock):
    class Eager(Device):
        grabbed = 0

        def grab(self):
            self.grabbed += 1
            self.last = 0
            return True

    device = Eager(clock, stamped=False)
    camera = VideoCamera(7, measured(), make_contract().camera, open_capture=lambda _: device)
    started, before = time.monotonic(), device.grabbed
    time.sleep(0.2)
    grabbed = device.grabbed - before
    assert grabbed <= (time.monotonic() - started) / 0.002 + 1
    close(camera, device)


def test_a_device_that_freezes_is_noticed_by_the_age_of_its_picture(clock):
    device = Device(clock)
    camera = opened(device, measured())
    clock.sleep(0.9)
    camera.read()
    clock.sleep(0.2)
    with pytest.raises(SafetyError, match=r"no new picture for 1\.1 s"):
        camera.read()
    device.end()
    camera._thread.join(30.0)
    with pytest.raises(SafetyError, match="got no picture"):
        camera.read()
    close(camera, device)


def test_a_mode_that_does_not_fit_is_refused(clock):
    device = Device(clock, size=(60, 80))
    with pytest.raises(SafetyError, match=r"got \(80, 60\), the calibration is for \(64, 48\)"):
        opened(device, measured())
    assert device.released


def test_without_a_measured_calibration_any_size_of_the_same_shape_is_taken(clock):
    device = Device(clock, size=(60, 80))
    camera = opened(device)
    np.testing.assert_array_equal(camera.calibration.K, np.array(make_contract().camera.K))
    assert camera.read().rgb.shape == (24, 32, 3)
    close(camera, device)
    with pytest.raises(SafetyError, match="shape"):
        opened(Device(clock, size=(60, 60)))
