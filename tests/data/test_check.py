"""What `doctor` says about shards: every kind of damage is found, counted, and named with shard and key."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from shard_makers import annotated, disc, picture

from blipdiff_train.data.check import LISTED, check_shards
from blipdiff_train.data.samples import background_record, stage1_record, stage2_record
from blipdiff_train.data.shards import write_shards


def levels(findings):
    return {finding.level for finding in findings}


def text(findings):
    return "\n".join("\n  ".join([f"{f.level}: {f.text}", *f.details]) for f in findings)


def rewrite(path, change):
    """The tar's members through ``change``, as another program would write them; its index goes."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path.with_name(path.name + ".idx").unlink()


@pytest.mark.parametrize("depth", ["sample", "full"])
def test_good_shards_have_no_complaints(shards, backgrounds, depth):
    findings = check_shards(str(shards), kind="stage2", depth=depth)
    assert levels(findings) == {"ok"}, text(findings)
    assert "5 shards, readable and contiguous, 23 samples" in text(findings)
    assert "23 of 23 samples decoded, all good" in text(findings)
    assert "1 categories: dog 23" in text(findings)
    assert levels(check_shards(str(backgrounds), kind="photographs", depth=depth)) == {"ok"}


def member(suffix, data):
    """Sample 3 of the shard with other bytes for a member; none of it with None."""

    def change(members):
        for name, old in members:
            if name != f"photo0003.{suffix}":
                yield name, old
            elif data is not None:
                yield name, data(old)

    return change


def png(image):
    return stage2_record("k", image, disc(), subject="a", caption="b")["png"]


