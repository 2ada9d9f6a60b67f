"""Tag corners to a few hundredths of a pixel: the printed pattern is drawn as the camera would see it and fitted.

Corner detectors place a tag's corners 0.5 to 1 px inside the true ones, because blur happens in linear light and the
tone curve of a photo then lets white grow over black. At 30 px an edge that is a 4 % error of scale. Here corners, blur
and brightness are fitted to all pixels of the tag at once, in linear light (Gauss-Newton, as in Lucas and Kanade 1981).
"""

from __future__ import annotations

import cv2
import numpy as np

from gsrl_core.errors import CaptureError

_ITERATIONS = 15
_FIRST_BLUR_PX = 0.6
_BLUR_RANGE_PX = (0.25, 4.0)
_QUIET_MODULES = 0.45
"""How much of the white border is looked at; printed borders are at least one module wide."""
_MINIMUM_EXPLAINED = 0.85
"""Share of the patch's variance; less means other pixels than this tag's."""
_MINIMUM_CONTRAST = 0.005
"""Standard deviation of linear light over the tag."""
_LARGEST_STEP_PX, _CONVERGED_PX = 0.6, 0.02
_SETTLED_PX = 0.1


def aruco_dictionary(name: str) -> cv2.aruco.Dictionary:
    """OpenCV's dictionary of that name. Raises CaptureError with the allowed names."""
    known = sorted(key for key in dir(cv2.aruco) if key.startswith("DICT_"))
    if name not in known:
        raise CaptureError(f"ArUco dictionary {name!r}; allowed: {', '.join(known)}")
    return cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, name))


