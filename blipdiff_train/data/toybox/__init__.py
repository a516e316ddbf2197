"""toybox: a drawn world with exact mattes and captions; any sample is a pure function of its number."""

from blipdiff_train.data.toybox.draw import ToySample, background, render, sample
from blipdiff_train.data.toybox.world import (
    CATEGORIES,
    COLOURS,
    PATTERNS,
    SCENES,
    SPLITS,
    Identity,
    colour_lab,
    full_caption,
    identities,
    scene_prompt,
    srgb_to_lab,
)

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "PATTERNS",
    "SCENES",
    "SPLITS",
    "Identity",
    "ToySample",
    "background",
    "colour_lab",
    "full_caption",
    "identities",
    "render",
    "sample",
    "scene_prompt",
    "srgb_to_lab",
]
