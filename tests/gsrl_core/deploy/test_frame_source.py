"""The video camera against a fake device with a driver's queue: full, it keeps the oldest pictures."""

import threading
import time
from collections import deque

import numpy as np
import pytest
from deploy_examples import make_contract

from gsrl_core.deploy import camera as module
from gsrl_core.deploy.camera import CameraCalibration, VideoCamera
from gsrl_core.errors import SafetyError

PERIOD = 0.04


class Device:
    """Takes a picture every PERIOD, whose blue value is its number; the queue holds four and drops what is newer."""

    def __init__(self, size=(48, 64), stamped=True, decoding=0.0):
        self.size, self.stamped, self.decoding = size, stamped, decoding
        self.failure = None
        self.queue, self.arrived = deque(), threading.Condition()
        self.taken, self.running, self.released = [], True, False
        self.last = None
        threading.Thread(target=self._film, daemon=True).start()

    def _film(self):
        while self.running:
            with self.arrived:
                self.taken.append(time.monotonic())
                if len(self.queue) < 4:
                    self.queue.append(len(self.taken) - 1)
                self.arrived.notify_all()
            time.sleep(PERIOD)

    def set(self, key, value):
        return True

    def get(self, key):
        return 1000.0 * self.taken[self.last] if self.stamped else 0.0

    def grab(self):
        if self.failure:
            raise self.failure
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.queue, 0.5):
                return False
            self.last = self.queue.popleft()
        return True

    def retrieve(self):
        time.sleep(self.decoding)
        picture = np.zeros((*self.size, 3), np.uint8)
        picture[..., 0] = self.last  # blue of BGR
        return True, picture

    def release(self):
        self.released = True


def opened(device, measured=None):
    contract = make_contract().camera
    return VideoCamera(7, measured, contract, open_capture=lambda _: device)


def measured(width=64, height=48):
    return CameraCalibration(width, height, np.eye(3), np.eye(4))


@pytest.mark.parametrize("stamped", [True, False])
def test_a_picture_is_the_newest_and_its_stamp_is_when_it_was_taken(stamped):
    device = Device(stamped=stamped)
    time.sleep(8 * PERIOD)  # the queue is full of old pictures
    camera = opened(device, measured())
    for _ in range(3):
        time.sleep(6 * PERIOD)  # the policy thinks
        newest = len(device.taken) - 1
        picture = camera.read()
        number = int(picture.rgb[0, 0, 2])
        assert newest - number <= 1
        assert abs(picture.stamp - device.taken[number]) < PERIOD
    assert picture.rgb.shape == (24, 32, 3)
    camera.close()
    assert device.released


def test_without_a_stamp_of_the_driver_decoding_does_not_make_a_picture_younger():
    device = Device(stamped=False, decoding=0.6 * PERIOD)
    camera = opened(device, measured())
    time.sleep(3 * PERIOD)
    picture = camera.read()
    assert 0.0 <= picture.stamp - device.taken[int(picture.rgb[0, 0, 2])] < 0.4 * PERIOD
    camera.close()


@pytest.mark.parametrize("stamped", [True, False])
def test_what_was_queued_while_the_device_was_opened_is_thrown_away(stamped):
    device = Device(stamped=stamped)
    time.sleep(8 * PERIOD)
    queued_until = time.monotonic()
    camera = opened(device, measured())
    assert device.taken[int(camera.read().rgb[0, 0, 2])] > queued_until
    camera.close()


def test_what_goes_wrong_in_the_thread_is_the_cause_that_the_reader_sees():
    device = Device()
    camera = opened(device, measured())
    device.failure = MemoryError("no buffer")
    camera._thread.join(1.0)
    with pytest.raises(SafetyError, match="no buffer") as raised:
        camera.read()
    assert raised.value.__cause__ is device.failure
    camera.close()
    assert device.released


def test_a_device_that_never_waits_does_not_make_the_thread_spin():
    class Eager(Device):
        grabbed = 0

        def grab(self):
            self.grabbed += 1
            self.last = 0
            return True

    device = Eager(stamped=False)
    camera = opened(device, measured())
    before = device.grabbed
    time.sleep(0.2)
    assert device.grabbed - before <= 0.2 / 0.002 + 1
    camera.close()


def test_a_device_that_freezes_is_noticed_by_the_age_of_its_picture(monkeypatch):
    monkeypatch.setattr(module, "_SILENCE", 0.15)
    device = Device()
    camera = opened(device, measured())
    device.running = False
    time.sleep(0.3)
    with pytest.raises(SafetyError, match="no new picture for"):
        camera.read()
    time.sleep(0.5)
    with pytest.raises(SafetyError, match="got no picture"):
        camera.read()
    camera.close()


def test_a_mode_that_does_not_fit_is_refused():
    device = Device(size=(60, 80))
    with pytest.raises(SafetyError, match=r"got \(80, 60\), the calibration is for \(64, 48\)"):
        opened(device, measured())
    assert device.released


def test_without_a_measured_calibration_any_size_of_the_same_shape_is_taken():
    camera = opened(Device(size=(60, 80)))
    np.testing.assert_array_equal(camera.calibration.K, np.array(make_contract().camera.K))
    assert camera.read().rgb.shape == (24, 32, 3)
    camera.close()
    with pytest.raises(SafetyError, match="shape"):
        opened(Device(size=(60, 60)))
