"""Demonstrations as LeRobot v3 datasets, and LeRobot v3 datasets as demonstrations.

Actions are taken as they are in both directions: 7 values of ``pd_ee_target_delta_pose``, the motion of the hand in one
control step (m, rad) and the gripper's command (-1 closed, 1 open). What a LeRobot dataset does not hold (the episodes'
seeds, the cameras' names) lies beside its metadata, in meta/demonstrations.json.
"""

from __future__ import annotations

import io
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from av.error import FFmpegError
from PIL import Image

from gsrl_core.artifacts import digest_folder, write_json
from gsrl_core.deploy.limits import TRANSLATION_MAX
from gsrl_core.errors import TrainingError
from gsrl_core.interfaces import Reporter
from gsrl_core.policy.config import IMAGE_SLOTS
from gsrl_core.policy.demonstrations import (
    Episode,
    check_camera_names,
    claim_folder,
    load_demonstrations,
    shard_folder,
    write_shard,
)

if TYPE_CHECKING:
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    from gsrl_core.policy.demonstrations import Demonstrations

ACTION_NAMES = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
"""Motion of the hand in one control step (m, rad), gripper command in [-1, 1]."""
STATE_KEYS = ("observation.state", "state")
ACTION_KEYS = ("action", "actions")
SHARD_BYTES = 256 * 2**20
"""Pictures in an imported shard, which is held in memory twice; a longer episode is a shard of its own."""
DECODED_AT_ONCE = 256
"""Frames of a video that are decoded in one call."""
_ACTIONS = f"{', '.join(ACTION_NAMES)}: the hand's motion in a control step (m, rad), gripper in [-1, 1]"
_OWN_FACTS = "meta/demonstrations.json"
_IMAGE_WRITERS = 4
_SLACK = 1e-3


def is_lerobot(folder: Path) -> bool:
    """Whether a folder looks like a LeRobot dataset of any version."""
    return (folder / "meta" / "info.json").is_file()


def export_lerobot(folder: Path, out: Path, reporter: Reporter) -> int:
    """Write demonstrations as a LeRobot v3 dataset with pictures as PNG, whole or not at all.

    Features: ``observation.image`` (the first camera; further ones are ``observation.image.<camera>``) uint8
    [h, w, 3], ``observation.state`` float32 [S], ``actions`` float32 [7], and the sentence as ``task``.

    Returns:
        The number of episodes.

    Raises:
        TrainingError: no or unfinished demonstrations, ``out`` exists, or the control rate is not a whole number.
    """
    if out.exists():
        raise TrainingError(f"{out} exists; a dataset is written to a new folder")
    demonstrations = load_demonstrations(folder)
    rate = _whole_rate(folder)
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        _write_dataset(demonstrations, rate, fresh, reporter)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return len(demonstrations.episodes())


def import_lerobot(source: Path, out: Path, reporter: Reporter, *, cameras: Sequence[str] = ()) -> dict[str, Any]:
    """Turn a LeRobot v3 dataset into demonstrations for ``sft``; an interrupted call goes on after its last shard.

    Args:
        source: the dataset's folder. Pictures may be images or videos; depth is left out.
        out: folder for the shards.
        reporter: told the progress.
        cameras: names or keys of the cameras for the policy's base, left wrist and right wrist picture, in this order;
            none takes all (at most 3) in the order of their names.

    Returns:
        Facts: episodes, frames, control_hz [1/s], cameras, state_width. They are also written to demos.json.

    Raises:
        TrainingError: not a readable LeRobot v3 dataset, a feature is missing or has the wrong shape, the actions are
            not motions of the hand, or ``out`` holds demonstrations of another origin.
    """
    dataset = LeRobotFolder.open(source, cameras)
    batches = list(dataset.batches())
    out.mkdir(parents=True, exist_ok=True)
    claim_folder(out, {"lerobot": dataset.digest(), "cameras": dict(dataset.cameras)})
    for batch in batches:
        first = dataset.seeds[batch.start]
        if not shard_folder(out, first).is_dir():
            write_shard(out, first, dataset.episodes(batch))
        reporter.progress(batch.stop / len(dataset.seeds), f"{batch.stop} of {len(dataset.seeds)} episodes")
    imported = load_demonstrations(out)
    facts = {
        "episodes": len(imported.episodes()),
        "frames": len(imported),
        "control_hz": dataset.meta.fps,
        "cameras": ", ".join(imported.rgb),
        "state_width": imported.state.shape[1],
    }
    write_json(out / "demos.json", facts)
    return facts


