"""What stands where, in metres in the robot base frame: the table top is z = 0, the robot belongs at the origin."""

from __future__ import annotations

import math

import cv2
import numpy as np

from tabletop import textures
from tabletop.raycast import BOX, CYLINDER, ROOM, Solid

TAG_EDGE = 0.06
TAG_DICTIONARY = "DICT_4X4_50"
_CARD = 0.08
_CARD_THICKNESS = 0.0004
# id: x, y, yaw [deg] of the cards that lie on the table, around the space where the robot works.
_FLAT_TAGS = {
    0: (0.22, -0.45, 8.0),
    1: (0.68, -0.40, -22.0),
    2: (0.80, 0.06, 35.0),
    3: (0.66, 0.43, 170.0),
    4: (0.20, 0.42, -95.0),
    5: (-0.28, 0.14, 62.0),
}
# The upright one is glued to the front (-x) face of the cardboard box.
_BOX_TAG = 6
_BOX_CENTER, _BOX_HALF, _BOX_YAW = (0.93, -0.40, 0.10), (0.08, 0.12, 0.10), math.radians(24)


def lights() -> tuple[np.ndarray, float]:
    """Area lights float64 [L, 12] (centre, two edge vectors, colour) and the ambient level."""
    ceiling = (0.9, 0.8, 2.35, 0.7, 0, 0, 0, 0.4, 0, 2.3, 2.2, 2.0)
    window = (0.3, -2.1, 1.1, 0.6, 0, 0, 0, 0, 0.5, 3.4, 3.7, 4.2)
    return np.array([ceiling, window]), 0.26


def solids(seed: int) -> list[Solid]:
    """The whole room."""
    rng = np.random.default_rng(seed)
    return [*_room(rng), *_table(rng), *_paper_goods(rng), *_books(rng), *_containers(rng), *_tag_cards()]


def tag_corners() -> dict[int, list[list[float]]]:
    """Tag id -> four corners [4][3] in the base frame (m): top left, top right, bottom right, bottom left."""
    half = TAG_EDGE / 2
    square = np.array([(-half, half), (half, half), (half, -half), (-half, -half)])
    corners = {}
    for tag_id, (x, y, degrees) in _FLAT_TAGS.items():
        turned = square @ _turn(math.radians(degrees)).T
        corners[tag_id] = np.column_stack([turned + np.array([x, y]), np.full(4, _CARD_THICKNESS)])
    # Seen from -x, "right" is -y and "up" is z of the box.
    front = np.column_stack([np.full(4, -_BOX_HALF[0] - _CARD_THICKNESS), -square[:, 0]])
    upright = front @ _turn(_BOX_YAW).T + _BOX_CENTER[:2]
    corners[_BOX_TAG] = np.column_stack([upright, square[:, 1] + _BOX_CENTER[2]])
    return {tag_id: np.round(points, 6).tolist() for tag_id, points in corners.items()}


def _turn(yaw: float) -> np.ndarray:
    return np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])


def _box(center: tuple, half: tuple, yaw: float, *faces: np.ndarray) -> Solid:
    return Solid(BOX, center, half, yaw, faces)


def _room(rng: np.random.Generator) -> list[Solid]:
    floor = textures.tiles((1400, 1400), rng, (11, 11), (150, 142, 132))
    ceiling = textures.plaster((200, 200), rng, (232, 230, 224))
    tones = ((196, 198, 190), (176, 190, 196), (204, 190, 170), (196, 198, 190))
    walls = [textures.plaster((900, 1300), rng, tone) for tone in tones]
    room = Solid(ROOM, (0.3, 0.1, 0.85), (2.3, 2.3, 1.6), 0.0, (*walls, floor, ceiling))
    titles = ("KINETIK", "ALPEN 1954", "Robotics", "JAZZ", "Botanik", "METRO", "Atlas", "Form + Farbe")
    colors = ((52, 92, 132), (168, 74, 58), (72, 112, 76), (190, 152, 70), (96, 70, 110), (60, 110, 120))
    posters = []
    for index, title in enumerate(titles):
        picture = textures.cover((640, 460), rng, colors[index % len(colors)], title)
        along, height = (-1.0 if index % 2 else 0.75) + rng.uniform(-0.15, 0.15), rng.uniform(0.35, 0.7)
        side = index // 2
        depth = 0.004
        spot = ((-1.996, along), (2.596, along), (along + 0.3, -2.196), (along + 0.3, 2.396))[side]
        half = (depth, 0.34, 0.47) if side < 2 else (0.34, depth, 0.47)
        posters.append(_box((*spot, height), half, 0.0, picture))
    return [room, *posters, *_furniture(rng)]


def _furniture(rng: np.random.Generator) -> list[Solid]:
    board = textures.wood((300, 500), rng, 3, (120, 84, 60))
    crate = textures.card((300, 300), rng, (170, 130, 88))
    textures.print_lines(crate, rng, (40, 60, 260, 240), 26, (90, 60, 40))
    rug = textures.cover((500, 700), rng, (120, 66, 60), "o o o")
    return [
        _box((2.3, -0.9, -0.4), (0.25, 0.5, 0.35), 0.0, board),
        _box((2.15, 1.3, -0.5), (0.22, 0.25, 0.25), 0.4, crate),
        _box((0.2, 1.9, -0.45), (0.6, 0.22, 0.3), 0.0, board),
        _box((1.5, 0.4, -0.745), (0.5, 0.7, 0.004), 0.2, rug),
    ]


