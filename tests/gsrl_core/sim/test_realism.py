"""The realism switches: off is the identity, one seed gives the same bits in any batch, strengths are as stated."""

import numpy as np
import pytest
import torch
from PIL import Image
from sim_helpers import PoseRasterizer, bench_scene, empty_scene, sim_config

from gsrl_core.errors import SimulationError
from gsrl_core.geometry.rotation import matrix_to_rotvec
from gsrl_core.sections import CameraConfig, RealismConfig
from gsrl_core.sim import passes
from gsrl_core.sim.gs_env import make_env
from gsrl_core.sim.perturb import Perturbation, perturbation
from gsrl_core.sim.realism import Realism, draw_look, noise_places, noisy, over_background, tone_table
from gsrl_core.splat.frames import Frames
from gsrl_core.splat.raster_cuda import CudaRasterizer
from gsrl_core.splat.raster_numba import NumbaRasterizer

NAME = "3rd_view_camera"
SIZE = (37, 53)
STRONG = {
    "exposure_range": (0.5, 1.5),
    "white_balance_range": (0.8, 1.2),
    "gamma_range": (0.7, 1.4),
    "contrast_range": (0.7, 1.3),
    "read_noise": 4.0,
    "shot_noise": 6.0,
    "background": "random",
    "camera_turn_deg": 1.0,
    "camera_shift": 0.01,
    "shadow": 0.6,
}
TONES = ("exposure_range", "white_balance_range", "gamma_range", "contrast_range", "read_noise", "shot_noise")


def realism(scene=None, **knobs):
    return Realism(RealismConfig(**knobs), scene or empty_scene(), {NAME: torch.zeros(*SIZE, 2)}, "cpu")


