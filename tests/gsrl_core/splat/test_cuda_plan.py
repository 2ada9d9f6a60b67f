"""What the CUDA rasteriser decides before it draws; no test here needs a GPU."""

import time

import pytest
import torch

from gsrl_core.errors import SceneError
from gsrl_core.geometry.camera import Camera, intrinsics, look_at
from gsrl_core.splat.cuda import library
from gsrl_core.splat.cuda.library import LIVE, OVER_LAYER, STATE, STATIC_ONLY
from gsrl_core.splat.cuda.plan import LAYER_BYTES, MAX_ENTRIES, Found, Plan
from gsrl_core.splat.cuda.recording import Recording, check_moved, check_same_batch
from gsrl_core.splat.cuda.seen import Seen
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.scene import Scene

WIDTH, HEIGHT = 64, 48


def camera(count, seed=0, width=WIDTH):
    """``count`` different poses."""
    eyes = torch.tensor([0.6, 0.5, 0.7]) + 0.2 * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    K = intrinsics(50.0, 50.0, 32.0, 24.0).expand(count, 3, 3)
    return Camera(look_at(eyes, torch.zeros(count, 3)), K, width, HEIGHT)


def anew(old, index=slice(None)):
    """Other tensors with the same numbers."""
    chosen = old.select(index)
    return Camera(chosen.world_to_camera.clone(), chosen.K.clone(), old.width, old.height)


# --- Seen


def test_poses_are_known_again_one_by_one():
    first, seen = camera(4), Seen()
    assert seen.look(first) is None
    assert seen.look(first) == seen.look(anew(first)) == [0, 1, 2, 3]
    assert seen.look(anew(first, [3, 1])) == [3, 1]
    assert seen.look(anew(first, [2])) == [2]
    assert seen.look(anew(first)) == [0, 1, 2, 3]


def test_one_new_pose_makes_a_call_the_remembered_one():
    first, seen = camera(3), Seen()
    seen.look(first)
    mixed = anew(first)
    mixed.world_to_camera[1, 0, 3] += 1e-6
    assert seen.look(mixed) is None
    assert seen.look(anew(mixed, [1, 2])) == [1, 2]
    assert seen.look(first) is None


@pytest.mark.parametrize("change", ["pose", "intrinsics", "size"])
def test_every_number_of_a_camera_counts(change):
    first, seen = anew(camera(2)), Seen()
    seen.look(first)
    if change == "pose":
        first.world_to_camera[1, 2, 3] += 0.1  # in place
    elif change == "intrinsics":
        first.K[1, 0, 2] += 1
    else:
        first = Camera(first.world_to_camera, first.K, WIDTH + 1, HEIGHT)
    assert seen.look(first) is None and seen.look(anew(first)) == [0, 1]


def test_no_pose_is_never_known():
    seen = Seen()
    assert seen.look(camera(0)) is None and seen.look(anew(camera(0))) is None


def test_a_camera_that_moves_costs_little():
    seen, moved = Seen(), [camera(256, seed) for seed in range(20)]
    seen.look(moved[0])
    start = time.process_time()
    assert all(seen.look(one) is None for one in moved[1:])
    assert (time.process_time() - start) / 19 < 5e-3


# --- CudaRasterizer


class Dry(CudaRasterizer):
    """Everything but the drawing; ``drawn`` lists mode, number of environments and rows of the static part's pictures.

    ``entries`` is what each environment's lists are said to need; ``last`` is the last plan.
    """

    entries = 1000

    def draw(self, plans, poses):
        self.drawn = getattr(self, "drawn", [])
        for plan in plans.values():
            rows = plan.found.rows
            self.drawn.append((plan.mode, len(poses), None if rows is None else rows.tolist()))
            plan.state.fill_(self.entries)
            self.last = plan


@pytest.fixture
def draw(monkeypatch, random_gaussians):
    """A function ``(camera, count, rasterizer)``: what is drawn for that camera of that many environments."""
    monkeypatch.setattr(library, "load", lambda device: None)
    scene = Scene.from_parts(random_gaussians(50), {"cube": (random_gaussians(20), torch.eye(4))})

    def drawn(rasterizer, camera, count, name="c"):
        rasterizer.drawn = []
        rasterizer.render(scene, torch.eye(4).expand(count, 1, 4, 4), {name: camera})
        return rasterizer.drawn

    return drawn


def test_jittered_cameras_keep_their_static_pictures_while_environments_end(draw):
    rasterizer, first = Dry("cpu"), camera(4)
    assert draw(rasterizer, first, 4) == [(LIVE, 4, None)]
    assert draw(rasterizer, anew(first), 4) == [(STATIC_ONLY, 4, None), (OVER_LAYER, 4, [0, 1, 2, 3])]
    for left in ([0, 1, 2, 3], [0, 2, 3], [3, 2], [2], [0, 1, 2, 3]):
        assert draw(rasterizer, anew(first, left), len(left)) == [(OVER_LAYER, len(left), left)]
    again = camera(4, seed=1)  # the next episodes
    assert draw(rasterizer, again, 4) == [(LIVE, 4, None)] and rasterizer._known["c"].layer is None
    assert draw(rasterizer, anew(again, [1, 3]), 2) == [(STATIC_ONLY, 4, None), (OVER_LAYER, 2, [1, 3])]