SAMPLE_DAMAGE = {
    "no photograph": (member("png", None), "lack a member", "has no .jpg or .jpeg or .png or .webp"),
    "no matte": (member("alpha.png", None), "lack a member", "has no .alpha.png"),
    "no json": (member("json", None), "lack a member", "has no .json"),
    "truncated photograph": (member("png", lambda old: old[: len(old) // 2]), "undecodable image", ".png"),
    "photograph of text": (member("png", lambda old: b"<html>404</html>"), "not an image", ".png"),
    "truncated matte": (member("alpha.png", lambda old: old[:60]), "undecodable image", ".alpha.png"),
    "half a json": (member("json", lambda old: old[:9]), "bad json", ".json"),
    "json of another kind": (member("json", lambda old: b"[1]"), "bad json", "expected an object"),
    "no category": (member("json", lambda old: b'{"caption": "a dog"}'), "missing subject", "expected a text"),
    "empty caption": (
        member("json", lambda old: b'{"caption": " ", "subject": "dog"}'),
        "missing caption",
        "expected a text",
    ),
    "caption not text beside a prompt": (
        member("json", lambda old: b'{"caption": 5, "prompt": "a dog", "subject": "dog"}'),
        "missing caption",
        "expected a text",
    ),
    "empty matte": (member("alpha.png", lambda old: png(disc() * 0)), "empty matte", "no pixel is subject"),
    "matte of another size": (member("alpha.png", lambda old: png(disc(40, 60))), "matte size", "expected equal sizes"),
}


@pytest.mark.parametrize("damage", SAMPLE_DAMAGE)
def test_damage_to_a_sample_is_named_with_shard_and_key(tmp_path, damage):
    change, cause, words = SAMPLE_DAMAGE[damage]
    shard = write_shards((annotated(number) for number in range(6)), tmp_path)[0]
    rewrite(shard, change)
    for limit, level in ((0.01, "error"), (0.5, "warning")):
        findings = check_shards(str(tmp_path), kind="stage2", max_bad_fraction=limit)
        found = [finding for finding in findings if cause in finding.text]
        assert [finding.level for finding in found] == [level], text(findings)
        assert found[0].text.startswith("1 of 6 samples")
        assert found[0].details[0].startswith(f"{shard}: photo0003")
        assert words in found[0].details[0]
        assert ("error" in levels(findings)) == (level == "error")
        assert ("16.7% bad, more than data.max_bad_fraction=0.01" in text(findings)) == (level == "error")


def test_a_flipped_bit_is_found_by_the_index_of_the_writer(tmp_path):
    shard = write_shards((annotated(number) for number in range(200)), tmp_path)[0]
    with tarfile.open(shard) as tar:
        place = tar.getmember("photo0150.alpha.png").offset_data + 40
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    findings = check_shards(str(tmp_path), kind="stage2", depth="full")
    assert f"warning: 1 of 200 samples: checksum\n  {shard}: photo0150.alpha.png changed" in text(findings)
    assert levels(findings) == {"ok", "warning"}


SHARD_DAMAGE = {
    "cut in the middle": (None, "cut off at byte"),
    "interleaved": (
        lambda members: [members[0], members[4], *members[1:4], *members[5:]],
        "interleaved key 'photo0000'",
    ),
    "duplicate": (lambda members: [*members, *members[:3]], "duplicate key 'photo0000'"),
    "pickled": (lambda members: [*members, ("photo0009.pkl", b"x")], "photo0009.pkl"),
    "outside": (lambda members: [*members, ("../photo0009.png", b"x")], "points outside the archive"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damage_to_a_shard_is_named_beside_the_others(tmp_path, damage):
    change, words = SHARD_DAMAGE[damage]
    paths = write_shards((annotated(number) for number in range(9)), tmp_path, samples_per_shard=3)
    if change is None:
        paths[1].write_bytes(paths[1].read_bytes()[: paths[1].stat().st_size // 2])
    else:
        rewrite(paths[0], change)
    paths[2].write_bytes(b"no tar at all, but of some length" * 40)
    findings = check_shards(str(tmp_path), kind="stage2")
    assert levels(findings) == {"error"}
    assert "2 of 3 shards cannot be used" in text(findings)
    assert f"{paths[1 if change is None else 0]}: " in text(findings)
    assert words in text(findings)
    assert f"{paths[2]}: no valid tar header at byte 0" in text(findings)


def test_many_bad_samples_are_counted_and_the_first_of_them_listed(tmp_path):
    samples = [annotated(number) for number in range(70)]
    for sample in samples[10:]:
        sample["png"] = b""
    write_shards(samples, tmp_path)
    finding = next(f for f in check_shards(str(tmp_path), kind="stage2", depth="full") if "not an image" in f.text)
    assert finding.text == "60 of 70 samples: not an image"
    assert len(finding.details) == LISTED + 1
    assert finding.details[-1] == "and 40 more"


def test_members_of_all_samples_are_looked_at_even_where_few_are_decoded(tmp_path):
    samples = [background_record(f"s{number:04d}", picture(1)) for number in range(500)]
    samples[321] = {"__key__": "s0321", "txt": "no picture"}
    shard = write_shards(samples, tmp_path)[0]
    findings = check_shards(str(tmp_path), kind="photographs")
    assert f"warning: 1 of 500 samples lack a member\n  {shard}: s0321 has no .jpg" in text(findings)
    assert "64 of 500 samples decoded" in text(findings)


def test_unreadable_and_empty_shards_and_repeated_keys(tmp_path):
    assert text(check_shards(str(tmp_path), kind="stage1")).startswith("error")
    a = write_shards([annotated(0)], tmp_path, prefix="a")[0]
    b = write_shards([annotated(0)], tmp_path, prefix="b")[0]
    found = text(check_shards(str(tmp_path), kind="stage1"))
    assert f"warning: 1 keys occur in several shards: copies?\n  {a}: photo0000 and {b}: photo0000" in found
    (tmp_path / "c.tar").write_bytes(b"\0" * 10240)
    assert f"warning: 1 empty shards\n  {tmp_path / 'c.tar'}" in text(check_shards(str(tmp_path), kind="stage1"))
    only_empty = check_shards(str(tmp_path / "c.tar"), kind="stage1")
    assert text(only_empty).startswith("error: 1 shards hold no samples")


def test_copies_of_a_photograph_are_named(tmp_path):
    samples = [stage1_record(f"k{number}", picture(number % 3), f"picture {number}") for number in range(4)]
    shard = write_shards(samples, tmp_path / "a")[0]
    met = {}
    found = text(check_shards(str(tmp_path / "a"), kind="stage1", met=met))
    assert "warning: 1 of 4 photographs have the same pixels as another and another image_id" in found
    assert f"{shard}: k0 and {shard}: k3" in found
    for sample in samples:
        sample["json"]["image_id"] = int(sample["__key__"][1]) % 3
    write_shards([*samples, stage1_record("new", picture(9), "new")], tmp_path / "b")
    assert levels(check_shards(str(tmp_path / "b"), kind="stage1")) == {"ok"}, "several captions of one photograph"
    found = text(check_shards(str(tmp_path / "b"), kind="stage1", met=met))
    assert "warning: 3 photographs are in other shards of this run too" in found
    assert f"{tmp_path / 'b'}/shard-000000.tar: k1 and {shard}: k1" in found


def test_one_caption_for_all_is_noticed(tmp_path):
    write_shards([stage1_record(f"k{number}", picture(number), "an image") for number in range(4)], tmp_path)
    found = text(check_shards(str(tmp_path), kind="stage1"))
    assert "warning: texts of 2 to 2 words, 1 different ones in 4: every sample says 'an image'" in found


def test_implausible_mattes_are_named(tmp_path):
    small, full, haze = np.zeros_like(disc()), np.full_like(disc(), 255), np.full_like(disc(), 140)
    small[20:23, 30:33] = 255
    mattes = {"good": disc(), "small": small, "full": full, "inverted": 255 - disc(), "haze": haze}
    samples = [
        stage2_record(key, picture(number), matte, subject="dog", caption="a dog")
        for number, (key, matte) in enumerate(mattes.items())
    ]
    shard = write_shards(samples, tmp_path)[0]
    findings = check_shards(str(tmp_path), kind="stage2")
    warnings = {f.text: f.details for f in findings if f.level == "warning" and "mattes" in f.text}
    expected = {
        "less than 1 %": "small",
        "more than 95 %": "full",
        "upside down": "inverted",
        "neither subject": "haze",
    }
    assert len(warnings) == len(expected), text(findings)
    for words, key in expected.items():
        assert [places for line, places in warnings.items() if words in line] == [(f"{shard}: {key}",)]
    assert "error" not in levels(findings)
