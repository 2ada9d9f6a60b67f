"""Photos of a folder and sharp frames of a video; every kind of bad source."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from gsrl_core.capture.frames import collect_photos, list_photos, sharp_frames, sharpness
from gsrl_core.errors import CaptureError


def _picture(seed, size=(96, 128)):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)


def _fill(folder, count):
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(_picture(index)).save(folder / f"p{index}.jpg")
    return folder


def _write_video(path, frames, rate=10, begin=0.0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base, picture.pts = Fraction(1, rate), round(begin * rate) + index
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_photos_are_sorted_and_other_files_left_alone(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.png", "._a.jpg", "notes.txt", "markers.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in list_photos(tmp_path)] == ["a.jpeg", "b.JPG", "c.png"]
    assert collect_photos(tmp_path, tmp_path / "frames", 10) == list_photos(tmp_path)


@pytest.mark.parametrize(("count", "message"), [(0, "no photos"), (1, "1 photo;"), (2, "2 photos;")])
def test_too_few_photos(tmp_path, count, message):
    with pytest.raises(CaptureError, match=message):
        list_photos(_fill(tmp_path / "photos", count))


def test_unusable_formats_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(CaptureError, match=r"\.heic files: convert them to JPEG"):
        list_photos(tmp_path)


def test_missing_and_wrong_sources(tmp_path):
    with pytest.raises(CaptureError, match="there is no such folder or video"):
        collect_photos(tmp_path / "nowhere", tmp_path, 10)
    with pytest.raises(CaptureError, match="there is no such folder"):
        list_photos(tmp_path / "nowhere")
    folder = _fill(tmp_path / "photos", 3)
    with pytest.raises(CaptureError, match="single photo"):
        collect_photos(folder / "p0.jpg", tmp_path, 10)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CaptureError, match="neither a folder nor a video"):
        collect_photos(tmp_path / "a.txt", tmp_path, 10)


def test_blur_lowers_sharpness():
    picture = _picture(0)
    blurred = [sharpness(cv2.GaussianBlur(picture, (0, 0), sigma)) for sigma in (0.5, 1, 2, 4)]
    assert sharpness(picture) > blurred[0] > blurred[1] > blurred[2] > blurred[3]
    assert sharpness(np.full((50, 50, 3), 90, np.uint8)) == 0


def test_sharpest_frame_of_each_bin_is_taken(tmp_path):
    """Three seconds at 10 Hz, all blurred but frames 4, 17 and 22, one in each of three bins."""
    sharp = {4: (255, 0, 0), 17: (0, 255, 0), 22: (0, 0, 255)}
    frames = []
    for index in range(30):
        picture = cv2.GaussianBlur(_picture(7), (0, 0), 5)
        if index in sharp:
            picture = _picture(7)
            picture[32:64, 32:64] = sharp[index]
        frames.append(picture)
    video = _write_video(tmp_path / "clip.mp4", frames)
    heard = []
    taken = collect_photos(video, tmp_path / "frames", 3, lambda fraction, text: heard.append(fraction))
    assert [path.name for path in taken] == ["frame_00000.jpg", "frame_00001.jpg", "frame_00002.jpg"]
    centers = [np.array(Image.open(path))[48, 48] for path in taken]
    assert [int(center.argmax()) for center in centers] == [0, 1, 2]
    assert all(center.max() > 150 for center in centers)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_frames_closer_than_a_tenth_of_a_second_are_not_taken(tmp_path):
    video = _write_video(tmp_path / "clip.mp4", [_picture(index) for index in range(30)], rate=30)
    taken = sharp_frames(video, tmp_path / "frames", 200)
    assert 9 <= len(taken) <= 11


def test_a_clip_that_begins_late_gives_as_many_frames(tmp_path):
    frames = [_picture(index) for index in range(40)]
    early = sharp_frames(_write_video(tmp_path / "a.mkv", frames), tmp_path / "a", 10)
    late = sharp_frames(_write_video(tmp_path / "b.mkv", frames, begin=100.0), tmp_path / "b", 10)
    assert len(early) == len(late) == 10


def test_old_frames_do_not_survive(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "frame_99999.jpg").write_bytes(b"old")
    video = _write_video(tmp_path / "clip.mp4", [_picture(index) for index in range(20)])
    taken = sharp_frames(video, tmp_path / "frames", 5)
    assert sorted((tmp_path / "frames").iterdir()) == taken
    assert len(taken) == 5


def test_broken_videos(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(CaptureError, match=r"noise\.mp4: cannot be decoded"):
        sharp_frames(tmp_path / "noise.mp4", tmp_path / "frames", 10)
    short = _write_video(tmp_path / "short.mp4", [_picture(0), _picture(1)])
    with pytest.raises(CaptureError, match="at least 3 are needed"):
        sharp_frames(short, tmp_path / "frames", 10)
    whole = _write_video(tmp_path / "whole.mp4", [_picture(index) for index in range(30)])
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(CaptureError, match=r"cut\.mp4"):
        sharp_frames(tmp_path / "cut.mp4", tmp_path / "frames", 10)
