"""The report must tell a model that keeps the subject from one that ignores it and from one that copies the picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from blipdiff_train.data import toybox
from blipdiff_train.evaluation.toybox_subjects import contact_sheet, evaluate_subjects, make_cases

SCENES = list(toybox.SCENES)


def scene_colour(scene: str) -> tuple[int, int, int]:
    return (SCENES.index(scene) * 25, 0, 255)


class FakePipeline:
    """Draws what a model of a given character would generate; the frame's first row encodes the scene."""

    denoiser = SimpleNamespace(default_size=64)

    def __init__(self, character: str) -> None:
        self.character = character

    def generate(self, subject_images, subject_text, prompt, *, drop_subject, seed, **_):
        pictures = []
        for image, category, words, number in zip(subject_images, subject_text, prompt, seed, strict=True):
            shown = Image.fromarray(np.asarray(image))
            scene = next(name for name, text in toybox.SCENES.items() if text == words)
            if self.character == "copies":
                picture = np.asarray(shown).copy()
                scene = self.shown_in[number]
            else:
                ignores = drop_subject or self.character == "ignores"
                identity = toybox.identities("train")[number * 37 % 900] if ignores else self.identity_of(shown)
                identity = toybox.Identity(category, identity.colour_a, identity.colour_b, identity.pattern)
                picture = toybox.render(identity, scene, pose_seed=number).image.copy()
            picture[0] = scene_colour(scene)
            pictures.append(Image.fromarray(picture))
        return pictures

    def know(self, cases) -> None:
        pairs = [(c.photograph, c.identity) for c in cases] + [(c.other_photograph, c.other) for c in cases]
        self.identities = {photograph.tobytes(): identity for photograph, identity in pairs}
        self.shown_in = [case.shown_in for case in cases]

    def identity_of(self, image: Image.Image) -> toybox.Identity:
        return self.identities[np.asarray(image).tobytes()]


class FakeScorer:
    def embed_texts(self, texts):
        scenes = [next(name for name, words in toybox.SCENES.items() if text.endswith(words)) for text in texts]
        return torch.eye(len(SCENES))[[SCENES.index(scene) for scene in scenes]]

    def embed_images(self, images):
        return torch.eye(len(SCENES))[[int(np.asarray(image)[0, 0, 0]) // 25 for image in images]]


def segment(images: list[np.ndarray], _categories: list[str]) -> list[np.ndarray]:
    # toybox subjects stand in the middle of the frame
    mask = np.zeros((64, 64))
    mask[22:42, 22:42] = 1
    return [mask] * len(images)


def report(character: str, count: int = 24):
    pipeline = FakePipeline(character)
    pipeline.know(make_cases(count))
    return evaluate_subjects(pipeline, FakeScorer(), segment, count=count)


def test_cases_are_fair() -> None:
    cases = make_cases(64)
    assert len({case.identity for case in cases}) == 64
    assert {case.identity.category for case in cases} == set(toybox.CATEGORIES)
    for case in cases:
        assert case.identity.split == case.other.split == "heldout"
        assert case.shown_in != case.asked_for
        assert case.identity.category == case.other.category
        assert not {case.identity.colour_a, case.identity.colour_b} & {case.other.colour_a, case.other.colour_b}
    assert [case.identity for case in make_cases(64)] == [case.identity for case in cases]
    assert [case.identity for case in make_cases(64, seed=1)] != [case.identity for case in cases]
    with pytest.raises(ValueError, match="held-out identities"):
        make_cases(10**6)


def test_a_model_that_keeps_the_subject_passes() -> None:
    summary = report("keeps").summary
    assert summary["own_over_dropped"]["high"] < 0.8
    assert summary["own_over_swapped"]["high"] < 0.8
    assert summary["scene_accuracy"] == 1
    assert summary["scene_copied"] == 0
    assert summary["subject_found"] == 1


def test_a_model_that_ignores_the_subject_is_caught() -> None:
    summary = report("ignores").summary
    assert summary["own_over_swapped"]["ratio"] == 1
    assert summary["own_over_dropped"]["ratio"] == 1


def test_a_model_that_copies_the_picture_is_caught() -> None:
    summary = report("copies").summary
    assert summary["scene_copied"] == 1
    assert summary["scene_accuracy"] == 0


def test_the_contact_sheet_shows_every_condition() -> None:
    result = report("keeps", count=4)
    sheet = contact_sheet(result, count=4, scale=1)
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert sheet.width > 10 * 64
    assert len(np.unique(pixels, axis=0)) > 100
