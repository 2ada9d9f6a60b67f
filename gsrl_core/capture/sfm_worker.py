"""Structure from motion with pycolmap, in a process of its own: ``python -m gsrl_core.capture.sfm_worker REQUEST``.

Only this module imports pycolmap: loaded beside another copy of libpng it crashes OpenCV's PNG writer, and a crash of
COLMAP must not take the pipeline with it. It imports nothing else of the project. Progress goes to stdout as one JSON
object a line; the answer is ``model.npz`` in the request's folder.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

_CHUNK_IMAGES = 8
_PRINCIPAL_POINT_PHOTOS = 10
_CHUNK_PAIRS = 100
_MAPPING_THREADS = 1
"""More would add up residuals in the order of finishing, and the choice between two models amplifies the last bit."""
_MATCHING_THREADS = 1
"""Several share an index of descriptors, and now and then (once in 200 runs) one searches it unfinished: of 521 matches
of two photos 35 were found. The index makes pairs so cheap that one thread takes 1.3 to 1.7 times as long as two."""
_STAGES = {"features": (0.0, 0.3), "matching": (0.3, 0.7), "mapping": (0.7, 1.0)}


def main(request_path: str) -> int:
    """Run the request; the exit code is 0 also when nothing could be registered (the answer says so)."""
    request = json.loads(Path(request_path).read_text())
    folder = Path(request["folder"])
    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.WARNING)
    pycolmap.set_random_seed(request["seed"])
    database = folder / "database.db"
    database.unlink(missing_ok=True)
    extract(database, folder, request["groups"])
    names = [name for group in request["groups"] for name in group["names"]]
    match(database, folder, _pairs(database, sorted(names), request), request["seed"])
    model = map_images(database, folder, len(names), request["seed"])
    if model is not None:
        refine_principal_points(model)
    np.savez(folder / "model.npz", **_answer(model))
    return 0


def report(stage: str, fraction: float, message: str) -> None:
    """Print one line of progress."""
    low, high = _STAGES[stage]
    print(json.dumps({"fraction": low + (high - low) * fraction, "message": message}), flush=True)  # noqa: T201


def extract(database: Path, folder: Path, groups: list[dict[str, Any]]) -> None:
    """SIFT features; the photos of one group share one SIMPLE_RADIAL camera."""
    register_photos(database, folder, groups)
    names = [name for group in groups for name in group["names"]]
    options = pycolmap.FeatureExtractionOptions()
    options.max_image_size = max(max(group["size"]) for group in groups)
    for start in range(0, len(names), _CHUNK_IMAGES):
        chunk = names[start : start + _CHUNK_IMAGES]
        pycolmap.extract_features(
            database, folder / "images", image_names=chunk, extraction_options=options, device=pycolmap.Device.cpu
        )
        done = start + len(chunk)
        report("features", done / len(names), f"features of {done} of {len(names)} photos")


def register_photos(database: Path, folder: Path, groups: list[dict[str, Any]]) -> None:
    """Enter photos and cameras before any thread runs: extraction would number the photos in the order of finishing.

    Raises:
        RuntimeError: a photo cannot be read; COLMAP itself would leave it out and go on.
    """
    pycolmap.Database.open(database).close()
    for group in groups:
        reader = pycolmap.ImageReaderOptions(camera_model="SIMPLE_RADIAL")
        if group["focal"] is not None:
            width, height = group["size"]
            reader.camera_params = f"{group['focal']},{width / 2},{height / 2},0"
        pycolmap.import_images(
            database,
            folder / "images",
            camera_mode=pycolmap.CameraMode.SINGLE,
            image_names=group["names"],
            options=reader,
        )
    with pycolmap.Database.open(database) as opened:
        unread = [name for group in groups for name in group["names"] if opened.read_image_with_name(name) is None]
    if unread:
        raise RuntimeError(f"COLMAP could not read {', '.join(unread)}")


def _pairs(database: Path, names: list[str], request: dict[str, Any]) -> list[tuple[str, str]]:
    """All pairs of a small set; of a large one each photo with its look-alikes and with its neighbours in order."""
    if len(names) <= request["exhaustive_limit"]:
        return [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    with pycolmap.Database.open(database) as opened:
        descriptors = [_descriptors(opened, name) for name in names]
    near = similar_pairs(descriptors, request["neighbours"], request["seed"])
    near |= {(i, j) for i in range(len(names)) for j in range(i + 1, min(i + 1 + request["overlap"], len(names)))}
    return [(names[i], names[j]) for i, j in sorted(near)]


def _descriptors(database: pycolmap.Database, name: str) -> np.ndarray:
    found = database.read_descriptors(database.read_image_with_name(name).image_id)
    return np.asarray(getattr(found, "data", found), dtype=np.float32)


def similar_pairs(descriptors: list[np.ndarray], neighbours: int, seed: int, words: int = 64) -> set[tuple[int, int]]:
    """Index pairs (i < j) of photos whose VLAD signatures are closest (Jegou et al. 2010).

    Args:
        descriptors: per photo float32 [F, 128].
        neighbours: look-alikes of each photo.
        seed: of the vocabulary, which is trained on these photos themselves.
        words: size of the vocabulary.
    """
    rng = np.random.default_rng(seed)
    share = max(1, 20_000 // len(descriptors))
    sample = np.concatenate([d[rng.permutation(len(d))[:share]] for d in descriptors])
    centers = sample[rng.permutation(len(sample))[:words]]
    for _ in range(8):
        nearest = _nearest(sample, centers)
        centers = np.stack([sample[nearest == w].mean(0) if (nearest == w).any() else c for w, c in enumerate(centers)])
    signatures = np.stack([_vlad(d, centers) for d in descriptors])
    likeness = signatures @ signatures.T
    np.fill_diagonal(likeness, -np.inf)
    best = np.argsort(-likeness, axis=1)[:, :neighbours]
    return {(min(i, int(j)), max(i, int(j))) for i in range(len(best)) for j in best[i] if i != j}


def _nearest(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return np.argmin((centers**2).sum(1) - 2 * points @ centers.T, axis=1)


def _vlad(descriptors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    signature = np.zeros_like(centers)
    nearest = _nearest(descriptors, centers)
    np.add.at(signature, nearest, descriptors - centers[nearest])
    # Normalised per word and then as a whole, so that repeated texture does not dominate.
    signature /= np.linalg.norm(signature, axis=1, keepdims=True) + 1e-9
    return signature.ravel() / (np.linalg.norm(signature) + 1e-9)


def match(database: Path, folder: Path, pairs: list[tuple[str, str]], seed: int) -> None:
    """Match and verify the pairs, some at a time."""
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = seed
    matching = pycolmap.FeatureMatchingOptions(num_threads=_MATCHING_THREADS)
    listing = folder / "pairs.txt"
    for start in range(0, len(pairs), _CHUNK_PAIRS):
        chunk = pairs[start : start + _CHUNK_PAIRS]
        listing.write_text("".join(f"{a} {b}\n" for a, b in chunk))
        pycolmap.match_image_pairs(
            database,
            matching_options=matching,
            pairing_options=pycolmap.ImportedPairingOptions(match_list_path=listing),
            verification_options=verification,
            device=pycolmap.Device.cpu,
        )
        done = start + len(chunk)
        report("matching", done / len(pairs), f"matched {done} of {len(pairs)} pairs of photos")


def map_images(database: Path, folder: Path, total: int, seed: int) -> pycolmap.Reconstruction | None:
    """Incremental mapping; the model with the most photos, or None."""
    options = pycolmap.IncrementalPipelineOptions()
    options.min_model_size = 3
    options.num_threads = options.mapper.num_threads = _MAPPING_THREADS
    options.random_seed = seed
    options.mapper.random_seed = seed
    options.triangulation.random_seed = seed
    placed = [2]

    def placed_one() -> None:
        placed[0] += 1
        report("mapping", min(1.0, placed[0] / total), f"placed {min(placed[0], total)} of {total} photos")

    models = pycolmap.incremental_mapping(
        database, folder / "images", folder / "models", options, next_image_callback=placed_one
    )
    return max(models.values(), key=lambda model: (model.num_reg_images(), model.num_points3D()), default=None)


def refine_principal_points(model: pycolmap.Reconstruction) -> None:
    """Last bundle adjustment with free principal points, for cameras with enough photos to tell them from rotation."""
    photos = Counter(model.image(i).camera_id for i in model.reg_image_ids())
    config = pycolmap.BundleAdjustmentConfig()
    for image_id in model.reg_image_ids():
        config.add_image(image_id)
    for camera_id, count in photos.items():
        if count < _PRINCIPAL_POINT_PHOTOS:
            config.set_constant_cam_intrinsics(camera_id)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options = pycolmap.BundleAdjustmentOptions(refine_principal_point=True, print_summary=False)
    options.ceres.solver_options.num_threads = _MAPPING_THREADS
    pycolmap.create_default_bundle_adjuster(options, config, model).solve()
    model.update_point_3d_errors()


def _answer(model: pycolmap.Reconstruction | None) -> dict[str, np.ndarray]:
    """Registered photos and points as arrays."""
    if model is None:
        return {"names": np.array([], dtype=str)}
    images = sorted((model.image(i) for i in model.reg_image_ids()), key=lambda image: image.name)
    cameras = [model.cameras[image.camera_id] for image in images]
    points = [model.points3D[i] for i in sorted(model.points3D)]
    return {
        "names": np.array([image.name for image in images]),
        "world_to_camera": np.stack([image.cam_from_world().matrix() for image in images]),
        "lens": np.array([camera.params for camera in cameras]),
        "size": np.array([(camera.width, camera.height) for camera in cameras]),
        "points": np.array([point.xyz for point in points], dtype=np.float32).reshape(-1, 3),
        "colors": np.array([point.color for point in points], dtype=np.uint8).reshape(-1, 3),
        "reprojection_px": np.array(model.compute_mean_reprojection_error()),
        "track_length": np.array(model.compute_mean_track_length()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
