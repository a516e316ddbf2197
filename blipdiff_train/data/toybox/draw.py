"""Drawing: a subject with its exact matte, on a scene; any sample is a pure function of its number.

Geometry lives in unit coordinates (x right, y down). A subject spans about [-1, 1]; a scene [0, 1].
Everything is filled without anti-aliasing on a canvas `_SUPERSAMPLE` times larger and averaged down by area,
so the matte is the covered share of each pixel and
`image = matte · foreground + (1 - matte) · background` holds by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from blipdiff_train.data.toybox.world import (
    COLOURS,
    SCENES,
    SPLITS,
    Identity,
    _identities,
    full_caption,
    scene_prompt,
)

_SUPERSAMPLE = 4
_PAINT_SUPERSAMPLE = 2  # inside the subject: only edges between its own colours depend on it
_SHIFT = 4  # fractional bits of the coordinates handed to OpenCV

# One stream of random numbers per purpose, so that no two purposes share draws for equal numbers.
_STREAM_SAMPLE, _STREAM_RENDER, _STREAM_BACKGROUND = 1, 2, 3

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ToySample:
    """One drawing.

    Attributes:
        image: (H, W, 3) uint8, the photograph.
        alpha: (H, W) uint8, exact matte: covered share of each pixel × 255.
        foreground: (H, W, 3) uint8, the subject's colours with no background mixed in; everywhere.
        caption: everything ("a red and blue striped dog on the beach").
        prompt: category and scene only ("a dog on the beach").
        subject: the category word.
        identity: who is drawn.
        scene: name of the scene, a key of `SCENES`.
        key: name of the sample in a shard.
    """

    image: np.ndarray
    alpha: np.ndarray
    foreground: np.ndarray
    caption: str
    prompt: str
    subject: str
    identity: Identity
    scene: str
    key: str


# ---------------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True)
class _Shape:
    """Polygons (N, 2) whose union is the silhouette, and small marks (tone, polygon) inside it."""

    parts: tuple[np.ndarray, ...]
    marks: tuple[tuple[str, np.ndarray], ...] = ()


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_UNIT_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


def _ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _UNIT_CIRCLE @ np.array([[rx * c, rx * s], [-ry * s, ry * c]]) + (cx, cy)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _arc(cx: float, cy: float, r: float, width: float, start: float, end: float) -> np.ndarray:
    """A bent bar: the ring sector of mean radius r between two angles in degrees."""
    t = np.radians(np.linspace(start, end, 32))
    outer = np.stack([cx + (r + width / 2) * np.cos(t), cy + (r + width / 2) * np.sin(t)], axis=1)
    inner = np.stack([cx + (r - width / 2) * np.cos(t), cy + (r - width / 2) * np.sin(t)], axis=1)
    return np.concatenate([outer, inner[::-1]])


def _eye(cx: float, cy: float, r: float) -> tuple[tuple[str, np.ndarray], ...]:
    # White around black: one of the two shows on any colour.
    return (("light", _ellipse(cx, cy, r, r)), ("dark", _ellipse(cx, cy, 0.55 * r, 0.55 * r)))


_SHAPES: dict[str, _Shape] = {
    "dog": _Shape(
        parts=(
            _ellipse(-0.12, 0.08, 0.66, 0.34),
            _box(-0.70, 0.05, -0.46, 0.85),
            _box(-0.38, 0.20, -0.18, 0.85),
            _box(0.06, 0.20, 0.26, 0.85),
            _box(0.32, 0.05, 0.55, 0.85),
            _polygon((0.15, -0.05), (0.42, -0.55), (0.78, -0.30), (0.52, 0.25)),
            _ellipse(0.58, -0.46, 0.31, 0.28),
            _ellipse(0.86, -0.36, 0.21, 0.15),
            _ellipse(0.36, -0.36, 0.13, 0.31, 18),
            _polygon((-0.62, -0.04), (-1.02, -0.62), (-0.88, -0.70), (-0.44, -0.10)),
        ),
        marks=(*_eye(0.64, -0.52, 0.085), ("dark", _ellipse(1.01, -0.42, 0.07, 0.06))),
    ),
    "fish": _Shape(
        parts=(
            _ellipse(0.18, 0.0, 0.78, 0.46),
            _polygon((-0.42, 0.0), (-1.0, -0.52), (-0.86, 0.0), (-1.0, 0.52)),
            _polygon((-0.10, -0.36), (0.10, -0.78), (0.48, -0.34)),
            _polygon((-0.02, 0.36), (0.06, 0.70), (0.38, 0.36)),
        ),
        marks=_eye(0.62, -0.12, 0.12),
    ),
    "bird": _Shape(
        parts=(
            _ellipse(0.0, 0.10, 0.52, 0.40, -14),
            _ellipse(0.50, -0.32, 0.27, 0.26),
            _polygon((0.70, -0.42), (1.06, -0.28), (0.70, -0.18)),
            _polygon((-0.36, 0.10), (-1.06, 0.34), (-1.0, 0.58), (-0.30, 0.40)),
            _polygon((0.22, 0.04), (-0.18, -0.98), (-0.62, -0.72), (-0.34, 0.08)),
            _box(-0.10, 0.42, 0.0, 0.86),
            _box(0.12, 0.40, 0.22, 0.86),
        ),
        marks=_eye(0.56, -0.37, 0.085),
    ),
    "car": _Shape(
        parts=(
            _polygon((-1.0, 0.0), (-0.94, -0.10), (0.80, -0.08), (1.0, 0.06), (1.02, 0.44), (-1.02, 0.44)),
            _polygon((-0.68, -0.02), (-0.46, -0.56), (0.32, -0.56), (0.66, -0.02)),
            _ellipse(-0.56, 0.44, 0.25, 0.25),
            _ellipse(0.56, 0.44, 0.25, 0.25),
        ),
        marks=(
            ("glass", _polygon((-0.46, -0.12), (-0.34, -0.44), (-0.10, -0.44), (-0.10, -0.12))),
            ("glass", _polygon((0.02, -0.12), (0.02, -0.44), (0.24, -0.44), (0.44, -0.12))),
            ("dark", _ellipse(-0.56, 0.44, 0.22, 0.22)),
            ("light", _ellipse(-0.56, 0.44, 0.09, 0.09)),
            ("dark", _ellipse(0.56, 0.44, 0.22, 0.22)),
            ("light", _ellipse(0.56, 0.44, 0.09, 0.09)),
        ),
    ),
    "house": _Shape(
        parts=(
            _box(-0.66, -0.16, 0.66, 0.82),
            _polygon((-0.92, -0.12), (0.0, -0.94), (0.92, -0.12)),
            _box(0.36, -0.92, 0.58, -0.40),
        ),
        marks=(
            ("dark", _box(-0.14, 0.36, 0.16, 0.82)),
            ("glass", _box(-0.50, 0.06, -0.26, 0.32)),
            ("glass", _box(0.28, 0.06, 0.52, 0.32)),
        ),
    ),
    "teapot": _Shape(
        parts=(
            _ellipse(0.0, 0.18, 0.62, 0.52),
            _box(-0.34, 0.58, 0.34, 0.74),
            _ellipse(0.0, -0.34, 0.36, 0.14),
            _ellipse(0.0, -0.54, 0.11, 0.12),
            _polygon((0.42, 0.38), (0.86, -0.34), (1.06, -0.36), (1.02, -0.24), (0.60, 0.46)),
            _arc(-0.58, 0.10, 0.36, 0.15, 60, 300),
        ),
    ),
    "boat": _Shape(
        parts=(
            _polygon((-1.0, 0.30), (1.0, 0.30), (0.68, 0.80), (-0.70, 0.80)),
            _box(-0.09, -0.95, 0.02, 0.34),
            _polygon((0.06, -0.94), (0.86, 0.20), (0.06, 0.20)),
            _polygon((-0.14, -0.74), (-0.78, 0.20), (-0.14, 0.20)),
        ),
    ),
    "mushroom": _Shape(
        parts=(
            np.concatenate(
                [_arc(0.0, 0.0, 0.46, 0.92, 180, 360)[:32] * (1.0, 0.92), _ellipse(0, 0.02, 0.92, 0.14)[:25]]
            ),
            _polygon((-0.27, 0.0), (0.27, 0.0), (0.38, 0.84), (-0.38, 0.84)),
        ),
    ),
    "butterfly": _Shape(
        parts=(
            _ellipse(-0.50, -0.36, 0.52, 0.40, 35),
            _ellipse(0.50, -0.36, 0.52, 0.40, -35),
            _ellipse(-0.40, 0.40, 0.40, 0.34, -35),
            _ellipse(0.40, 0.40, 0.40, 0.34, 35),
            _ellipse(0.0, 0.06, 0.12, 0.66),
            _polygon((-0.04, -0.46), (-0.30, -0.96), (-0.22, -1.0), (0.05, -0.52)),
            _polygon((0.04, -0.46), (0.30, -0.96), (0.22, -1.0), (-0.05, -0.52)),
        ),
        marks=(("dark", _ellipse(0.0, 0.06, 0.09, 0.58)),),
    ),
    "robot": _Shape(
        parts=(
            _box(-0.46, -0.22, 0.46, 0.46),
            _box(-0.34, -0.74, 0.34, -0.30),
            _box(-0.12, -0.34, 0.12, -0.18),
            _box(-0.05, -0.94, 0.05, -0.70),
            _ellipse(0.0, -0.94, 0.10, 0.10),
            _box(-0.80, -0.18, -0.54, 0.34),
            _box(0.54, -0.18, 0.80, 0.34),
            _box(-0.60, -0.14, 0.60, 0.02),
            _box(-0.38, 0.40, -0.10, 0.92),
            _box(0.10, 0.40, 0.38, 0.92),
        ),
        marks=(
            *_eye(-0.15, -0.55, 0.10),
            *_eye(0.15, -0.55, 0.10),
            ("dark", _box(-0.16, -0.42, 0.16, -0.36)),
        ),
    ),
}
_MARK_TONES: dict[str, Colour] = {"dark": (20, 20, 24), "light": (250, 250, 250), "glass": (196, 224, 240)}


def _fill(canvas: np.ndarray, points_px: np.ndarray, value: int | Colour) -> None:
    fixed = np.round(points_px * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], value, lineType=cv2.LINE_8, shift=_SHIFT)


@cache
def _median_height(category: str) -> float:
    """The y that halves the silhouette's area: where `two-tone` changes colour."""
    scale = 100.0
    canvas = np.zeros((256, 256), np.uint8)
    for part in _SHAPES[category].parts:
        _fill(canvas, part * scale + 128, 255)
    return float((np.median(np.nonzero(canvas)[0]) - 127.5) / scale)


