"""What a user does next: the command that trains on the shards, and what to change where photographs were rejected."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

CAUSES = {
    "unreadable": "the file is damaged, of a format that is not read, too large (image.max_pixels), or may not be read",
    "too_few_pixels": "lower image.shortest_side_px to keep more",
    "blurred": "lower filters.blur to keep more, null keeps all",
    "duplicate": "lower filters.duplicate_distance to keep more, null keeps all",
    "no_category": "name the categories: sub-folders, a column, categories=FILE, or categories=WORDS for all",
    "too_small": "lower the first number of filters.area to keep more",
    "too_large": "raise the second number of filters.area to keep more",
    "cut_off": "raise filters.border_contact to keep more, null keeps all",
    "in_pieces": "raise filters.num_components to keep more, null keeps all",
    "too_uncertain": "raise filters.unknown_share to keep more, null keeps all",
    "disputed": "lower filters.agreement to keep more, null keeps all",
    "no_foreground": "another segmenter.name, or lower trimap.foreground_threshold or trimap.margin",
    "no_background": "another segmenter.name, or raise trimap.background_threshold or lower trimap.margin",
    "no_mask": "put NAME.alpha.png or NAME.mask.png beside the photograph, or choose another segmenter.name",
    "bad_mask": "the mask must have the photograph's width and height",
    "bad_probability": "the segmenter's answer is not finite; another segmenter.name",
    "segmenter_failed": "the segmenter could not bear this photograph; another segmenter.name",
    "matting_failed": "the numerics could not bear this photograph; matting.engine=pymatting may",
}
"""Cause of a rejection → what it means or what to change."""


def next_command(kind: str, output: str) -> str:
    """The training command for the shards in ``output``, as a shell takes it."""
    if kind == "backgrounds":
        return f"python -m blipdiff_train stage=2 data.shards=SUBJECTS {override('data.backgrounds', output)}"
    return f"python -m blipdiff_train stage=2 {override('data.shards', output)}"


def override(key: str, value: str) -> str:
    """``key=value`` quoted for Hydra's grammar and for the shell."""
    if not re.fullmatch(r"[\w./@+-]+", value):
        escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
        ending = len(escaped) - len(escaped.rstrip("\\"))
        value = f"'{escaped}{chr(92) * ending}'"
    words = f"{key}={value}"
    # easier to read than what shlex makes of single quotes
    return f'"{words}"' if "'" in words and not re.search(r'["$`\\!]', words) else shlex.quote(words)


def why_nothing(rejected: Mapping[str, int]) -> str:
    """What to change where every photograph was rejected, by the most frequent cause."""
    cause, count = max(rejected.items(), key=lambda item: item[1])
    return f"nothing is left to train on: {count} {cause}; {CAUSES[cause]}"
