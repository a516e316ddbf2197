"""toybox: what other parts rely on — purity, exact mattes, disjoint identities, captions that match."""

from __future__ import annotations

import hashlib
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from blipdiff_train.data import toybox
from blipdiff_train.data.toybox import write


def test_a_sample_is_a_pure_function_of_its_number() -> None:
    shuffled = [7, 2, 9]
    drawn = {number: toybox.sample(number, seed=3) for number in shuffled}
    for number in sorted(shuffled):
        again = toybox.sample(number, seed=3)
        assert np.array_equal(again.image, drawn[number].image)
        assert (again.identity, again.scene, again.key) == (
            drawn[number].identity,
            drawn[number].scene,
            drawn[number].key,
        )
    assert not np.array_equal(toybox.sample(7, seed=4).image, drawn[7].image)
    assert not np.array_equal(toybox.sample(7, seed=3, split="heldout").image, drawn[7].image)


def test_words_do_not_drift_between_versions() -> None:
    digest = hashlib.sha256()
    for number in range(4):
        drawn = toybox.sample(number)
        digest.update(f"{drawn.caption} {drawn.key}".encode())
    # Not the pixels: OpenCV and NumPy may round a pixel differently on another machine.
    assert digest.hexdigest()[:16] == "d154bd9906e7b2f9"


@pytest.mark.parametrize("size", [31, 64, 128])
def test_matte_and_foreground_compose_to_the_image(size: int) -> None:
    """With the subject's own scene unknown, the equation is checked where it says something: at full coverage."""
    for number in range(6):
        drawn = toybox.sample(number, size=size)
        assert drawn.image.shape == drawn.foreground.shape == (size, size, 3)
        assert drawn.alpha.shape == (size, size)
        assert drawn.image.dtype == drawn.alpha.dtype == drawn.foreground.dtype == np.uint8
        inside = drawn.alpha == 255
        assert inside.mean() > 0.08
        assert (drawn.alpha == 0).mean() > 0.3
        assert np.array_equal(drawn.image[inside], drawn.foreground[inside])


def test_matte_is_exact_on_edges() -> None:
    """The same subject before the same scene but in other colours: (I1 - I2) = alpha · (F1 - F2) at every pixel."""
    for pose in range(5):
        first, second = (
            toybox.render(toybox.Identity("bird", *colours, "striped"), "forest", pose_seed=pose)
            for colours in (("red", "white"), ("blue", "black"))
        )
        assert np.array_equal(first.alpha, second.alpha)
        matte = first.alpha[..., None] / 255
        expected = matte * (first.foreground.astype(float) - second.foreground.astype(float))
        found = first.image.astype(float) - second.image.astype(float)
        assert np.abs(found - expected).max() <= 1.0 + 1e-6  # each image is rounded once
        assert ((first.alpha > 0) & (first.alpha < 255)).any()


def test_size_changes_resolution_only() -> None:
    small, large = toybox.sample(5, size=64), toybox.sample(5, size=256)
    assert small.caption == large.caption
    reduced = large.alpha.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.abs(reduced - small.alpha).mean() < 2.0


def test_identities_are_split_and_colour_order_does_not_leak() -> None:
    train, heldout = toybox.identities("train"), toybox.identities("heldout")
    assert not set(train) & set(heldout)
    pairs = len(toybox.COLOURS) * (len(toybox.COLOURS) - 1)
    assert len(train) + len(heldout) == len(toybox.CATEGORIES) * pairs * len(toybox.PATTERNS)
    assert 0.08 < len(heldout) / (len(train) + len(heldout)) < 0.16
    for identity in heldout:
        swapped = toybox.Identity(identity.category, identity.colour_b, identity.colour_a, identity.pattern)
        assert swapped.split == "heldout"
    assert {identity.category for identity in heldout} == set(toybox.CATEGORIES)
    for number in range(40):
        assert toybox.sample(number, split="heldout").identity.split == "heldout"
        assert toybox.sample(number).identity.split == "train"


def test_world_is_large_enough_and_its_colours_are_apart() -> None:
    assert len(toybox.CATEGORIES) >= 8
    assert len(toybox.SCENES) >= 8
    assert len(toybox.COLOURS) >= 10
    assert len(toybox.PATTERNS) >= 4
    lab = np.stack([toybox.colour_lab(name) for name in toybox.COLOURS])
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distance[~np.eye(len(lab), dtype=bool)].min() > 28


def test_srgb_to_lab_against_published_values() -> None:
    """Values of the CIE formulas for sRGB primaries (D65), e.g. in Bruce Lindbloom's calculator."""
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 255): (32.30, 79.19, -107.86)}
    for srgb, lab in known.items():
        assert toybox.srgb_to_lab(np.array(srgb)) == pytest.approx(np.array(lab), abs=0.05)