def _second_colour(x: np.ndarray, y: np.ndarray, identity: Identity) -> np.ndarray:
    """Where the second colour lies; x, y are subject coordinates (H, W); about 0.4 to 0.5 of any subject."""
    if identity.pattern == "two-tone":
        return y > _median_height(identity.category)
    if identity.pattern == "striped":
        return np.mod((x + 0.30 * y) / 0.56 + 0.20, 1.0) < 0.43
    if identity.pattern == "spotted":
        row = np.floor(y / 0.40 + 0.5)
        u = np.mod(x / 0.46 + 0.5 * np.mod(row, 2), 1.0) - 0.5
        v = y / 0.40 + 0.5 - row - 0.5
        return (u * 0.46) ** 2 + (v * 0.40) ** 2 < 0.158**2
    row = np.floor(y / 0.34 + 0.5)
    return np.mod(x / 0.68 + 0.5 * np.mod(row, 2) + 0.05, 1.0) < 0.42


def _shrink(canvas: np.ndarray, size: int) -> np.ndarray:
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)


def _draw_subject(identity: Identity, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Matte (H, W) and foreground colours (H, W, 3), both uint8, of a subject in a random pose."""
    half_width = rng.uniform(0.33, 0.41)
    angle = np.radians(rng.uniform(-12, 12))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    centre = np.array([0.5, 0.54]) + rng.uniform(-1, 1, 2) * (0.08, 0.06)
    # Subject coordinates to picture coordinates: mirror, rotate, scale, move.
    c, s = np.cos(angle), np.sin(angle)
    linear = half_width * np.array([[c * mirror, -s], [s * mirror, c]])
    shape = _SHAPES[identity.category]

    mask = np.zeros((size * _SUPERSAMPLE, size * _SUPERSAMPLE), np.uint8)
    for part in shape.parts:
        _fill(mask, (part @ linear.T + centre) * mask.shape[0], 255)

    large = size * _PAINT_SUPERSAMPLE
    inverse = np.linalg.inv(linear).astype(np.float32)
    pixel = (np.arange(large, dtype=np.float32) + 0.5) / large
    dx, dy = pixel[None, :] - np.float32(centre[0]), pixel[:, None] - np.float32(centre[1])
    x = inverse[0, 0] * dx + inverse[0, 1] * dy
    y = inverse[1, 0] * dx + inverse[1, 1] * dy
    palette = np.array([COLOURS[identity.colour_a], COLOURS[identity.colour_b]], np.uint8)
    paint = palette[_second_colour(x, y, identity).astype(np.uint8)]
    for tone, points in shape.marks:
        _fill(paint, (points @ linear.T + centre) * large, _MARK_TONES[tone])
    return _shrink(mask, size), _shrink(paint, size)


# ------------------------------------------------------------------------------------------------ scenes


class _Canvas:
    """A square picture with helpers in unit coordinates; the scenes make all random draws, in one order."""

    def __init__(self, large: int, rng: np.random.Generator) -> None:
        self.large = large
        self.rng = rng
        self.pixels = np.empty((large, large, 3), np.uint8)
        # One tint for the whole scene, so that two beaches differ but each remains of one light.
        self.tint = rng.normal(0.0, 5.0, 3)

    def tone(self, colour: Colour, jitter: float = 0.0) -> Colour:
        value = np.array(colour) + self.tint + (self.rng.normal(0.0, jitter) if jitter else 0.0)
        red, green, blue = np.clip(np.round(value), 0, 255).astype(int).tolist()
        return red, green, blue

    def sky(self, top: Colour, bottom: Colour, y0: float = 0.0, y1: float = 1.0) -> None:
        """A vertical gradient over the rows from y0 to y1."""
        first, last = round(y0 * self.large), round(y1 * self.large)
        ramp = np.linspace(0, 1, last - first)[:, None]
        rows = (1 - ramp) * np.array(self.tone(top)) + ramp * np.array(self.tone(bottom))
        self.pixels[first:last] = np.round(rows).astype(np.uint8)[:, None]

    def fill(self, points: np.ndarray, colour: Colour) -> None:
        _fill(self.pixels, points * self.large, colour)

    def disc(self, x: float, y: float, r: float, colour: Colour) -> None:
        self.fill(_ellipse(x, y, r, r), colour)

    def hill(self, base: float, height: float, colour: Colour, waves: float = 1.0) -> None:
        """Ground with a wavy horizon around `base`, down to the lower edge."""
        x = np.linspace(0, 1, 40)
        phase = self.rng.uniform(0, 2 * np.pi)
        y = base + height * np.sin(2 * np.pi * waves * x + phase)
        outline = np.stack([np.r_[x, 1.0, 0.0], np.r_[y, 1.0, 1.0]], axis=1)
        self.fill(outline, colour)


def _beach(c: _Canvas) -> None:
    horizon = c.rng.uniform(0.38, 0.48)
    shore = horizon + c.rng.uniform(0.16, 0.22)
    c.sky((150, 208, 246), (214, 238, 250), 0, horizon)
    c.disc(c.rng.uniform(0.1, 0.9), c.rng.uniform(0.08, 0.2), 0.07, (255, 244, 180))
    c.sky((40, 128, 190), (104, 196, 214), horizon, 1)
    c.hill(shore - 0.02, 0.015, c.tone((240, 250, 250)), 2)
    c.hill(shore + 0.01, 0.015, c.tone((236, 214, 160)), 2)
    for _ in range(7):
        c.disc(c.rng.uniform(0, 1), c.rng.uniform(shore + 0.1, 1), 0.012, c.tone((206, 178, 122)))


def _fir(c: _Canvas, x: float, y: float, h: float, needles: Colour, trunk: Colour) -> None:
    c.fill(_box(x - 0.06 * h, y - 0.2 * h, x + 0.06 * h, y), trunk)
    for low, high, width in ((0.1, 0.6, 0.30), (0.42, 1.0, 0.22)):
        c.fill(_polygon((x - width * h, y - low * h), (x, y - high * h), (x + width * h, y - low * h)), needles)


def _snow(c: _Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.56)
    c.sky((168, 186, 208), (214, 224, 234))
    for side in (0, 1):
        x = c.rng.uniform(0.04, 0.22)
        _fir(
            c,
            x if side == 0 else 1 - x,
            horizon + 0.06,
            c.rng.uniform(0.3, 0.42),
            (96, 128, 124),
            (92, 84, 84),
        )
    c.hill(horizon, 0.03, c.tone((236, 242, 248)))
    c.hill(horizon + 0.22, 0.03, c.tone((248, 250, 253)))
    for _ in range(26):
        c.disc(c.rng.uniform(0, 1), c.rng.uniform(0, 0.9), c.rng.uniform(0.008, 0.016), (255, 255, 255))


def _forest(c: _Canvas) -> None:
    c.sky((116, 158, 108), (66, 112, 72))
    ground = c.rng.uniform(0.66, 0.76)
    for depth, (width, colour) in enumerate(((0.035, (98, 98, 70)), (0.06, (88, 66, 44)))):
        count = 7 - 2 * depth
        for i in range(count):
            x = (i + c.rng.uniform(0.2, 0.8)) / count
            c.fill(_box(x - width / 2, 0, x + width / 2, ground + 0.06 * depth + 0.02), c.tone(colour, 6))
    for i in range(7):
        c.disc((i + c.rng.uniform(0, 1)) / 7, c.rng.uniform(-0.03, 0.09), 0.13, c.tone((44, 92, 48), 6))
    c.hill(ground, 0.015, c.tone((70, 88, 46)), 2)


def _night(c: _Canvas) -> None:
    c.sky((10, 14, 44), (36, 42, 88))
    for _ in range(24):
        c.disc(c.rng.uniform(0, 1), c.rng.uniform(0, 0.7), c.rng.uniform(0.006, 0.011), (226, 228, 250))
    x, y = c.rng.uniform(0.12, 0.88), c.rng.uniform(0.1, 0.2)
    c.disc(x, y, 0.085, (244, 240, 206))
    c.disc(x + 0.035, y - 0.02, 0.07, c.tone((16, 20, 52)))
    c.hill(c.rng.uniform(0.72, 0.82), 0.02, c.tone((22, 30, 46)))


def _desert(c: _Canvas) -> None:
    horizon = c.rng.uniform(0.44, 0.54)
    c.sky((236, 214, 168), (250, 236, 204))
    c.disc(c.rng.uniform(0.15, 0.85), c.rng.uniform(0.1, 0.2), 0.09, (255, 252, 232))
    c.hill(horizon, 0.05, c.tone((218, 158, 96)))
    x, y, h = (
        c.rng.choice([0.09, 0.91]) + c.rng.uniform(-0.03, 0.03),
        horizon + 0.16,
        c.rng.uniform(0.3, 0.36),
    )
    cactus = c.tone((88, 128, 78))
    c.fill(_box(x - 0.028, y - h, x + 0.028, y), cactus)
    for side, low in ((-1, 0.45), (1, 0.6)):
        c.fill(_box(min(x, x + side * 0.09), y - low * h, max(x, x + side * 0.09), y - low * h + 0.035), cactus)
        c.fill(
            _box(x + side * 0.09 - 0.018, y - low * h - 0.09, x + side * 0.09 + 0.018, y - low * h + 0.035),
            cactus,
        )
    c.hill(horizon + 0.2, 0.05, c.tone((204, 140, 80)))
    c.hill(horizon + 0.36, 0.04, c.tone((190, 124, 68)))


def _meadow(c: _Canvas) -> None:
    horizon = c.rng.uniform(0.42, 0.52)
    c.sky((126, 190, 242), (204, 230, 250))
    for _ in range(2):
        x, y = c.rng.uniform(0.05, 0.95), c.rng.uniform(0.06, 0.22)
        for dx, r in ((-0.06, 0.04), (0.0, 0.055), (0.06, 0.04)):
            c.disc(x + dx, y, r, (250, 252, 255))
    c.hill(horizon, 0.03, c.tone((150, 200, 98)))
    c.hill(horizon + 0.14, 0.03, c.tone((124, 184, 74)))
    for i in range(16):
        petal = ((250, 250, 240), (250, 214, 90), (238, 140, 170))[i % 3]
        c.disc(c.rng.uniform(0, 1), c.rng.uniform(horizon + 0.2, 0.98), 0.016, petal)


def _underwater(c: _Canvas) -> None:
    c.sky((96, 210, 214), (14, 92, 132))
    for _ in range(3):
        x, width = c.rng.uniform(-0.1, 1), c.rng.uniform(0.05, 0.1)
        ray = _polygon((x, 0), (x + width, 0), (x + width - 0.12, 0.45), (x - 0.2, 0.45))
        c.fill(ray, c.tone((122, 222, 222)))
    for x in (0.07, 0.18, 0.84, 0.94):
        y = np.linspace(1.0, c.rng.uniform(0.45, 0.65), 16)
        sway = x + 0.03 * np.sin(y * 18 + c.rng.uniform(0, 6))
        width = 0.03 * (1.1 - np.linspace(0, 1, 16))
        c.fill(
            np.concatenate([np.stack([sway - width, y], 1), np.stack([sway + width, y], 1)[::-1]]),
            c.tone((30, 116, 92), 6),
        )
    c.hill(c.rng.uniform(0.86, 0.92), 0.015, c.tone((150, 164, 130)), 2)
    for _ in range(10):
        c.disc(c.rng.uniform(0, 1), c.rng.uniform(0.05, 0.85), c.rng.uniform(0.01, 0.022), (206, 244, 246))


def _room(c: _Canvas) -> None:
    floor = c.rng.uniform(0.68, 0.76)
    c.sky((232, 206, 190), (232, 206, 190))
    offset = c.rng.uniform(0, 0.1)
    for i in range(11):
        x = offset + (i - 1) * 0.1
        c.fill(_box(x, 0, x + 0.045, floor), c.tone((220, 188, 172)))
    x, y = c.rng.choice([0.16, 0.84]) + c.rng.uniform(-0.03, 0.03), c.rng.uniform(0.2, 0.26)
    c.fill(_box(x - 0.14, y - 0.15, x + 0.14, y + 0.15), (250, 246, 240))
    c.fill(_box(x - 0.115, y - 0.125, x + 0.115, y + 0.125), c.tone((168, 206, 226)))
    c.fill(_box(x - 0.012, y - 0.125, x + 0.012, y + 0.125), (250, 246, 240))
    c.fill(_box(x - 0.115, y - 0.012, x + 0.115, y + 0.012), (250, 246, 240))
    c.fill(_box(0, floor, 1, 1), c.tone((164, 112, 74)))
    for i in range(4):
        y = floor + (i + 0.2) * (1 - floor) / 4
        c.fill(_box(0, y, 1, y + 0.012), c.tone((132, 86, 56)))
    c.fill(_box(0, floor - 0.03, 1, floor), (246, 238, 230))


def _mountains(c: _Canvas) -> None:
    base = c.rng.uniform(0.60, 0.68)
    c.sky((156, 186, 224), (226, 234, 242))
    peaks = sorted(
        ((c.rng.uniform(0.12, 0.34), x + c.rng.uniform(-0.06, 0.06)) for x in (0.05, 0.36, 0.66, 0.97)),
        reverse=True,
    )
    for top, x in peaks:
        h = base - top
        grey = c.tone((122, 130, 148), 7)
        c.fill(_polygon((x - 0.75 * h, base), (x, top), (x + 0.75 * h, base)), grey)
        cap = 0.3 * h
        teeth = _polygon(
            (x, top),
            (x + 0.75 * cap, top + cap),
            (x + 0.25 * cap, top + 0.75 * cap),
            (x, top + 1.1 * cap),
            (x - 0.25 * cap, top + 0.75 * cap),
            (x - 0.75 * cap, top + cap),
        )
        c.fill(teeth, (246, 248, 252))
    c.hill(base, 0.015, c.tone((120, 134, 112)), 1.5)
    c.hill(base + 0.16, 0.02, c.tone((138, 146, 120)), 1)


def _sunset(c: _Canvas) -> None:
    horizon = c.rng.uniform(0.54, 0.62)
    c.sky((96, 56, 120), (250, 150, 92), 0, horizon)
    x = c.rng.uniform(0.15, 0.85)
    c.disc(x, horizon - 0.03, 0.15, (255, 214, 120))
    c.sky((176, 86, 98), (64, 38, 78), horizon, 1)
    for i in range(5):
        y, width = horizon + 0.05 + 0.08 * i, 0.14 - 0.018 * i + c.rng.uniform(-0.02, 0.02)
        c.fill(_box(x - width, y, x + width, y + 0.018), c.tone((250, 170, 110)))


_SCENE_PAINTERS = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "night": _night,
    "desert": _desert,
    "meadow": _meadow,
    "underwater": _underwater,
    "room": _room,
    "mountains": _mountains,
    "sunset": _sunset,
}


def _draw_scene(scene: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A scene (H, W, 3) uint8 without a subject."""
    canvas = _Canvas(size * _SUPERSAMPLE, rng)
    _SCENE_PAINTERS[scene](canvas)
    picture = _shrink(canvas.pixels, size)
    # Half of the scenes are mirrored, so that no detail keeps to one side.
    return np.ascontiguousarray(picture[:, ::-1]) if rng.random() < 0.5 else picture


# --------------------------------------------------------------------------------------------- samples


def _check_size(size: int) -> None:
    if size < 8:
        raise ValueError(f"size={size} px is too small to draw a subject; use at least 8")


def _compose(identity: Identity, scene: str, rng: np.random.Generator, size: int, key: str) -> ToySample:
    _check_size(size)
    alpha, foreground = _draw_subject(identity, rng, size)
    background = _draw_scene(scene, rng, size)
    matte = alpha[:, :, None].astype(np.float32) / 255
    image = np.round(matte * foreground + (1 - matte) * background).astype(np.uint8)
    return ToySample(
        image=image,
        alpha=alpha,
        foreground=foreground,
        caption=full_caption(identity, scene),
        prompt=scene_prompt(identity.category, scene),
        subject=identity.category,
        identity=identity,
        scene=scene,
        key=key,
    )


def sample(number: int, *, split: str = "train", size: int = 64, seed: int = 0) -> ToySample:
    """The sample of that number: identity, scene and pose drawn independently of each other.

    Args:
        number: any integer ≥ 0; there is no last sample.
        split: whose identities: `train` or `heldout`.
        size: side in pixels; the drawing is the same at every size.
        seed: another seed is another world of samples with the same identities.

    Raises:
        ValueError: an unknown split, a negative number or seed, or a size below 8.
    """
    people = _identities(split)
    rng = np.random.default_rng([_STREAM_SAMPLE, seed, SPLITS.index(split), number])
    identity = people[int(rng.integers(len(people)))]
    scene = tuple(SCENES)[int(rng.integers(len(SCENES)))]
    return _compose(identity, scene, rng, size, key=f"{split}-{number:09d}")


def render(identity: Identity, scene: str, *, pose_seed: int, size: int = 64) -> ToySample:
    """A chosen identity in a chosen scene; `pose_seed` decides pose and the details of the scene.

    Raises:
        ValueError: an unknown scene, a negative seed, or a size below 8.
    """
    rng = np.random.default_rng([_STREAM_RENDER, pose_seed])
    names = (identity.category, identity.colour_a, identity.colour_b, identity.pattern, scene)
    return _compose(identity, scene, rng, size, key=f"render-{'-'.join(names)}-{pose_seed:09d}")


def background(number: int, *, size: int = 64, seed: int = 0, scene: str | None = None) -> np.ndarray:
    """A scene without a subject, (H, W, 3) uint8, a pure function of its number (and of `scene`, if chosen).

    Raises:
        ValueError: an unknown scene, a negative number or seed, or a size below 8.
    """
    _check_size(size)
    rng = np.random.default_rng([_STREAM_BACKGROUND, seed, number])
    drawn = tuple(SCENES)[int(rng.integers(len(SCENES)))]
    if scene is not None and scene not in SCENES:
        raise ValueError(f"scene={scene!r} is not in toybox; known: {', '.join(SCENES)}")
    return _draw_scene(scene or drawn, rng, size)
