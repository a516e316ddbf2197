"""docs/differences.md is what the modules' docstrings say, and no module that follows a reference says nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import list_differences  # noqa: E402

FOLLOWS = re.compile(r"^Sources?: .*?(LAVIS|diffusers 0\.32)", re.MULTILINE | re.DOTALL)
PARTS = ("models", "losses", "stages", "inference")


def test_the_page_is_what_the_docstrings_say() -> None:
    assert list_differences.PAGE.read_text(encoding="utf-8") == list_differences.render(), (
        "run `python scripts/list_differences.py`"
    )


def test_modules_that_follow_a_reference_list_their_differences() -> None:
    following = {
        path: docstring
        for path, docstring in list_differences.modules().items()
        if path.split("/")[1] in PARTS and FOLLOWS.search(docstring)
    }
    named = {f"models/{name}.py" for name in ("qformer", "subject_encoder", "text_encoder", "denoiser")}
    named |= {f"losses/{name}.py" for name in ("captioning", "contrastive", "diffusion", "matching")}
    assert {f"blipdiff_train/{name}" for name in named} <= set(following)
    silent = [path for path, docstring in following.items() if list_differences.differences(docstring) is None]
    assert not silent, "say in the docstring: Deliberate differences from … (or: none)"


def test_every_mention_of_a_difference_is_collected() -> None:
    """One in the middle of a paragraph would be left out of the page in silence."""
    mention = re.compile(r"\bDifferences?\b[^.\n]*:|\bdeliberate difference", re.IGNORECASE)
    for path, docstring in list_differences.modules().items():
        collected = list_differences.differences(docstring) or ""
        assert len(mention.findall(docstring)) == len(mention.findall(collected)), path


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Title.\n\nDifference from X: one.\n\nMore.", "Difference from X: one."),
        ("Title.\n\nDifferences:\n\n* one\n* two\n\n* not one\n\nMore", "Differences:\n\n* one\n* two"),
        ("Title.\n\n* a list of something else", None),
    ],
)
def test_what_counts_as_a_list_of_differences(docstring, expected) -> None:
    assert list_differences.differences(docstring) == expected