def pictures(count):
    return torch.randint(256, (count, *SIZE, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def sensed(knobs, seeds, rgb, elapsed=None):
    switches = realism(**knobs)
    switches.begin(seeds)
    steps = np.zeros(len(seeds), np.int32) if elapsed is None else np.array(elapsed)
    return switches.on_sensor(NAME, rgb, steps, torch.arange(len(seeds)))


def test_everything_is_off_by_default_and_off_is_the_very_picture():
    switches, rgb = realism(), pictures(2)
    frames = Frames(rgb)
    assert torch.equal(switches.begin([1, 2]), torch.eye(4).repeat(2, 1, 1))
    assert not switches.needs_extras
    assert switches.on_scene(NAME, frames, None, None, torch.arange(2)) is rgb
    assert switches.on_sensor(NAME, rgb, np.zeros(2), torch.arange(2)) is rgb


def test_a_neutral_tone_leaves_every_level():
    assert np.array_equal(tone_table(np.ones(3), 1.0, 1.0), np.tile(np.arange(256), (3, 1)))


def test_tones_are_as_documented():
    # 51 is a fifth of 255.
    assert tone_table(np.array([2.0, 1.0, 0.5]), 1.0, 1.0)[:, 51].tolist() == pytest.approx([102, 51, 25.5])
    assert tone_table(np.ones(3), 2.0, 1.0)[0, 51] == pytest.approx(255 / 25)
    assert tone_table(np.ones(3), 1.0, 0.5)[0, [0, 255]].tolist() == pytest.approx([63.75, 191.25])


@pytest.mark.parametrize(
    ("knob", "level", "low", "high"),
    [
        ("exposure_range", 100, 50, 150),
        ("white_balance_range", 100, 50, 150),
        ("gamma_range", 51, 255 * 0.2**1.5, 255 * 0.2**0.5),
        ("contrast_range", 255, 127.5 + 63.75, 255),
    ],
)
def test_each_tone_knob_acts_within_its_range(knob, level, low, high):
    rgb = torch.full((300, *SIZE, 3), level, dtype=torch.uint8)[:, :1, :1]
    seen = sensed({knob: (0.5, 1.5)}, range(300), rgb).float()[:, 0, 0]
    assert seen.min() >= low - 1
    assert seen.max() <= high + 1
    assert seen.max() - seen.min() > 0.8 * (high - low)
    same_for_all_channels = torch.equal(seen[:, 0], seen[:, 1]) and torch.equal(seen[:, 0], seen[:, 2])
    assert same_for_all_channels == (knob != "white_balance_range")


def test_one_knob_does_not_shift_the_draws_of_another():
    alone = draw_look(RealismConfig(exposure_range=(0.5, 1.5)), 7)
    busy = draw_look(RealismConfig(exposure_range=(0.5, 1.5), camera_turn_deg=3, camera_shift=0.1), 7)
    assert torch.equal(alone.tone, busy.tone)
    assert torch.equal(alone.color, busy.color)
    assert alone.picture == busy.picture


def test_noise_has_the_stated_variance():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for level in (0.0, 51.0, 255.0):
        noise = noisy(torch.full_like(normal, level), normal, 3.0, 6.0) - level
        assert noise.mean().abs() < 0.05
        assert noise.std().item() == pytest.approx((9 + 36 * level / 255) ** 0.5, rel=0.01)
    grey = torch.full((4, *SIZE, 3), 128, dtype=torch.uint8)
    seen = sensed({"read_noise": 5.0}, range(4), grey).float() - 128
    # Rounding adds 1/12.
    assert seen.std().item() == pytest.approx((25 + 1 / 12) ** 0.5, rel=0.03)
    assert seen.mean().abs() < 0.2


def test_noise_is_new_at_every_step_and_camera_and_repeats_for_the_same():
    grey = torch.full((2, *SIZE, 3), 128, dtype=torch.uint8)
    first, again, later = (sensed({"shot_noise": 5.0}, [4, 5], grey, [s, s]) for s in (0, 0, 5))
    assert torch.equal(first, again)
    for one, other in ((first[0], first[1]), (first, later)):
        deviations = torch.stack([one.float().flatten() - 128, other.float().flatten() - 128])
        assert torch.corrcoef(deviations)[0, 1].abs() < 0.1
    seeds, steps = np.arange(500), np.zeros(500, np.int64)
    assert len(set(noise_places(seeds, steps, 0)) | set(noise_places(seeds, steps, 1))) > 990


@pytest.mark.parametrize("knob", TONES)
def test_each_knob_gives_the_same_bits_in_every_batch(knob, monkeypatch):
    rgb, seeds, steps = pictures(5), [11, 3, 8, 5, 2], [0, 5, 10, 5, 0]
    together = sensed({knob: STRONG[knob]}, seeds, rgb, steps)
    assert not torch.equal(together, rgb)
    for i, seed in enumerate(seeds):
        alone = sensed({knob: STRONG[knob]}, [seed], rgb[i : i + 1], [steps[i]])
        assert torch.equal(alone[0], together[i])
    monkeypatch.setitem(passes.PASS_VALUES, "cpu", 2 * rgb[0].numel())
    assert torch.equal(sensed({knob: STRONG[knob]}, seeds, rgb, steps), together)


def test_the_background_shows_as_far_as_the_scene_lets_light_through():
    rgb = torch.full((1, 1, 3, 3), 60, dtype=torch.uint8)
    alpha = torch.tensor([[[1.0, 0.5, 0.0]]])
    mixed = over_background(rgb, alpha, torch.tensor([[[[200, 100, 250]]]], dtype=torch.uint8))
    assert mixed[0, 0].tolist() == [[60, 60, 60], [160, 110, 185], [255, 160, 255]]


def test_flat_backgrounds_differ_by_episode():
    switches = realism(background="random")
    assert switches.needs_extras
    rgb = torch.zeros(3, *SIZE, 3, dtype=torch.uint8)
    switches.begin([4, 5, 4])
    shown = switches.on_scene(NAME, Frames(rgb, alpha=torch.zeros(3, *SIZE)), None, None, torch.arange(3))
    assert torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0, 0, 0], draw_look(RealismConfig(), 4).color)
    assert (shown == shown[:, :1, :1]).all()


