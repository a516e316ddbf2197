"""Templates and the caption cleaner."""

from __future__ import annotations

import pytest

from blipdiff_train.data.prompts import clean_caption, get_template, names_subject, repetitions
from blipdiff_train.models.text_encoder import AT_END


def test_release() -> None:
    template = get_template("release")
    assert template.subject_position == 2
    assert template.text("dog", "  swimming underwater ") == "a dog swimming underwater"
    assert template.text("teapot", "on a table", repetitions=2) == "a teapot on a table, a teapot on a table"
    assert template.text("dog", "") == "a dog"
    assert template.text_without_subject("dog", "in the snow") == "a dog in the snow"
    assert template.text("dog", "a dog in the snow", is_sentence=True) == "a dog in the snow"


def test_paper() -> None:
    template = get_template("paper")
    assert template.subject_position == AT_END
    assert template.text("dog", "swimming underwater") == "a dog swimming underwater, the dog is"
    assert template.text("dog", "in the snow", repetitions=20) == "a dog in the snow, the dog is"  # never repeated
    assert template.text_without_subject("dog", "in the snow") == "a dog in the snow"
    assert template.text("dog", "a photo of a dog", is_sentence=True) == "a photo of a dog, the dog is"


def test_repetitions_are_the_references() -> None:
    assert repetitions(1.0, 20) == 20
    assert repetitions(0.5, 4) == 2
    assert repetitions(0.99, 1) == 0
    with pytest.raises(ValueError, match="repeated 0 times"):
        get_template("release").text("dog", "in the snow", repetitions=0)


def test_unknown_template() -> None:
    with pytest.raises(ValueError, match="'papers' is unknown; choose one of release, paper"):
        get_template("papers")


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ('A "Dog" (big!) #1: runs~', "a dog big 1 runs"),
        ("two\n\n  lines\n", "two lines"),
        ("it's fine, really", "it's fine, really"),
        ("", ""),
        (" ".join(["word"] * 60), " ".join(["word"] * 50)),
    ],
)
def test_clean_caption(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def test_names_subject() -> None:
    assert names_subject("A photo of a Teddy  Bear.", "teddy bear")
    assert not names_subject("a catalogue on the beach", "cat")
    assert not names_subject("on the beach", "dog")