def test_the_poses_drawn_are_those_of_the_call(draw):
    rasterizer, first = Dry("cpu"), camera(3)
    for left in ([0, 1, 2], [0, 1, 2], [2, 0]):
        draw(rasterizer, anew(first, left), len(left))
        drawn = rasterizer.last.camera
        assert torch.equal(drawn.world_to_camera, first.world_to_camera[left]) and drawn.K.is_contiguous()


def test_a_camera_that_moves_is_drawn_live_and_nothing_is_kept(draw):
    rasterizer = Dry("cpu")
    for seed in range(4):
        assert draw(rasterizer, camera(3, seed), 3) == [(LIVE, 3, None)]
        assert rasterizer._known["c"].layer is None


def test_static_pictures_beyond_the_bound_are_not_kept(draw):
    first, bound = camera(4), 4 * LAYER_BYTES * WIDTH * HEIGHT
    for bytes_allowed, kept in ((bound, True), (bound - 1, False)):
        rasterizer = Dry("cpu", cache_bytes=bytes_allowed)
        modes = [draw(rasterizer, anew(first), 4)[-1][0] for _ in range(3)]
        assert modes == [LIVE, *(2 * [OVER_LAYER if kept else LIVE])]


def test_a_pose_that_all_share_is_drawn_once_whatever_their_number(draw):
    rasterizer, shared = Dry("cpu", cache_bytes=0), camera(1)
    assert draw(rasterizer, shared, 3) == [(STATIC_ONLY, 1, None), (OVER_LAYER, 3, None)]
    assert draw(rasterizer, anew(shared), 2) == draw(rasterizer, anew(shared, [0, 0]), 2) == [(OVER_LAYER, 2, None)]
    own = camera(2)
    rasterizer = Dry("cpu")
    for _ in range(2):
        draw(rasterizer, own, 2)
    assert draw(rasterizer, anew(own, [1]), 3) == [(OVER_LAYER, 3, [1, 1, 1])]


def test_a_callers_later_writing_does_not_reach_what_is_remembered(draw):
    rasterizer, first = Dry("cpu"), anew(camera(2))
    draw(rasterizer, first, 2)
    kept = anew(first)
    first.world_to_camera.zero_()
    assert draw(rasterizer, kept, 2)[0] == (STATIC_ONLY, 2, None)
    assert torch.equal(rasterizer._known["c"].camera.world_to_camera, kept.world_to_camera)


def make_plan(entries):
    state = torch.zeros(len(entries), STATE, dtype=torch.int64)
    state[:, 0] = torch.tensor(entries)
    state = torch.where(state >= 1 << 31, state - (1 << 32), state).to(torch.int32)  # the same bits
    return Plan(LIVE, Found(camera(1)), None, (0, 1), 1, 100, state)


def test_counters_are_unsigned_and_bounded():
    assert make_plan([5, MAX_ENTRIES, 7]).most_entries() == MAX_ENTRIES
    assert make_plan([]).most_entries() == 0
    for entries in (MAX_ENTRIES + 1, (1 << 31) + 5, (1 << 32) - 1):
        with pytest.raises(SceneError, match=f"64 x 48 pixels has {entries} entries"):
            make_plan([3, entries]).most_entries()


def test_too_many_entries_are_refused_instead_of_drawn_wrongly(draw):
    rasterizer = Dry("cpu")
    rasterizer.entries = -(1 << 30)
    with pytest.raises(SceneError, match="entries of Gaussians"):
        draw(rasterizer, camera(1), 1)


# --- Recording


def test_a_recording_refuses_what_it_would_have_to_ignore():
    recorded = {"still": camera(1), "wrist": camera(3)}
    check_moved(recorded, ("wrist",), {"wrist": camera(3, seed=1)})
    with pytest.raises(SceneError, match=r"'still' was recorded as standing still.*now: wrist"):
        check_moved(recorded, ("wrist",), {"still": camera(1, seed=1)})
    with pytest.raises(SceneError, match=r"\(1, 64, 48\), was recorded with \(3, 64, 48\)"):
        check_moved(recorded, ("wrist",), {"wrist": camera(1)})
    with pytest.raises(SceneError, match=r"\(3, 65, 48\), was recorded with"):
        check_moved(recorded, ("wrist",), {"wrist": camera(3, width=65)})
    with pytest.raises(SceneError, match=r"\(1, 2, 4, 4\), was recorded as \(3, 2, 4, 4\)"):
        check_same_batch(torch.zeros(3, 2, 4, 4), torch.zeros(1, 2, 4, 4))


def test_a_recording_refuses_moving_cameras_that_there_are_not(monkeypatch, random_gaussians):
    monkeypatch.setattr(library, "load", lambda device: None)
    scene = Scene.from_parts(random_gaussians(5), {})
    with pytest.raises(SceneError, match=r"moving cameras \['hand'\] are none of \['wrist'\]"):
        Recording(CudaRasterizer("cpu"), scene, torch.zeros(3, 0, 4, 4), {"wrist": camera(3)}, moving=["hand"])
