"""What exists in toybox: categories, colours, patterns, scenes, and the identities made of them.

An *identity* is a subject that can be recognised again: a category with two colours in a pattern. The first
colour is the upper one of two halves or the ground under the pattern, so the order of the two is visible.
Identities are split into train and held-out by a hash; an identity and the one with its colours exchanged
fall on the same side, because the two look alike and one would give the other away.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

CATEGORIES: tuple[str, ...] = (
    "dog",
    "fish",
    "bird",
    "car",
    "house",
    "teapot",
    "boat",
    "mushroom",
    "butterfly",
    "robot",
)

# sRGB; the closest pair is about 29 apart in CIELAB (tests/data/test_toybox.py holds the floor).
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 40),
    "orange": (250, 140, 20),
    "yellow": (252, 226, 50),
    "green": (36, 160, 52),
    "teal": (0, 158, 160),
    "blue": (36, 70, 214),
    "purple": (132, 44, 168),
    "pink": (255, 140, 190),
    "brown": (118, 68, 30),
    "black": (24, 24, 28),
    "grey": (136, 138, 142),
    "white": (248, 248, 246),
}

PATTERNS: tuple[str, ...] = ("two-tone", "striped", "spotted", "checked")

SCENES: dict[str, str] = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "night": "at night",
    "desert": "in the desert",
    "meadow": "in a meadow",
    "underwater": "under water",
    "room": "in the living room",
    "mountains": "in the mountains",
    "sunset": "at sunset",
}

SPLITS: tuple[str, ...] = ("train", "heldout")

HELDOUT_SHARE = 0.12


@dataclass(frozen=True, order=True)
class Identity:
    """A subject that can be recognised again.

    Raises:
        ValueError: a name that is not in the world, or two equal colours.
    """

    category: str
    colour_a: str
    colour_b: str
    pattern: str

    def __post_init__(self) -> None:
        for value, known, field in (
            (self.category, CATEGORIES, "category"),
            (self.colour_a, COLOURS, "colour_a"),
            (self.colour_b, COLOURS, "colour_b"),
            (self.pattern, PATTERNS, "pattern"),
        ):
            if value not in known:
                raise ValueError(f"{field}={value!r} is not in toybox; known: {', '.join(known)}")
        if self.colour_a == self.colour_b:
            raise ValueError(f"an identity needs two different colours, got {self.colour_a!r} twice")

    @property
    def split(self) -> str:
        """`train` or `heldout`: a pure function of category, pattern and the unordered colour pair."""
        low, high = sorted((self.colour_a, self.colour_b))
        digest = hashlib.sha256(f"{self.category}/{low}/{high}/{self.pattern}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        return "heldout" if share < HELDOUT_SHARE else "train"


@cache
def _identities(split: str) -> tuple[Identity, ...]:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    everyone = (
        Identity(category, colour_a, colour_b, pattern)
        for category in CATEGORIES
        for colour_a, colour_b in permutations(COLOURS, 2)
        for pattern in PATTERNS
    )
    return tuple(identity for identity in everyone if identity.split == split)


def identities(split: str) -> list[Identity]:
    """All identities of a split in a fixed order.

    Raises:
        ValueError: `split` is neither `train` nor `heldout`.
    """
    return list(_identities(split))


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def scene_prompt(category: str, scene: str) -> str:
    """Category and scene only, e.g. `a dog on the beach`.

    Raises:
        ValueError: an unknown scene.
    """
    if scene not in SCENES:
        raise ValueError(f"scene={scene!r} is not in toybox; known: {', '.join(SCENES)}")
    return f"{_with_article(category)} {SCENES[scene]}"


def full_caption(identity: Identity, scene: str) -> str:
    """Everything there is to say, e.g. `a red and blue striped dog on the beach`."""
    looks = f"{identity.colour_a} and {identity.colour_b} {identity.pattern} {identity.category}"
    return scene_prompt(looks, scene)


def srgb_to_lab(srgb_u8: np.ndarray) -> np.ndarray:
    """CIELAB (D65, 2°) of sRGB values.

    Args:
        srgb_u8: (..., 3), 0 to 255, any numeric type.

    Returns:
        (..., 3) float64: L* in [0, 100], a*, b*.
    """
    encoded = np.asarray(srgb_u8, dtype=np.float64) / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    # Dividing by the row sums is dividing by the white point: white maps to a* = b* = 0 exactly.
    relative = linear @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def colour_lab(name: str) -> np.ndarray:
    """CIELAB (3,) of a named colour.

    Raises:
        ValueError: an unknown colour.
    """
    if name not in COLOURS:
        raise ValueError(f"colour={name!r} is not in toybox; known: {', '.join(COLOURS)}")
    return srgb_to_lab(np.array(COLOURS[name]))
