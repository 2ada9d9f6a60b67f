"""LeRobot datasets out and in, against the lerobot library's own reader and writer."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from gsrl_core import lerobot_data
from gsrl_core.errors import TrainingError
from gsrl_core.interfaces import NullReporter
from gsrl_core.lerobot_data import LeRobotFolder, export_lerobot, import_lerobot
from gsrl_core.policy.demonstrations import Episode, load_demonstrations, write_shard
from gsrl_core.sections import SftConfig
from gsrl_core.sft import train_sft

SIZE = (24, 32, 3)
REPORTER = NullReporter()


def vectors(rng, length):
    action = rng.uniform(-0.05, 0.05, (length, 7)).astype(np.float32)
    action[:, 6] = rng.choice([-1, 1], length)
    return rng.normal(size=(length, 9)).astype(np.float32), action


def episode(seed, length):
    rng = np.random.default_rng(seed)
    rgb = {camera: rng.integers(256, size=(length, *SIZE), dtype=np.uint8) for camera in ("base_camera", "wrist")}
    return Episode(seed, f"sentence {seed % 2}", rgb, *vectors(rng, length))


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three episodes in two shards; seeds in between failed."""
    folder = tmp_path_factory.mktemp("recorded") / "demos"
    write_shard(folder, 10, [episode(10, 5), episode(12, 3)])
    write_shard(folder, 14, [episode(15, 6)])
    (folder / "demos.json").write_text(json.dumps({"control_hz": 10.0}))
    return folder


