"""An entry is read back as it was written, or not at all: never of other settings, another shard, or half of it."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import fsspec
import pytest
from shard_makers import annotated

from blipdiff_train.data.cache import ShardCache
from blipdiff_train.data.shards import SampleError, ShardSet, write_shards
from blipdiff_train.data.store import SampleStore

MEMBERS = {"alpha.png": b"\x00matte", "json": b'{"a": 1}', "empty": b""}


def only_entry(folder: Path) -> Path:
    (path,) = folder.rglob("*.entry")
    return path


def test_what_is_written_is_read_back_from_another_object(shards):
    opened = ShardSet(str(shards))
    store = SampleStore("mattes", {"threshold": 0.5})
    assert store.missing(opened, range(23)) == list(range(23))
    store.write(opened, 7, MEMBERS)
    store.write(opened, 22, SampleError("rejected: blurred", "photo0022: too blurred"))
    again, reopened = SampleStore("mattes", {"threshold": 0.5}), ShardSet(str(shards))
    assert again.read(reopened, 7) == MEMBERS
    assert again.read(reopened, 8) is None
    with pytest.raises(SampleError, match="too blurred") as error:
        again.read(reopened, 22)
    assert error.value.cause == "rejected: blurred"
    assert again.missing(reopened, range(23)) == [n for n in range(23) if n not in (7, 22)]
    assert (again.has(reopened, 7), again.has(reopened, 8)) == (True, False)
    assert len(ShardSet(str(shards))) == 23  # the store is no part of the folder of shards
    first = only_entry_bytes(shards)
    again.write(reopened, 7, MEMBERS)
    assert only_entry_bytes(shards) == first  # who writes it last does not matter


def only_entry_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.entry")}


def test_other_settings_find_nothing_and_are_told_what_is_different(shards, tmp_path):
    opened = ShardSet(str(shards))
    SampleStore("latents", {"vae": "aa", "target_px": 64}, tmp_path).write(opened, 0, MEMBERS)
    other = SampleStore("latents", {"vae": "bb", "target_px": 64}, tmp_path)
    assert other.read(opened, 0) is None
    (line,) = other.others(opened)
    assert "vae aa, now bb" in line
    assert "target_px" not in line
    assert SampleStore("mattes", {"vae": "aa", "target_px": 64}, tmp_path).others(opened) == []
    # not even when the files are put in the other's place
    source = only_entry(tmp_path).parents[1]
    source.rename(source.with_name(f"latents-{other.key}"))
    assert other.read(opened, 0) is None


def test_what_is_missing_is_seen_by_one_look_at_each_shard(shards, tmp_path, monkeypatch):
    opened, store, looks = ShardSet(str(shards)), SampleStore("mattes", {}, tmp_path), []
    assert len(opened.shards) > 1
    honest = os.scandir
    monkeypatch.setattr("os.scandir", lambda path: looks.append(path) or honest(path))
    assert store.missing(opened, range(23)) == list(range(23))  # a folder that is not there is not asked for again
    assert len(looks) == len(opened.shards)
    store.write(opened, 3, MEMBERS)
    assert len(store.missing(opened, range(23))) == 22


def test_an_entry_that_must_be_there_and_is_damaged_is_removed(shards, tmp_path):
    opened, store = ShardSet(str(shards)), SampleStore("mattes", {}, tmp_path)
    store.write(opened, 3, MEMBERS)
    assert store.need(opened, 3) == MEMBERS
    only_entry(tmp_path).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"000003\.entry is damaged and was removed: start"):
        store.need(opened, 3)
    assert store.missing(opened, [3]) == [3]
    with pytest.raises(FileNotFoundError, match="is not there any more"):
        store.need(opened, 3)


def test_a_shard_that_was_replaced_finds_nothing(tmp_path):
    write_shards([annotated(0), annotated(1)], tmp_path)
    store = SampleStore("mattes", {})
    store.write(ShardSet(str(tmp_path)), 0, MEMBERS)
    write_shards([annotated(0), annotated(1)], tmp_path, overwrite=True)
    assert store.read(ShardSet(str(tmp_path)), 0) == MEMBERS  # the same bytes: the same shard
    one = annotated(1) | {"__key__": "photo0000"}
    write_shards([one, annotated(1)], tmp_path, overwrite=True)
    assert store.read(ShardSet(str(tmp_path)), 0) is None


def test_a_damaged_entry_counts_as_none(shards, tmp_path):
    opened, store = ShardSet(str(shards)), SampleStore("mattes", {}, tmp_path)
    store.write(opened, 3, MEMBERS)
    path = only_entry(tmp_path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert store.read(opened, 3) is None
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert store.read(opened, 3) is None  # nor a verdict on the sample
    path.write_bytes(good)
    assert store.read(opened, 3) == MEMBERS


@pytest.mark.parametrize(
    "head",
    [
        "[]",
        "{}",
        "[" * 50_000,
        json.dumps({"settings": "KEY", "sample": "photo0003", "fault": None, "members": [["a", 10**15]]}),
        json.dumps({"settings": "KEY", "sample": "photo0003", "fault": None, "members": [["a", -5]]}),
        json.dumps({"settings": "KEY", "sample": "photo0003", "fault": 7, "members": []}),
        json.dumps({"settings": "KEY", "sample": "photo0003", "fault": None, "members": {"a": "b"}}),
    ],
)
def test_a_forged_head_is_none_or_empty_and_no_crash(shards, tmp_path, head):
    opened, store = ShardSet(str(shards)), SampleStore("mattes", {}, tmp_path)
    store.write(opened, 3, MEMBERS)
    content = head.replace("KEY", store.key).encode() + b"\n"
    only_entry(tmp_path).write_bytes(b"%08x" % zlib.crc32(content) + content)
    assert not store.read(opened, 3) or store.read(opened, 3) == {"a": b""}


def test_a_huge_file_is_not_read(shards, tmp_path):
    opened, store = ShardSet(str(shards)), SampleStore("mattes", {}, tmp_path)
    store.write(opened, 3, MEMBERS)
    os.truncate(only_entry(tmp_path), 2**40)  # sparse
    assert store.read(opened, 3) is None


def test_a_folder_that_cannot_be_written_is_named_with_the_key(shards, tmp_path):
    (tmp_path / "file").write_text("")
    store = SampleStore("mattes", {}, tmp_path / "file")
    with pytest.raises(OSError, match=r"file.*cannot be kept there.*data\.store="):
        store.write(ShardSet(str(shards)), 0, MEMBERS)


def test_entries_of_remote_shards_are_in_their_cache_and_those_of_two_folders_beside_each(shards, tmp_path):
    tar = next(shards.glob("*-000000.tar"))
    with fsspec.open("memory://store/shard-000000.tar", "wb") as file:
        file.write(tar.read_bytes())
    remote = ShardSet("memory://store/shard-000000.tar", cache=ShardCache(tmp_path / "cache"))
    store = SampleStore("mattes", {})
    store.write(remote, 2, MEMBERS)
    assert store.read(ShardSet("memory://store/shard-000000.tar", cache=ShardCache(tmp_path / "cache")), 2) == MEMBERS
    assert only_entry(tmp_path / "cache").parts[-4:-2] == (".made", f"mattes-{store.key}")

    for name in ("a", "b"):
        write_shards([annotated(0 if name == "a" else 1)], tmp_path / name)
    both = ShardSet([str(tmp_path / "a"), str(tmp_path / "b")])
    for index in range(2):
        store.write(both, index, {"which": b"ab"[index : index + 1]})
    assert [only_entry(tmp_path / name).read_bytes()[-1:] for name in ("a", "b")] == [b"a", b"b"]
    assert [store.read(both, index) for index in range(2)] == [{"which": b"a"}, {"which": b"b"}]