def test_backgrounds_from_a_folder_are_cropped_to_the_picture_and_chosen_by_seed(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for i, color in enumerate(colors):
        Image.new("RGB", (200, 30 + 100 * i), color).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    switches = realism(background=str(tmp_path))
    switches.begin(range(40))
    frames = Frames(torch.zeros(40, *SIZE, 3, dtype=torch.uint8), alpha=torch.zeros(40, *SIZE))
    shown = switches.on_scene(NAME, frames, None, None, torch.arange(40))
    assert (shown == shown[:, :1, :1]).all()
    assert {tuple(color) for color in shown[:, 0, 0].tolist()} == set(colors)
    some = torch.tensor([17, 3])
    part = Frames(frames.rgb[some], alpha=frames.alpha[some])
    assert torch.equal(switches.on_scene(NAME, part, None, None, some), shown[some])


def test_unusable_backgrounds_are_refused(tmp_path):
    with pytest.raises(SimulationError, match="is no folder"):
        realism(background=str(tmp_path / "absent"))
    with pytest.raises(SimulationError, match="0 pictures"):
        realism(background=str(tmp_path))
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(SimulationError, match=r"broken\.png cannot be read"):
        realism(background=str(tmp_path))


def test_camera_jitter_has_the_stated_deviations():
    motion = realism(camera_turn_deg=2.0, camera_shift=0.03).begin(range(300))
    turn = torch.rad2deg(matrix_to_rotvec(motion[:, :3, :3]))
    assert turn.std().item() == pytest.approx(2.0, rel=0.1)
    assert motion[:, :3, 3].std().item() == pytest.approx(0.03, rel=0.1)
    assert torch.equal(realism(camera_turn_deg=2.0).begin([1])[0, :3, 3], torch.zeros(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_bits_of_the_cpu():
    knobs = {knob: STRONG[knob] for knob in TONES} | {"background": "random"}
    frames, seen = Frames(pictures(3), alpha=torch.rand(3, *SIZE)), []
    for device in ("cpu", "cuda"):
        switches = Realism(RealismConfig(**knobs), empty_scene(), {NAME: torch.zeros(*SIZE, 2)}, device)
        switches.begin([4, 5, 6])
        there = Frames(frames.rgb.to(device), alpha=frames.alpha.to(device))
        rgb = switches.on_scene(NAME, there, None, None, torch.arange(3))
        seen.append(switches.on_sensor(NAME, rgb, np.array([0, 5, 5]), torch.arange(3)).cpu())
    assert torch.equal(*seen)


# ---------------------------------------------------------------------------- in the environment
def test_an_environment_without_realism_shows_the_rasterizers_bits():
    with make_env(sim_config(), empty_scene(), PoseRasterizer()) as env:
        shown = env.reset([1, 2]).rgb[NAME]
        poses, cameras = env._rasterizer.calls[-1]
        assert torch.equal(shown, PoseRasterizer().render(None, poses, cameras)[NAME].rgb)
        assert len(cameras[NAME]) == 1


def shows(seeds, knobs, kind=None):
    """Seed -> its pictures after the reset and after a chunk, drawn by the CPU rasterizer."""
    config = sim_config(
        num_envs=len(seeds), cameras=(CameraConfig(),), render_downscale=8, realism=RealismConfig(**knobs)
    )
    with make_env(config, bench_scene(), NumbaRasterizer(), perturbation=kind) as env:
        start = env.reset(seeds).rgb[NAME]
        later = env.step_chunk(torch.zeros(len(seeds), 2, 7)).observation.rgb[NAME]
        assert torch.equal(env.frames()[NAME].rgb, later)
    return dict(zip(seeds, torch.stack([start, later], dim=1), strict=True))


def test_the_same_episode_looks_the_same_in_every_batch():
    together, alone, plain = shows([8, 5, 6], STRONG), shows([5], STRONG), shows([5], {})
    assert torch.equal(together[5], alone[5])
    assert not torch.equal(alone[5][0], alone[5][1])
    assert (alone[5].float() - plain[5].float()).abs().mean() > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_jittered_camera_keeps_its_static_pictures_and_shows_the_same():
    config = sim_config(
        num_envs=3, cameras=(CameraConfig(),), render_downscale=4, realism=RealismConfig(camera_turn_deg=1.0)
    )
    shown, kept = [], []
    for cache_bytes in (0, 1 << 30):
        rasterizer = CudaRasterizer(cache_bytes=cache_bytes)
        with make_env(config, bench_scene().to("cuda"), rasterizer) as env:
            pictures = [env.reset([4, 5, 6]).rgb[NAME]]
            for _ in range(2):
                pictures.append(env.step_chunk(torch.zeros(3, 2, 7)).observation.rgb[NAME])
                kept.append(rasterizer._known[NAME].layer is not None)
            env._draw(torch.tensor([0, 2]))  # as if one had ended
            kept.append(rasterizer._known[NAME].layer is not None)
            shown.append(torch.stack([*pictures, env.render_video_frame()]))
    assert kept == [False] * 3 + [True] * 3
    assert torch.equal(*shown)


def test_each_knob_changes_the_environments_pictures_and_only_from_seed():
    plain = shows([5, 6], {})
    for knob, value in STRONG.items():
        changed = shows([5, 6], {knob: value})
        assert not torch.equal(changed[5], plain[5]), knob
        assert torch.equal(changed[6], shows([6], {knob: value})[6]), knob


def test_a_cell_of_the_sweep_puts_its_values_over_the_configured_ones():
    configured = RealismConfig(exposure_range=(0.5, 0.5), shadow=0.1)
    over = perturbation("shadow").realism_over(configured)
    assert over == RealismConfig(exposure_range=(0.5, 0.5), shadow=0.5)
    assert Perturbation().realism_over(configured) == configured
    plain = shows([5], {})
    for kind in ("sensor", "background", "shadow"):
        assert not torch.equal(shows([5], {}, perturbation(kind))[5], plain[5]), kind