@dataclass(frozen=True)
class LeRobotFolder:
    """A LeRobot v3 dataset on disk; n episodes."""

    root: Path
    meta: LeRobotDatasetMetadata
    state: str
    """Key of the state."""
    action: str
    """Key of the actions."""
    cameras: Mapping[str, str]
    """Name of a camera -> key of its pictures, in the order of the names."""
    seeds: Sequence[int]
    """What tells the episodes apart, [n] ascending: those of the exported demonstrations, or 0 to n - 1."""

    @classmethod
    def open(cls, source: Path, cameras: Sequence[str] | None) -> LeRobotFolder:
        """Read the metadata and find the features (see :func:`import_lerobot`); None for ``cameras`` is no pictures.

        Raises:
            TrainingError: not a LeRobot v3 dataset, or a feature is missing or has the wrong shape.
        """
        meta = _metadata(source)
        with _readable(source, "meta"):
            own = _own_facts(source, meta.total_episodes)
            return cls(
                source,
                meta,
                _vector_key(meta, STATE_KEYS),
                _vector_key(meta, ACTION_KEYS, len(ACTION_NAMES)),
                {} if cameras is None else _camera_keys(meta, own.get("cameras", {}), cameras),
                own.get("seeds", range(meta.total_episodes)),
            )

    def digest(self) -> str:
        """A text that changes with the dataset: its metadata (which hold statistics of all) and its files' sizes."""
        files = [path for part in ("data", "videos") for path in (self.root / part).rglob("*") if path.is_file()]
        sizes = sorted((path.relative_to(self.root).as_posix(), path.stat().st_size) for path in files)
        return f"{digest_folder(self.root / 'meta')} {sum(size for _, size in sizes)} bytes in {len(sizes)} files"

    def batches(self) -> Iterator[range]:
        """Consecutive episodes whose pictures fill a shard."""
        frame = sum(height * width * 3 for height, width in self._sizes.values())
        first, total = 0, 0
        for index, length in enumerate(self._lengths):
            if index > first and total + length * frame > SHARD_BYTES:
                yield range(first, index)
                first, total = index, 0
            total += length * frame
        yield range(first, len(self._lengths))

    def episodes(self, batch: range) -> list[Episode]:
        """Read whole episodes. Raises TrainingError."""
        images = [key for key in self.cameras.values() if key in self.meta.image_keys]
        with _readable(self.root, f"episodes {batch.start} to {batch.stop - 1}"):
            table = self._table(batch, [self.state, self.action, *images, "timestamp", "frame_index", "task_index"])
        return [self._episode(index, table) for index in batch]

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [n, S] and actions float32 [n, 7] of all frames; reads no pictures. Raises TrainingError."""
        everything = range(len(self._lengths))
        with _readable(self.root, "the data"):
            table = self._table(everything, [self.state, self.action])
            state, action = (self._matrix(table, key) for key in (self.state, self.action))
            self._check_vectors(state, action, "the dataset")
        return state, action

    @cached_property
    def _lengths(self) -> list[int]:
        with _readable(self.root, "meta/episodes"):
            lengths = list(self.meta.episodes["length"])
        if len(lengths) != len(self.seeds):
            raise TrainingError(
                f"{self.root}: meta/info.json says {len(self.seeds)} episodes, meta/episodes has {len(lengths)}; fetch "
                "the dataset again"
            )
        return lengths

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width [px] of each camera's pictures, as the metadata tell them."""
        with _readable(self.root, "meta/info.json"):
            return {name: _picture_size(key, self.meta.features[key]["shape"]) for name, key in self.cameras.items()}

    def _table(self, batch: range, columns: list[str]) -> pa.Table:
        files = dict.fromkeys(self.meta.get_data_file_path(index) for index in batch)
        own = [("episode_index", ">=", batch.start), ("episode_index", "<", batch.stop)]
        parts = [pq.read_table(self.root / file, columns=[*columns, "episode_index"], filters=own) for file in files]
        return pa.concat_tables([part.replace_schema_metadata(None) for part in parts])

    def _episode(self, index: int, table: pa.Table) -> Episode:
        where = f"episode {index}"
        with _readable(self.root, where):
            rows = table.filter(pc.field("episode_index") == index)
            if rows["frame_index"].to_pylist() != list(range(self._lengths[index])):
                raise TrainingError(f"{self.root}: {where} lacks rows, or they are out of order; fetch it again")
            state, action = (self._matrix(rows, key) for key in (self.state, self.action))
            self._check_vectors(state, action, where)
            rgb = {name: self._pictures(name, index, rows) for name in self.cameras}
        return Episode(self.seeds[index], self._sentence(rows, where), rgb, state, action)

    def _matrix(self, rows: pa.Table, key: str) -> np.ndarray:
        """A column of vectors as float32 [n, D]."""
        column = rows[key]
        (width,) = self.meta.features[key]["shape"]
        # A vector of one entry is stored as a number.
        listed = isinstance(column.type, pa.ListType | pa.FixedSizeListType)
        parts = [(chunk.flatten() if listed else chunk).to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate(parts).astype(np.float32).reshape(len(rows), width)

    def _check_vectors(self, state: np.ndarray, action: np.ndarray, where: str) -> None:
        for key, values in ((self.state, state), (self.action, action)):
            if not np.isfinite(values).all():
                raise TrainingError(f"{self.root}: {key} of {where} is not finite; leave the episode out")
        expected = f"expected {_ACTIONS}"
        if (gripper := np.abs(action[:, -1]).max(initial=0.0)) > 1.0 + _SLACK:
            raise TrainingError(f"{self.root}: {self.action} of {where} ends in {gripper:.3g}; {expected}")
        speed = np.abs(action[:, :3]).max(initial=0.0) * self.meta.fps
        if speed > TRANSLATION_MAX[0]:
            raise TrainingError(
                f"{self.root}: {self.action} of {where} would move the hand at {speed:.1f} m/s (FR3: "
                f"{TRANSLATION_MAX[0]:.0f}), so they are poses or scaled; {expected}"
            )

    def _sentence(self, rows: pa.Table, where: str) -> str:
        tasks = rows["task_index"].unique().to_pylist()
        if len(tasks) != 1:
            raise TrainingError(f"{self.root}: {where} has {len(tasks)} task sentences; split it, one is allowed")
        return str(self.meta.tasks.index[self.meta.tasks["task_index"] == tasks[0]][0])

    def _pictures(self, camera: str, index: int, rows: pa.Table) -> np.ndarray:
        """Uint8 [n, h, w, 3] of one episode."""
        key, out = self.cameras[camera], np.empty((len(rows), *self._sizes[camera], 3), np.uint8)
        if key in self.meta.image_keys:
            parts: Iterator[np.ndarray] = (_decoded(cell)[None] for cell in rows[key].to_pylist())
        else:
            parts = self._video(key, index, rows["timestamp"].to_pylist())
        done = 0
        for part in parts:
            if part.shape[1:] != out.shape[1:]:
                raise TrainingError(
                    f"{self.root}: a picture {key} of episode {index} is {part.shape[2]}x{part.shape[1]}, the dataset "
                    f"says {out.shape[2]}x{out.shape[1]}; all pictures of a camera need one size"
                )
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _video(self, key: str, index: int, timestamps: list[float]) -> Iterator[np.ndarray]:
        """The frames at ``timestamps`` [s] of an episode, uint8 [k, h, w, 3] at a time."""
        from lerobot.datasets.video_utils import decode_video_frames

        path = self.root / self.meta.get_video_file_path(index, key)
        start = self.meta.episodes[index][f"videos/{key}/from_timestamp"]
        for first in range(0, len(timestamps), DECODED_AT_ONCE):
            wanted = [start + timestamp for timestamp in timestamps[first : first + DECODED_AT_ONCE]]
            # PyAV brings its own FFmpeg; torchcodec needs one on the system. A frame belongs to the nearest timestamp.
            frames = decode_video_frames(path, wanted, 0.5 / self.meta.fps, backend="pyav", return_uint8=True)
            yield frames.permute(0, 2, 3, 1).numpy()


def _write_dataset(demonstrations: Demonstrations, rate: int, out: Path, reporter: Reporter) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.utils.utils import SuppressProgressBars

    keys = {
        camera: "observation.image" if index == 0 else f"observation.image.{camera}"
        for index, camera in enumerate(demonstrations.rgb)
    }
    dataset = LeRobotDataset.create(
        "local/demonstrations", rate, _features(demonstrations, keys), root=out, robot_type="fr3", use_videos=False,
        video_backend="pyav", image_writer_threads=_IMAGE_WRITERS,
    )  # fmt: skip
    episodes = demonstrations.episodes()
    try:
        with SuppressProgressBars():
            for done, rows in enumerate(episodes):
                for frame in _frames(demonstrations, keys, rows):
                    dataset.add_frame(frame)
                dataset.save_episode()
                reporter.progress((done + 1) / len(episodes), f"{done + 1} of {len(episodes)} episodes")
    finally:
        # Otherwise it would write when it is collected, after an interruption into a folder that is gone.
        dataset.finalize()
    seeds = [int(demonstrations.seed[rows.start]) for rows in episodes]
    write_json(out / _OWN_FACTS, {"seeds": seeds, "cameras": {key: camera for camera, key in keys.items()}})


def _features(demonstrations: Demonstrations, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        key: {
            "dtype": "image",
            "shape": demonstrations.rgb[camera][0].shape[1:],
            "names": ["height", "width", "channels"],
        }
        for camera, key in keys.items()
    }
    for key, values in (("observation.state", demonstrations.state), ("actions", demonstrations.action)):
        features[key] = {"dtype": "float32", "shape": (values.shape[1],), "names": None}
    if demonstrations.action.shape[1] == len(ACTION_NAMES):
        features["actions"]["names"] = list(ACTION_NAMES)
    return features


def _frames(demonstrations: Demonstrations, keys: Mapping[str, str], rows: slice) -> Iterator[dict[str, Any]]:
    """The rows of an episode as LeRobot wants them."""
    pictures = {key: demonstrations.frames(camera, rows) for camera, key in keys.items()}
    sentence = demonstrations.instructions[int(demonstrations.seed[rows.start])]
    for index, (state, action) in enumerate(zip(demonstrations.state[rows], demonstrations.action[rows], strict=True)):
        vectors = {"observation.state": state.numpy(), "actions": action.numpy()}
        yield {key: frames[index] for key, frames in pictures.items()} | vectors | {"task": sentence}


def _whole_rate(folder: Path) -> int:
    path = folder / "demos.json"
    if not path.is_file():
        raise TrainingError(f"{folder} is unfinished (no demos.json); run the command that makes it again")
    rate = json.loads(path.read_text())["control_hz"]
    if rate != round(rate):
        raise TrainingError(f"{folder} was recorded at {rate} Hz; LeRobot knows whole numbers of frames a second only")
    return round(rate)


def _metadata(source: Path) -> LeRobotDatasetMetadata:
    if not is_lerobot(source):
        raise TrainingError(f"{source} is not a LeRobot dataset: it has no meta/info.json")
    with _readable(source, "meta/info.json"):
        version = str(json.loads((source / "meta" / "info.json").read_text())["codebase_version"])
    if not version.startswith("v3."):
        raise TrainingError(
            f"{source} is a LeRobot dataset of version {version}, expected v3; lerobot converts v2.1: python -m "
            f"lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=local/{source.name} --root={source} "
            "--push-to-hub=false"
        )
    # For what is missing lerobot would ask the hub.
    if not (source / "meta" / "tasks.parquet").is_file() or not any((source / "meta" / "episodes").glob("*/*.parquet")):
        raise TrainingError(f"{source} has no episodes (meta/episodes, meta/tasks.parquet); fetch or record it again")
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    with _readable(source, "meta"):
        return LeRobotDatasetMetadata(f"local/{source.name}", source)


def _own_facts(source: Path, episodes: int) -> dict[str, Any]:
    """What :func:`export_lerobot` left, if it still describes the dataset (episodes may have been removed since)."""
    path = source / _OWN_FACTS
    if not path.is_file():
        return {}
    with _readable(source, _OWN_FACTS):
        facts = json.loads(path.read_text())
        seeds, cameras = facts["seeds"], facts.get("cameras", {})
        # Ascending, because neighbours of one seed would become one episode.
        numbers = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
        if not numbers or any(first >= second for first, second in pairwise(seeds)):
            raise ValueError("seeds must be ascending integers from 0 on")
        if not isinstance(cameras, dict) or not all(isinstance(name, str) for name in cameras.values()):
            raise ValueError("cameras must be names by feature")
        return facts if len(seeds) == episodes else {}


def _vector_key(meta: LeRobotDatasetMetadata, keys: tuple[str, ...], width: int | None = None) -> str:
    key = next((key for key in keys if key in meta.features), None)
    if key is None:
        raise TrainingError(
            f"{meta.root} has no feature {' or '.join(keys)}; features: {', '.join(sorted(meta.features))}"
        )
    shape = tuple(meta.features[key]["shape"])
    if len(shape) != 1 or width not in (None, shape[0]):
        wanted = f"[{width}], {_ACTIONS}" if width else "one vector"
        raise TrainingError(f"{meta.root}: {key} has the shape {list(shape)}, expected {wanted}")
    return key


def _camera_keys(meta: LeRobotDatasetMetadata, known: Mapping[str, str], chosen: Sequence[str]) -> dict[str, str]:
    """Camera name -> key. Those chosen are named after the policy's slots, whose order is the names' order."""
    colour = [key for key in meta.camera_keys if key not in meta.depth_keys]
    names = [known.get(key, _camera_name(key)) for key in colour]
    # Keys that differ by their prefix alone keep it.
    available = dict(zip(names if len(set(names)) == len(names) else colour, colour, strict=True))
    listed = ", ".join(sorted(available)) or "none"
    if not available:
        raise TrainingError(f"{meta.root} has no pictures; features: {', '.join(sorted(meta.features))}")
    keys = {key: key for key in colour} | available
    if unknown := [name for name in chosen if name not in keys]:
        raise TrainingError(f"{meta.root} has no camera {', '.join(unknown)}; cameras: {listed}")
    if len(chosen or available) > len(IMAGE_SLOTS):
        raise TrainingError(
            f"{len(chosen or available)} cameras; the policy has {len(IMAGE_SLOTS)} slots. Choose among {listed}"
        )
    if chosen:
        return {slot: keys[name] for slot, name in zip(IMAGE_SLOTS, chosen, strict=False)}
    check_camera_names(available, f"{meta.root} (--camera avoids its names)")
    return {name: available[name] for name in sorted(available)}


def _camera_name(key: str) -> str:
    """``observation.images.front`` and ``observation.image.front`` are the camera front; other keys stand for it."""
    for prefix in ("observation.images.", "observation.image.", "observation."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _picture_size(key: str, shape: Sequence[int]) -> tuple[int, int]:
    """Height and width [px] of a colour picture, stored as [h, w, 3] or [3, h, w]."""
    if len(shape) == 3 and shape[2] == 3:
        return int(shape[0]), int(shape[1])
    if len(shape) == 3 and shape[0] == 3:
        return int(shape[1]), int(shape[2])
    raise TrainingError(f"{key} has the shape {list(shape)}, expected colour pictures [h, w, 3]; leave the camera out")


def _decoded(cell: Mapping[str, Any]) -> np.ndarray:
    """Uint8 [h, w, 3] of a picture in a parquet file."""
    if cell["bytes"] is None:
        raise ValueError(f"picture {cell['path']} is not in the parquet file")
    with Image.open(io.BytesIO(cell["bytes"])) as picture:
        return np.asarray(picture.convert("RGB"))


@contextmanager
def _readable(source: Path, what: str) -> Iterator[None]:
    """What libraries raise on broken files, as one TrainingError that says where."""
    try:
        yield
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, FFmpegError, pa.ArrowException
    ) as error:  # fmt: skip
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(f"{source}: {what} cannot be read ({reason}); fetch the dataset again") from error