@pytest.fixture(scope="module")
def exported(demos):
    out = demos.with_name("dataset")
    assert export_lerobot(demos, out, REPORTER) == 3
    assert [path.name for path in sorted(out.parent.iterdir())] == ["dataset", "demos"]
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """As people record: videos and an image, other keys, a depth image, 15 Hz."""
    root = tmp_path_factory.mktemp("foreign") / "dataset"
    picture = {"shape": SIZE, "names": ["height", "width", "channels"]}
    depth = {"shape": (*SIZE[:2], 1), "names": ["height", "width", "channels"], "info": {"is_depth_map": True}}
    features = {
        "observation.images.wrist": {"dtype": "video", **picture},
        "observation.images.front": {"dtype": "video", **picture},
        "observation.image.side": {"dtype": "image", **picture},
        "observation.images.depth": {"dtype": "image", **depth},
        "observation.state": {"dtype": "float32", "shape": (9,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("someone/pick", 15, features, root=root)
    rng = np.random.default_rng(0)
    for number, length in enumerate((6, 4, 5)):
        for index, (state, action) in enumerate(zip(*vectors(rng, length), strict=True)):
            frame = {
                f"observation.{name}": np.full(SIZE, 40 * number + 10 * index + offset, np.uint8)
                for name, offset in (("images.wrist", 0), ("images.front", 60), ("image.side", 120))
            }
            frame["observation.images.depth"] = np.full((*SIZE[:2], 1), 1000, np.uint16)
            dataset.add_frame(
                frame | {"observation.state": state, "action": action, "task": f"do {('this', 'that')[number % 2]}"}
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def same(ours, theirs):
    assert list(ours.rgb) == list(theirs.rgb)
    everything = slice(0, len(ours))
    for camera in ours.rgb:
        np.testing.assert_array_equal(ours.frames(camera, everything), theirs.frames(camera, everything))
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("state", "action", "seed"))
    assert ours.instructions == theirs.instructions


def levels(picture):
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def test_lerobot_reads_what_was_exported(demos, exported):
    ours = load_demonstrations(demos)
    dataset = LeRobotDataset("local/demonstrations", root=exported)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, len(ours), 10)
    for number, rows in enumerate(ours.episodes()):
        for row in (rows.start, rows.stop - 1):
            item = dataset[row]
            assert item["episode_index"] == number
            assert item["task"] == ours.instructions[int(ours.seed[row])]
            torch.testing.assert_close(item["observation.state"], ours.state[row], rtol=0, atol=0)
            torch.testing.assert_close(item["actions"], ours.action[row], rtol=0, atol=0)
            for camera, key in (("base_camera", "observation.image"), ("wrist", "observation.image.wrist")):
                np.testing.assert_array_equal(levels(item[key]), ours.frames(camera, slice(row, row + 1))[0])


def test_out_and_in_is_the_identity(demos, exported, tmp_path):
    facts = import_lerobot(exported, tmp_path / "back", REPORTER)
    same(load_demonstrations(tmp_path / "back"), load_demonstrations(demos))
    expected = {"episodes": 3, "frames": 14, "control_hz": 10, "cameras": "base_camera, wrist", "state_width": 9}
    assert facts == expected == json.loads((tmp_path / "back" / "demos.json").read_text())
    # So it can go out again.
    assert export_lerobot(tmp_path / "back", tmp_path / "again", REPORTER) == 3


def test_videos_images_and_other_keys_come_in_as_lerobot_reads_them(recorded, tmp_path):
    facts = import_lerobot(recorded, tmp_path / "demos", REPORTER)
    ours = load_demonstrations(tmp_path / "demos")
    assert facts["control_hz"] == 15
    assert list(ours.rgb) == ["front", "side", "wrist"]
    assert ours.episodes() == [slice(0, 6), slice(6, 10), slice(10, 15)]
    assert ours.instructions == {0: "do this", 1: "do that", 2: "do this"}
    dataset = LeRobotDataset("someone/pick", root=recorded, video_backend="pyav")
    keys = {"front": "observation.images.front", "side": "observation.image.side", "wrist": "observation.images.wrist"}
    for row in range(len(ours)):
        item = dataset[row]
        assert torch.equal(item["observation.state"], ours.state[row])
        assert torch.equal(item["action"], ours.action[row])
        for camera, key in keys.items():
            np.testing.assert_array_equal(levels(item[key]), ours.frames(camera, slice(row, row + 1))[0])


def test_chosen_cameras_take_the_slots_in_their_order(recorded, tmp_path):
    import_lerobot(recorded, tmp_path / "demos", REPORTER, cameras=["wrist", "observation.images.front"])
    ours = load_demonstrations(tmp_path / "demos")
    assert list(ours.rgb) == ["base_0_rgb", "left_wrist_0_rgb"]
    first = slice(0, 1)
    assert ours.frames("base_0_rgb", first).mean() == pytest.approx(0, abs=3)
    assert ours.frames("left_wrist_0_rgb", first).mean() == pytest.approx(60, abs=3)
    with pytest.raises(TrainingError, match="has no camera top; cameras: front, side, wrist"):
        import_lerobot(recorded, tmp_path / "demos", REPORTER, cameras=["top"])


def test_sft_trains_on_it(recorded, tmp_path):
    import_lerobot(recorded, tmp_path / "demos", REPORTER)
    config = SftConfig(steps=1, batch_size=2, warmup_steps=1)
    facts = train_sft(tmp_path / "demos", tmp_path / "out", None, "pi05_tiny", config, device="cpu", reporter=REPORTER)
    assert (facts["episodes"], facts["frames"]) == (3, 15)


def test_interrupted_import_continues_with_whole_shards(recorded, tmp_path, monkeypatch):
    import_lerobot(recorded, tmp_path / "whole", REPORTER)
    monkeypatch.setattr(lerobot_data, "SHARD_BYTES", 10 * 3 * int(np.prod(SIZE)))
    monkeypatch.setattr(lerobot_data, "DECODED_AT_ONCE", 2)
    assert list(LeRobotFolder.open(recorded, ()).batches()) == [range(2), range(2, 3)]
    read = LeRobotFolder.episodes
    asked = []

    def dying(self, batch):
        asked.append(batch)
        if batch.start and len(asked) < 3:
            raise KeyboardInterrupt
        return read(self, batch)

    monkeypatch.setattr(LeRobotFolder, "episodes", dying)
    with pytest.raises(KeyboardInterrupt):
        import_lerobot(recorded, tmp_path / "parts", REPORTER)
    assert not (tmp_path / "parts" / "demos.json").exists()
    import_lerobot(recorded, tmp_path / "parts", REPORTER)
    assert asked == [range(2), range(2, 3), range(2, 3)]
    same(load_demonstrations(tmp_path / "parts"), load_demonstrations(tmp_path / "whole"))


def test_datasets_and_cameras_do_not_mix(recorded, exported, tmp_path):
    import_lerobot(recorded, tmp_path, REPORTER, cameras=["side"])
    for source, cameras in ((exported, ()), (recorded, ["front"])):
        with pytest.raises(TrainingError, match="another dataset or other settings"):
            import_lerobot(source, tmp_path, REPORTER, cameras=cameras)


def test_seeds_of_a_shortened_dataset_are_its_episode_numbers(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    own = copy / "meta" / "demonstrations.json"
    facts = json.loads(own.read_text())
    assert facts["seeds"] == [10, 12, 15]
    own.write_text(json.dumps(facts | {"seeds": [10, 12]}))
    assert list(LeRobotFolder.open(copy, ()).seeds) == [0, 1, 2]


def test_only_finished_demonstrations_go_out_and_only_to_a_new_folder(demos, exported, tmp_path):
    with pytest.raises(TrainingError, match="exists; a dataset is written to a new folder"):
        export_lerobot(demos, exported, REPORTER)
    copy = shutil.copytree(demos, tmp_path / "demos")
    (copy / "demos.json").write_text(json.dumps({"control_hz": 7.5}))
    with pytest.raises(TrainingError, match=r"recorded at 7\.5 Hz"):
        export_lerobot(copy, tmp_path / "out", REPORTER)
    (copy / "demos.json").unlink()
    with pytest.raises(TrainingError, match="unfinished"):
        export_lerobot(copy, tmp_path / "out", REPORTER)


def test_names_of_cameras_that_are_no_names_of_files_are_refused(tmp_path):
    odd = Episode(0, "go", {"bench/top": np.zeros((2, *SIZE), np.uint8)}, *vectors(np.random.default_rng(0), 2))
    with pytest.raises(TrainingError, match="'bench/top' cannot be a camera's name here"):
        write_shard(tmp_path, 0, [odd])
    assert not list(tmp_path.iterdir())


def test_nothing_stays_of_an_interrupted_export(demos, tmp_path):
    class Dying(NullReporter):
        def progress(self, fraction, message):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_lerobot(demos, tmp_path / "out", Dying())
    assert not list(tmp_path.iterdir())


def with_info(change):
    def spoil(root):
        path = root / "meta" / "info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return spoil


def with_file(name, content):
    return lambda root: (root / "meta" / name).write_text(json.dumps(content))


def with_column(name, change):
    def spoil(root):
        path = root / "data" / "chunk-000" / "file-000.parquet"
        table = pq.read_table(path)
        values = table[name].to_pylist()
        change(values)
        column = pa.array(values, table[name].type)
        pq.write_table(table.set_column(table.column_names.index(name), table.field(name), column), path)

    return spoil


def with_entry(row, entry, value):
    return with_column("action", lambda rows: rows[row].__setitem__(entry, value))


def cut(pattern):
    def spoil(root):
        path = next(root.rglob(pattern))
        path.write_bytes(path.read_bytes()[:200])

    return spoil


def fewer_rows(root):
    path = root / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(path)[:-1], path)


def renamed(**names):
    def rename(info):
        for old, new in names.items():
            info["features"][new] = info["features"].pop(next(key for key in info["features"] if key.endswith(old)))

    return with_info(rename)


def test_keys_of_other_habits_are_found(recorded, tmp_path):
    copy = shutil.copytree(recorded, tmp_path / "copy")
    renamed(state="state", action="actions", front="observation.image", side="image", wrist="wrist_image")(copy)
    dataset = LeRobotFolder.open(copy, ())
    assert (dataset.state, dataset.action) == ("state", "actions")
    # Two of them would be called image.
    assert list(dataset.cameras) == ["image", "observation.image", "wrist_image"] == list(dataset.cameras.values())
    dataset = LeRobotFolder.open(copy, ["observation.image"])
    assert dataset.cameras == {"base_0_rgb": "observation.image"}


def test_a_vector_of_one_entry(tmp_path):
    features = {
        "observation.image": {"dtype": "image", "shape": SIZE, "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float64", "shape": (1,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    dataset = LeRobotDataset.create("someone/narrow", 10, features, root=tmp_path / "dataset", use_videos=False)
    for index in range(3):
        state = {"observation.state": np.array([index / 4])}
        dataset.add_frame(
            {"observation.image": np.zeros(SIZE, np.uint8), **state, "action": np.zeros(7, np.float32), "task": "wait"}
        )
    dataset.save_episode()
    dataset.finalize()
    import_lerobot(tmp_path / "dataset", tmp_path / "demos", REPORTER)
    assert load_demonstrations(tmp_path / "demos").state.tolist() == [[0.0], [0.25], [0.5]]


def twice_as_many_cameras(info):
    features = info["features"]
    features |= {f"{key}.2": value for key, value in features.items() if "side" in key or "front" in key}


FAULTS = {
    "no dataset": (lambda root: shutil.rmtree(root / "meta"), "is not a LeRobot dataset: it has no meta/info.json"),
    "no JSON": (cut("info.json"), "meta/info.json cannot be read"),
    "a list": (with_file("info.json", []), "meta/info.json cannot be read"),
    "features in a list": (with_info(lambda info: info.update(features=[])), "meta cannot be read"),
    "shape of no list": (
        with_info(lambda info: info["features"]["action"].update(shape=7)),
        "cannot be read",
    ),
    "rate in words": (with_info(lambda info: info.update(fps="fast")), "cannot be read"),
    "number in words": (with_info(lambda info: info.update(total_episodes="three")), "cannot be read"),
    "an episode more": (with_info(lambda info: info.update(total_episodes=4)), "says 4 episodes, meta/episodes has 3"),
    "an episode less": (with_info(lambda info: info.update(total_episodes=2)), "says 2 episodes, meta/episodes has 3"),
    "own facts in a list": (with_file("demonstrations.json", []), "meta/demonstrations.json cannot be read"),
    "own facts without seeds": (with_file("demonstrations.json", {"seeds": None}), "seeds must be ascending"),
    "seeds in words": (with_file("demonstrations.json", {"seeds": ["a", "b", "c"]}), "seeds must be ascending"),
    "seeds twice": (with_file("demonstrations.json", {"seeds": [1, 1, 2]}), "seeds must be ascending"),
    "cameras in a list": (
        with_file("demonstrations.json", {"seeds": [1, 2, 3], "cameras": ["front"]}),
        "cameras must be names by feature",
    ),
    "camera with a slash": (
        with_file("demonstrations.json", {"seeds": [1, 2, 3], "cameras": {"observation.images.front": "../../front"}}),
        r"'\.\./\.\./front' cannot be a camera's name here",
    ),
    "feature with a slash": (
        renamed(**{"observation.image.side": "observation.image.bench/top"}),
        r"\(--camera avoids its names\): 'bench/top' cannot be a camera's name here",
    ),
    "no episodes": (lambda root: shutil.rmtree(root / "meta" / "episodes"), "has no episodes"),
    "old version": (
        with_info(lambda info: info.update(codebase_version="v2.1")),
        "version v2.1, expected v3; lerobot converts v2.1: python -m lerobot.scripts.convert_dataset_v21_to_v30",
    ),
    "no action": (
        with_info(lambda info: info["features"].pop("action")),
        "no feature action or actions; features: episode_index, frame_index",
    ),
    "wide action": (
        with_info(lambda info: info["features"]["action"].update(shape=[14])),
        r"action has the shape \[14\], expected \[7\], dx, dy",
    ),
    "state of matrices": (
        with_info(lambda info: info["features"]["observation.state"].update(shape=[3, 3])),
        r"observation.state has the shape \[3, 3\], expected one vector",
    ),
    "grey pictures": (
        with_info(lambda info: info["features"]["observation.image.side"].update(shape=[24, 32, 1])),
        r"observation.image.side has the shape \[24, 32, 1\], expected colour",
    ),
    "another size": (
        with_info(lambda info: info["features"]["observation.image.side"].update(shape=[24, 40, 3])),
        "observation.image.side of episode 0 is 32x24, the dataset says 40x24",
    ),
    "another video size": (
        with_info(lambda info: info["features"]["observation.images.front"].update(shape=[3, 48, 32])),
        "observation.images.front of episode 0 is 32x24, the dataset says 32x48",
    ),
    "cameras": (with_info(twice_as_many_cameras), "5 cameras; the policy has 3 slots. Choose among front, front.2"),
    "poses": (with_entry(7, 0, 0.5), "action of episode 1 would move the hand at 7.5 m/s"),
    "gripper": (with_entry(12, 6, 80.0), "action of episode 2 ends in 80; expected dx"),
    "not finite": (with_entry(0, 3, float("nan")), "action of episode 0 is not finite"),
    "two sentences": (
        with_column("task_index", lambda rows: rows.__setitem__(8, 0)),
        "episode 1 has 2 task sentences",
    ),
    "rows": (fewer_rows, "episode 2 lacks rows"),
    "parquet": (cut("file-000.parquet"), "cannot be read"),
    "video": (cut("*.mp4"), "episode 0 cannot be read"),
    "image": (
        with_column("observation.image.side", lambda rows: rows[0].update(bytes=b"no picture")),
        "episode 0 cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, recorded, tmp_path):
    spoil, message = FAULTS[fault]
    copy = shutil.copytree(recorded, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(TrainingError, match=message) as caught:
        import_lerobot(copy, tmp_path / "demos", REPORTER)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("demos/*shard*"))