def _table(rng: np.random.Generator) -> list[Solid]:
    top = textures.wood((2100, 2175), rng, 10)
    edge = textures.wood((60, 1400), rng, 1, (150, 108, 72))
    leg = textures.wood((600, 60), rng, 1, (120, 84, 58))
    slab = _box((0.375, 0.0, -0.02), (0.725, 0.70, 0.02), 0.0, edge, edge, edge, edge, edge, top)
    legs = [_box((x, y, -0.395), (0.03, 0.03, 0.355), 0.0, leg) for x in (-0.29, 1.04) for y in (-0.64, 0.64)]
    return [slab, *legs]


def _paper_goods(rng: np.random.Generator) -> list[Solid]:
    white = np.full((4, 4, 3), 232, np.uint8)
    sheets = [
        _box((x, y, 0.0003), (0.0743, 0.105, 0.0003), math.radians(yaw), *[white] * 5, textures.paper((840, 594), rng))
        for x, y, yaw in ((0.46, -0.54, 12), (0.03, 0.55, -28), (0.44, 0.56, 80))
    ]
    green = np.full((4, 4, 3), (58, 104, 92), np.uint8)
    mat = _box((-0.06, -0.50, 0.001), (0.15, 0.11, 0.001), 0.15, *[green] * 5, textures.cutting_mat((440, 600), rng))
    return [*sheets, mat]


def _books(rng: np.random.Generator) -> list[Solid]:
    stack = (
        ("Mechanics", (52, 84, 124), (0.115, 0.155, 0.016), 0.30),
        ("GARDENS", (74, 112, 70), (0.10, 0.14, 0.013), -0.10),
        ("Night Train", (150, 62, 54), (0.08, 0.115, 0.011), 0.55),
    )
    books, height = [], 0.0
    for title, color, half, yaw in stack:
        front = np.ascontiguousarray(np.rot90(textures.cover((700, 520), rng, color, title)))
        spine = textures.cover((60, 700), rng, color, title + " " + title)
        edge = textures.pages((40, 600), rng)
        shape = (half[1], half[0], half[2])
        books.append(
            _box((0.90, 0.44, height + half[2]), shape, yaw + math.pi / 2, edge, edge, edge, spine, edge, front)
        )
        height += 2 * half[2]
    return books


def _containers(rng: np.random.Generator) -> list[Solid]:
    side = textures.card((400, 480), rng, (184, 142, 98))
    cv2.rectangle(side, (150, 40), (330, 130), (222, 214, 196), -1)
    textures.print_lines(side, rng, (165, 50, 320, 125), 20, (60, 50, 46))
    textures.print_lines(side, rng, (40, 300, 440, 380), 36, (110, 70, 44))
    front = textures.card((400, 480), rng, (184, 142, 98))
    top = textures.card((480, 320), rng, (190, 148, 104))
    top[:, 140:180] = (206, 186, 150)
    carton = _box(_BOX_CENTER, _BOX_HALF, _BOX_YAW, front, side, side, side, top, top)
    coffee = np.full((80, 80, 3), (226, 216, 196), np.uint8)
    cv2.circle(coffee, (40, 40), 34, (62, 38, 26), -1, cv2.LINE_AA)
    mug = Solid(CYLINDER, (0.74, 0.58, 0.048), (0.041, 0.041, 0.048), 0.7, (textures.mug_side((200, 540), rng), coffee))
    label = textures.cover((260, 540), rng, (196, 160, 66), "TEA  No 7")
    lid = np.full((40, 40, 3), (150, 150, 154), np.uint8)
    tin = Solid(CYLINDER, (0.70, -0.60, 0.055), (0.045, 0.045, 0.055), 2.2, (label, lid))
    small = textures.cover((300, 420), rng, (84, 74, 128), "BIT SET 24")
    kit = _box((0.24, 0.61, 0.03), (0.085, 0.05, 0.03), -0.2, small)
    return [carton, mug, tin, kit]


def _tag_cards() -> list[Solid]:
    dictionary = getattr(cv2.aruco, TAG_DICTIONARY)
    margin = (_CARD / TAG_EDGE - 1) / 2
    plain = np.full((4, 4, 3), 236, np.uint8)
    thin, half = _CARD_THICKNESS / 2, _CARD / 2
    cards = []
    for tag_id, (x, y, degrees) in _FLAT_TAGS.items():
        picture = textures.tag(dictionary, tag_id, 180, margin)
        cards.append(_box((x, y, thin), (half, half, thin), math.radians(degrees), *[plain] * 5, picture))
    ahead = _turn(_BOX_YAW) @ np.array([-_BOX_HALF[0] - thin, 0.0])
    spot = (_BOX_CENTER[0] + ahead[0], _BOX_CENTER[1] + ahead[1], _BOX_CENTER[2])
    picture = textures.tag(dictionary, _BOX_TAG, 180, margin)
    cards.append(_box(spot, (thin, half, half), _BOX_YAW, picture, *[plain] * 5))
    return cards