@pytest.mark.parametrize("pattern", toybox.PATTERNS)
def test_both_colours_cover_a_good_share_of_every_subject(pattern: str) -> None:
    for category in toybox.CATEGORIES:
        drawn = toybox.render(toybox.Identity(category, "red", "blue", pattern), "snow", pose_seed=1)
        colours = drawn.foreground[drawn.alpha > 200].astype(int)
        shares = [(np.abs(colours - toybox.COLOURS[name]).sum(axis=1) < 60).mean() for name in ("red", "blue")]
        assert min(shares) > 0.2, (category, shares)


def test_captions_say_what_was_drawn() -> None:
    for number in range(30):
        drawn = toybox.sample(number)
        who = drawn.identity
        assert drawn.subject == who.category
        assert drawn.prompt == toybox.scene_prompt(who.category, drawn.scene)
        for word in (who.colour_a, who.colour_b, who.pattern, who.category, toybox.SCENES[drawn.scene]):
            assert word in drawn.caption
        said = drawn.prompt.removesuffix(toybox.SCENES[drawn.scene]).split()
        assert not {*toybox.COLOURS, *toybox.PATTERNS} & set(said)
    orange = toybox.full_caption(toybox.Identity("car", "orange", "teal", "spotted"), "night")
    assert orange == "an orange and teal spotted car at night"


def test_looks_cannot_be_guessed_from_scene_or_category() -> None:
    """Colour counts given the scene stay within chance (χ² on 12 colours × 10 scenes, 99.9 % point of 99 dof)."""
    rng_names = [(s.identity.colour_a, s.scene) for s in (toybox.sample(number, size=8) for number in range(480))]
    table = np.zeros((len(toybox.COLOURS), len(toybox.SCENES)))
    for colour, scene in rng_names:
        table[list(toybox.COLOURS).index(colour), list(toybox.SCENES).index(scene)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 148.2


def test_background_is_pure_and_its_scene_can_be_chosen() -> None:
    assert np.array_equal(toybox.background(3), toybox.background(3))
    assert toybox.background(3, size=48).shape == (48, 48, 3)
    assert not np.array_equal(toybox.background(3, scene="snow"), toybox.background(3, scene="night"))


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"category='cow'.*dog"):
        toybox.Identity("cow", "red", "blue", "striped")
    with pytest.raises(ValueError, match="two different colours"):
        toybox.Identity("dog", "red", "red", "striped")
    with pytest.raises(ValueError, match="split='test'"):
        toybox.sample(0, split="test")
    with pytest.raises(ValueError, match=r"scene='moon'.*beach"):
        toybox.scene_prompt("dog", "moon")
    with pytest.raises(ValueError, match="size=4"):
        toybox.sample(0, size=4)


def test_shards_are_the_same_bytes_and_written_once(tmp_path) -> None:
    first = write.write_toybox(tmp_path / "a", "stage2", 5, split="heldout", samples_per_shard=3)
    second = write.write_toybox(tmp_path / "b", "stage2", 5, split="heldout", samples_per_shard=3)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(first) == 2
    times = [path.stat().st_mtime_ns for path in first]
    write.write_toybox(tmp_path / "a", "stage2", 5, split="heldout", samples_per_shard=3)
    assert [path.stat().st_mtime_ns for path in first] == times
    assert len(write.write_toybox(tmp_path / "a", "stage2", 2, split="heldout")) == 1
    with tarfile.open(first[0]) as tar:
        names = tar.getnames()
        metadata = json.load(tar.extractfile("heldout-000000000.json"))
        with Image.open(tar.extractfile("heldout-000000000.alpha.png")) as matte:
            assert np.array_equal(np.asarray(matte), toybox.sample(0, split="heldout").alpha)
    assert set(names[:4]) == {f"heldout-000000000.{suffix}" for suffix in ("png", "json", "alpha.png", "fg.png")}
    drawn = toybox.sample(0, split="heldout")
    assert (metadata["caption"], metadata["subject"]) == (drawn.prompt, drawn.subject)
    assert metadata["source"]["identity"]["colour_a"] == drawn.identity.colour_a


def test_photographs_as_a_user_has_them(tmp_path) -> None:
    folder = write.write_photograph_folder(tmp_path / "photographs", 4)
    drawn = toybox.sample(2)
    with Image.open(folder / drawn.subject / f"{drawn.key}.png") as picture:
        assert np.array_equal(np.asarray(picture), drawn.image)
    assert (folder / drawn.subject / f"{drawn.key}.txt").read_text().strip() == drawn.prompt


def test_a_folder_of_someone_else_is_not_touched(tmp_path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="did not write"):
        write.write_toybox(tmp_path, "stage1", 1)
    assert (tmp_path / "holiday.jpg").exists()