def find_tags(rgb: np.ndarray, dictionary: str) -> dict[int, np.ndarray]:
    """Tag id -> corners float64 [4, 2] (px, pixel centres at +0.5) in an sRGB uint8 [h, w, 3] picture.

    A tag that shows twice is left out: which one is meant cannot be known. So is one whose pixels do not fit.
    """
    known = aruco_dictionary(dictionary)
    parameters = cv2.aruco.DetectorParameters()
    parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
    quads, ids, _ = cv2.aruco.ArucoDetector(known, parameters).detectMarkers(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    numbers = [] if ids is None else ids.ravel().tolist()
    linear = to_linear_gray(rgb) if numbers else None
    found = {}
    for tag, quad in zip(numbers, quads, strict=True):
        if numbers.count(tag) == 1:
            corners = fit_corners(linear, quad.reshape(4, 2).astype(np.float64) + 0.5, tag_pattern(known, tag))
            if corners is not None:
                found[tag] = corners
    return found


def to_linear_gray(rgb: np.ndarray) -> np.ndarray:
    """Luminance float32 [h, w] in linear light of an sRGB uint8 picture (IEC 61966-2-1, ITU-R BT.709)."""
    levels = np.arange(256, dtype=np.float64) / 255
    table = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return (table[rgb] @ np.array([0.2126, 0.7152, 0.0722])).astype(np.float32)


def tag_pattern(dictionary: cv2.aruco.Dictionary, tag: int) -> np.ndarray:
    """The printed tag with one module of white around it, float64 [n, n]: 0 black, 1 white."""
    bits = cv2.aruco.generateImageMarker(dictionary, tag, dictionary.markerSize + 2) > 127
    return np.pad(bits, 1, constant_values=True).astype(np.float64)


def fit_corners(linear: np.ndarray, corners: np.ndarray, pattern: np.ndarray) -> np.ndarray | None:
    """Refine the four corners of a tag.

    Args:
        linear: picture in linear light, float32 [h, w].
        corners: first guess [4, 2], a pixel or two off (px, pixel centres at +0.5): top left, top right, bottom right,
            bottom left as printed.
        pattern: what is printed, see ``tag_pattern``.

    Returns:
        Corners [4, 2], or None if the tag is cut off by the picture's edge or the pixels are not those of this tag.
    """
    edge = float(np.linalg.norm(np.roll(corners, 1, axis=0) - corners, axis=1).mean())
    low = np.floor(corners.min(0) - 0.2 * edge - 1).astype(int)
    high = np.ceil(corners.max(0) + 0.2 * edge + 1).astype(int)
    if (low < 0).any() or high[0] > linear.shape[1] or high[1] > linear.shape[0]:
        return None
    patch = linear[low[1] : high[1], low[0] : high[0]].astype(np.float64)
    drawing = _Drawing(pattern, patch.shape, samples=4 if edge < 60 else 2 if edge < 200 else 1)
    current, blur = corners - low, _FIRST_BLUR_PX
    for iteration in range(_ITERATIONS):
        step, explained = _gauss_newton(drawing, patch, current, blur)
        # The drawing has finitely many samples a pixel, so full steps would keep rocking by some hundredths.
        step = np.clip(step, -_LARGEST_STEP_PX, _LARGEST_STEP_PX) * (1.0 if iteration < _ITERATIONS // 2 else 0.5)
        current = current + step[:8].reshape(4, 2)
        blur = float(np.clip(blur + step[8], *_BLUR_RANGE_PX))
        if not np.isfinite(current).all() or np.abs(current - (corners - low)).max() > max(2.0, 0.1 * edge):
            return None
        if np.abs(step[:8]).max() < _CONVERGED_PX:
            break
    settled = np.abs(step[:8]).max() < _SETTLED_PX and explained >= _MINIMUM_EXPLAINED
    return current + low if settled else None


def _gauss_newton(drawing: _Drawing, patch: np.ndarray, corners: np.ndarray, blur: float) -> tuple[np.ndarray, float]:
    """Step of (four corners, blur) [9] and the share of the patch's variance that is explained before it."""
    image, mask = drawing.draw(corners, blur)
    rows, columns = np.nonzero(mask)
    x, y = columns / mask.shape[1] - 0.5, rows / mask.shape[0] - 0.5
    value, seen = image[mask], patch[mask]
    # Black and white level each vary linearly over the tag: light falls off, paper is seen at an angle.
    light = np.stack([np.ones_like(x), x, y, value, value * x, value * y], axis=1)
    levels = np.linalg.lstsq(light, seen, rcond=None)[0]
    residual = seen - light @ levels
    contrast = levels[3] + levels[4] * x + levels[5] * y
    by_row, by_column = np.gradient(image)
    flow = drawing.corner_flow(corners)[..., mask]
    moves = -(flow[:, 0] * by_column[mask] + flow[:, 1] * by_row[mask]) * contrast
    widened = (drawing.draw(corners, blur + 0.05)[0][mask] - value) / 0.05 * contrast
    jacobian = np.concatenate([moves, widened[None], light.T]).T
    step = np.linalg.lstsq(jacobian, residual, rcond=None)[0][:9]
    # A flat patch, or one that is brighter where black is printed, explains nothing.
    plausible = seen.std() > _MINIMUM_CONTRAST and levels[3] > 0
    return step, 1 - float((residual**2).mean() / seen.var()) if plausible else 0.0


class _Drawing:
    """Draws one pattern into a patch of fixed size."""

    def __init__(self, pattern: np.ndarray, shape: tuple[int, int], samples: int) -> None:
        self._pattern, self._shape, self._samples = pattern, shape, samples
        modules = len(pattern) - 1
        self._square = np.array([[1, 1], [modules, 1], [modules, modules], [1, modules]], dtype=np.float32)
        fine_rows, fine_columns = np.mgrid[: shape[0] * samples, : shape[1] * samples]
        self._fine = np.stack([(fine_columns + 0.5) / samples, (fine_rows + 0.5) / samples])
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        self._pixels = np.stack([columns + 0.5, rows + 0.5])

    def draw(self, corners: np.ndarray, blur: float) -> tuple[np.ndarray, np.ndarray]:
        """Picture [h, w] of the tag with the corners there and blurred by ``blur`` px, and the pixels to compare."""
        u, v = _apply(self._to_pattern(corners), self._fine)
        last = len(self._pattern) - 1e-6
        sharp = self._pattern[np.clip(v, 0, last).astype(int), np.clip(u, 0, last).astype(int)]
        soft = cv2.GaussianBlur(sharp, (0, 0), blur * self._samples, borderType=cv2.BORDER_REPLICATE)
        image = soft.reshape(self._shape[0], self._samples, self._shape[1], self._samples).mean((1, 3))
        u, v = _apply(self._to_pattern(corners), self._pixels)
        low, high = 1 - _QUIET_MODULES, len(self._pattern) - 1 + _QUIET_MODULES
        return image, (u > low) & (u < high) & (v > low) & (v < high)

    def corner_flow(self, corners: np.ndarray) -> np.ndarray:
        """How each pixel's content moves (x, y) per pixel of motion of each corner coordinate: [8, 2, h, w]."""
        printed = _apply(self._to_pattern(corners), self._pixels)
        flow = np.empty((8, 2, *self._shape))
        for coordinate in range(8):
            moved = corners.copy()
            moved.reshape(-1)[coordinate] += 0.05
            to_patch = np.linalg.inv(self._to_pattern(moved))
            flow[coordinate] = (_apply(to_patch, printed) - self._pixels) / 0.05
        return flow

    def _to_pattern(self, corners: np.ndarray) -> np.ndarray:
        return cv2.getPerspectiveTransform(corners.astype(np.float32), self._square)


def _apply(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map [2, ...] points by a 3x3 homography."""
    mapped = np.tensordot(homography, np.concatenate([points, np.ones_like(points[:1])]), axes=1)
    return mapped[:2] / mapped[2]
