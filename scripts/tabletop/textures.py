"""Procedural pictures, uint8 sRGB [h, w, 3]: wood, tiles, plaster, print."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

Rng = np.random.Generator
Color = tuple[int, int, int]


def smooth_noise(size: tuple[int, int], cells: tuple[int, int], rng: Rng, octaves: int = 4) -> np.ndarray:
    """Fractal noise [h, w] of zero mean and unit deviation; ``cells`` are (rows, columns) of the coarsest octave."""
    height, width = size
    total = np.zeros(size, np.float32)
    for octave in range(octaves):
        rows, columns = cells[0] << octave, cells[1] << octave
        if rows > height or columns > width:
            break
        grid = rng.standard_normal((rows + 2, columns + 2)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return (total - total.mean()) / total.std()


def tinted(base: Color, brightness: np.ndarray) -> np.ndarray:
    """``base`` times ``brightness`` [h, w]."""
    return np.clip(np.array(base, np.float32) * brightness[..., None], 0, 255).astype(np.uint8)


def wood(size: tuple[int, int], rng: Rng, planks: int, base: Color = (186, 140, 96)) -> np.ndarray:
    """Planks along the width: growth rings, fine grain, a knot here and there, dark seams."""
    height, width = size
    image = np.zeros((height, width, 3), np.uint8)
    edges = np.linspace(0, height, planks + 1).astype(int)
    for top, bottom in pairwise(edges):
        image[top:bottom] = _plank((bottom - top, width), rng, base)
        image[max(0, top - 1) : top + 1] = image[max(0, top - 1) : top + 1] // 2
    blotches = 1 + 0.05 * smooth_noise(size, (3, 3), rng, 5)
    return np.clip(image * blotches[..., None], 0, 255).astype(np.uint8)


def _plank(size: tuple[int, int], rng: Rng, base: Color) -> np.ndarray:
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    across = rows / height + 0.22 * smooth_noise(size, (1, 3), rng, 3)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0, width), rng.uniform(0.2, 0.8) * height
        radius = rng.uniform(0.08, 0.2) * height
        distance = ((columns - x) / 2.5) ** 2 + (rows - y) ** 2
        across += 0.9 * np.exp(-distance / (2 * radius**2))
    rings = np.sin(2 * np.pi * across * rng.uniform(4, 6))
    grain = smooth_noise(size, (max(2, height // 12), max(2, width // 220)), rng, 3)
    tone = 1 + rng.normal(0, 0.045) + 0.07 * rings + 0.045 * grain
    tone -= 0.16 * _specks(size, rng, count=size[0] * size[1] // 2600, length=14)
    tone -= 0.30 * _specks(size, rng, count=size[0] * size[1] // 60_000, length=4)
    hue = np.array(base) + rng.normal(0, 2, 3)
    return tinted(tuple(hue), tone)


def _specks(size: tuple[int, int], rng: Rng, count: int, length: int) -> np.ndarray:
    """Pores and nicks along the grain: short strokes [h, w] in [0, 1]."""
    marks = np.zeros(size, np.uint8)
    for x, y, reach, strength in zip(
        rng.integers(0, size[1], count),
        rng.integers(0, size[0], count),
        rng.integers(length // 2, 2 * length, count),
        rng.integers(90, 255, count),
        strict=True,
    ):
        cv2.line(marks, (int(x), int(y)), (int(x + reach), int(y)), int(strength), 2, cv2.LINE_AA)
    return cv2.GaussianBlur(marks, (0, 0), 1.0).astype(np.float32) / 255


def tiles(size: tuple[int, int], rng: Rng, counts: tuple[int, int], base: Color) -> np.ndarray:
    """Stone tiles with clouds, a tone each, and grout."""
    height, width = size
    tone = 1 + 0.05 * smooth_noise(size, (8, 8), rng, 5)
    veins = np.abs(smooth_noise(size, (5, 5), rng, 5))
    tone -= 0.22 * np.exp(-((veins / 0.06) ** 2))
    rows = np.linspace(0, height, counts[0] + 1).astype(int)
    columns = np.linspace(0, width, counts[1] + 1).astype(int)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            tone[top:bottom, left:right] += rng.normal(0, 0.07)
            tone[top : top + 3, left:right] = 0.55
            tone[top:bottom, left : left + 3] = 0.55
    return tinted(base, tone)


def plaster(size: tuple[int, int], rng: Rng, base: Color) -> np.ndarray:
    """A painted wall with soft clouds and trowel marks, and a skirting board at its foot."""
    image = tinted(base, 1 + 0.035 * smooth_noise(size, (6, 6), rng, 6) + 0.02 * smooth_noise(size, (40, 8), rng, 3))
    image[-size[0] // 30 :] = (96, 84, 72)
    return image


def card(size: tuple[int, int], rng: Rng, base: Color) -> np.ndarray:
    """Corrugated cardboard."""
    stripes = 0.03 * np.sin(np.arange(size[1]) / 2.2)[None]
    return tinted(base, 1 + stripes + 0.06 * smooth_noise(size, (6, 6), rng, 5))


def print_lines(image: np.ndarray, rng: Rng, box: tuple[int, int, int, int], height: int, color: Color) -> None:
    """Fill ``box`` (left, top, right, bottom) of ``image`` with lines of words ``height`` px tall, in place."""
    left, top, right, bottom = box
    letters = "aeionrstlmbcdhpuvwgk"
    for y in range(top + height, bottom, int(height * 1.7)):
        x = left
        while True:
            word = "".join(rng.choice(list(letters), rng.integers(2, 9)))
            advance = cv2.getTextSize(word, cv2.FONT_HERSHEY_DUPLEX, height / 22, 1)[0][0]
            if x + advance > right:
                break
            cv2.putText(image, word, (x, y), cv2.FONT_HERSHEY_DUPLEX, height / 22, color, 1 + height // 24, cv2.LINE_AA)
            x += advance + height // 2


def paper(size: tuple[int, int], rng: Rng) -> np.ndarray:
    """A printed sheet: a heading, paragraphs and a small chart."""
    height, width = size
    image = tinted((238, 236, 228), 1 + 0.012 * smooth_noise(size, (4, 4), rng))
    margin = width // 9
    print_lines(image, rng, (margin, margin // 2, width - margin, margin * 2), height // 16, (40, 44, 70))
    print_lines(image, rng, (margin, margin * 2, width - margin, height * 11 // 20), height // 34, (60, 60, 64))
    for index, value in enumerate(rng.uniform(0.2, 1, 7)):
        left = margin + index * (width - 2 * margin) // 7
        corner = (left + (width - 2 * margin) // 10, height - margin)
        bar = (left, int(height - margin - value * height * 0.3))
        cv2.rectangle(image, bar, corner, tuple(int(c) for c in rng.integers(60, 200, 3)), -1)
    return image


def cover(size: tuple[int, int], rng: Rng, base: Color, title: str) -> np.ndarray:
    """A book cover or poster: flat shapes on a shaded ground, a title, small print."""
    height, width = size
    fade = np.linspace(1.12, 0.8, height)[:, None] + 0.05 * smooth_noise(size, (4, 4), rng, 5)
    image = tinted(base, np.broadcast_to(fade, size))
    palette = [tuple(int(v) for v in np.clip(np.array(base) * f + s, 0, 255)) for f, s in _SHADES]
    for _ in range(14):
        color = palette[rng.integers(len(palette))]
        center = tuple(int(v) for v in rng.uniform((0.05, 0.3), (0.95, 0.95)) * (width, height))
        radius = int(rng.uniform(0.03, 0.16) * min(size))
        if rng.random() < 0.5:
            cv2.circle(image, center, radius, color, -1, cv2.LINE_AA)
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 6)))
            corners = np.array(center) + 1.4 * radius * np.stack([np.cos(angles), np.sin(angles)], -1)
            cv2.fillPoly(image, [corners.astype(np.int32)], color, cv2.LINE_AA)
    scale = 0.8 * width / cv2.getTextSize(title, cv2.FONT_HERSHEY_TRIPLEX, 1, 2)[0][0]
    light = (244, 238, 222)
    thick = max(1, round(2 * scale))
    cv2.putText(image, title, (width // 10, height // 5), cv2.FONT_HERSHEY_TRIPLEX, scale, light, thick, cv2.LINE_AA)
    print_lines(image, rng, (width // 10, height * 9 // 10, width * 9 // 10, height), max(8, height // 30), light)
    return image


_SHADES = ((0.5, 0), (0.75, 10), (1.2, 20), (0.6, 100), (0.9, -30))


def pages(size: tuple[int, int], rng: Rng) -> np.ndarray:
    """The cut edge of a book."""
    return tinted((226, 218, 198), 1 + 0.06 * rng.standard_normal((size[0], 1)) + 0.01 * rng.standard_normal(size))


def cutting_mat(size: tuple[int, int], rng: Rng) -> np.ndarray:
    """A green mat with a grid and a few cuts."""
    height, width = size
    image = tinted((58, 104, 92), 1 + 0.04 * smooth_noise(size, (5, 5), rng, 5))
    step = height // 12
    for index, x in enumerate(range(step, width - step // 2, step)):
        cv2.line(image, (x, step), (x, height - step), (150, 176, 150), 2 if index % 5 == 0 else 1, cv2.LINE_AA)
    for index, y in enumerate(range(step, height - step // 2, step)):
        cv2.line(image, (step, y), (width - step, y), (150, 176, 150), 2 if index % 5 == 0 else 1, cv2.LINE_AA)
    for _ in range(8):
        start, end = rng.uniform(0, 1, (2, 2)) * (width, height)
        cv2.line(
            image, tuple(start.astype(int).tolist()), tuple(end.astype(int).tolist()), (40, 74, 66), 1, cv2.LINE_AA
        )
    return image


def tag(dictionary: int, tag_id: int, pixels: int, margin: float) -> np.ndarray:
    """An ArUco tag on white card; ``margin`` is the card's border as a fraction of the tag's edge."""
    marker = cv2.aruco.generateImageMarker(cv2.aruco.getPredefinedDictionary(dictionary), tag_id, pixels)
    border = round(pixels * margin)
    framed = cv2.copyMakeBorder(marker, border, border, border, border, cv2.BORDER_CONSTANT, value=255)
    return np.repeat(np.clip(framed, 22, 236)[..., None], 3, axis=-1)


def mug_side(size: tuple[int, int], rng: Rng) -> np.ndarray:
    """Glaze with stripes and dots around."""
    height, width = size
    image = tinted((206, 92, 66), 1 + 0.04 * smooth_noise(size, (3, 8), rng, 4))
    image[height // 4 : height // 3] = (238, 226, 200)
    image[height * 2 // 3 : height * 3 // 4] = (238, 226, 200)
    for index in range(14):
        center = (int((index + rng.uniform(0.3, 0.7)) * width / 14), height // 2)
        cv2.circle(image, center, int(rng.uniform(0.03, 0.07) * height), (42, 60, 92), -1, cv2.LINE_AA)
    return image
