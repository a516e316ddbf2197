"""Writing and finding shards: whole or absent, readable by webdataset, nothing that runs a command."""

from __future__ import annotations

import json
import os
import pickle
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_makers import annotated

from blipdiff_train.data import shards as shards_module
from blipdiff_train.data.shards import SampleError, ShardSet, expand, write_shards
from blipdiff_train.data.tar_index import ShardError


def texts(*numbers):
    return [{"__key__": f"k{number}", "txt": str(number)} for number in numbers]


def test_webdataset_reads_what_we_write_and_we_read_it_back(shards):
    import webdataset

    names = sorted(map(str, shards.glob("*.tar")))
    theirs = list(webdataset.WebDataset(names, shardshuffle=False))
    ours = ShardSet(str(shards))
    assert len(theirs) == len(ours) == 23
    for index, sample in enumerate(theirs):
        read = ours.read(index)
        assert read["__key__"] == sample["__key__"]
        assert {k: v for k, v in read.items() if k[0] != "_"} == {k: v for k, v in sample.items() if k[0] != "_"}
    assert json.loads(ours.read(7)["json"])["caption"] == "dog number 7 on the grass"


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards((annotated(number) for number in range(3)), tmp_path / name)
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()


def test_a_failing_source_leaves_only_whole_shards(tmp_path):
    def failing():
        yield from texts(0, 1, 2)
        raise RuntimeError("the disk of the source is gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_shards(failing(), tmp_path, samples_per_shard=2)
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.tar", "shard-000000.tar.idx"]
    assert len(ShardSet(str(tmp_path))) == 2


def test_existing_shards_are_kept_unless_told_otherwise(tmp_path):
    write_shards(texts(0, 1, 2), tmp_path, samples_per_shard=1)
    with pytest.raises(ValueError, match="has 3 shards"):
        write_shards(texts(9), tmp_path)
    write_shards(texts(9), tmp_path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.tar", "shard-000000.tar.idx"]
    assert ShardSet(str(tmp_path)).read(0)["txt"] == b"9"
    assert write_shards([], tmp_path, prefix="none") == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"txt": "x"}, "key None"),
        ({"__key__": "../a", "txt": "x"}, "key '../a'"),
        ({"__key__": "a.b", "txt": "x"}, "without dots"),
        ({"__key__": "__a__", "txt": "x"}, "webdataset's own"),
        ({"__key__": "a"}, "no members"),
        ({"__key__": "a", "../x": b""}, "member '../x'"),
        ({"__key__": "a", "JPG": b""}, "lower-case"),
        ({"__key__": "a", "txt": 3}, "int, expected bytes"),
        ({"__key__": "a", "json": {"x": float("nan")}}, "JSON"),
        ({"__key__": "a", "pkl": b""}, "pickle"),
    ],
)
def test_unsafe_samples_are_refused(tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        write_shards([sample], tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="comes twice"):
        write_shards(texts(1, 2, 1), tmp_path, samples_per_shard=1)


def test_what_a_user_may_write(tmp_path, monkeypatch):
    write_shards(texts(*range(12)), tmp_path, samples_per_shard=1)
    every = [str(tmp_path / f"shard-{number:06d}.tar") for number in range(12)]
    assert expand(str(tmp_path)) == every
    assert expand(f"{tmp_path}/shard-*.tar") == every
    assert expand(f"{tmp_path}/shard-{{000000..000011}}.tar") == every
    assert expand([every[3], f"file://{every[1]}"]) == [every[3], every[1]]
    assert expand("https://example.org/a-{0..2}.tar") == [f"https://example.org/a-{n}.tar" for n in range(3)]
    monkeypatch.chdir(tmp_path)
    assert expand("shard-00000[0-1].tar") == ["shard-000000.tar", "shard-000001.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:touch /tmp/pwned", "run commands"),
        ("PIPE:cat x.tar", "run commands"),
        ("python:x.tar", "not among the protocols"),
        ("ssh://host/x.tar", "not among the protocols"),
        ("simplecache::https://x/x.tar", "expected a local path|not among"),
        ("|cat x.tar", "not a path"),
        ("nowhere.tar", "no such shard"),
        ("https://x/x.tar.gz", "uncompressed"),
        ("https://x/x.tgz", "uncompressed"),
        (["https://x/x.tar", "https://x/x.tar"], "named twice"),
        ([], "no shards given"),
        ("https://x/{0..99999999}.tar", "more than"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ShardError, match=message):
        expand(pattern)


def test_an_empty_folder_and_an_empty_shard(tmp_path):
    with pytest.raises(ShardError, match=r"no \*.tar"):
        expand(str(tmp_path))
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    write_shards(texts(1), tmp_path, prefix="b")
    shards = ShardSet(str(tmp_path))
    assert shards.sizes.tolist() == [0, 1]
    assert shards.read(0)["txt"] == b"1"
    with pytest.raises(IndexError):
        shards.read(1)


def test_all_bad_shards_are_named_at_once(tmp_path):
    write_shards(texts(*range(3)), tmp_path, samples_per_shard=1)
    for number in (0, 2):
        path = tmp_path / f"shard-{number:06d}.tar"
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ShardError, match=r"2 of 3 shards.*\n.*000000.tar: cut off.*\n.*000002.tar: cut off"):
        ShardSet(str(tmp_path))


def test_large_members_are_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_MEMBER_BYTES", 1000)
    monkeypatch.setattr(shards_module, "MAX_TEXT_BYTES", 100)
    write_shards([{"__key__": "a", "jpg": b"x" * 1001, "json": b"{}" + b" " * 99, "txt": "ok"}], tmp_path)
    shards = ShardSet(str(tmp_path))
    for suffix in ("jpg", "json"):
        with pytest.raises(SampleError, match="limit") as error:
            shards.read(0, [suffix])
        assert error.value.cause == "member too large"
    assert shards.read(0, ["txt"])["txt"] == b"ok"


def test_a_json_of_a_gigabyte_costs_nothing(tmp_path):
    import tarfile

    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # sparse: only the header takes space
        info = tarfile.TarInfo("a.json")
        info.size = 2**30
        file.write(info.tobuf(tarfile.USTAR_FORMAT)[:512])
        file.truncate(512 + 2**30 + 1024)
    with pytest.raises(SampleError, match="1073741824 bytes, limit 1048576"):
        ShardSet(str(path)).read(0)


def test_a_shard_that_disappears_stops_the_run_and_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module.time, "sleep", lambda seconds: None)
    write_shards(texts(*range(4)), tmp_path, samples_per_shard=2)
    shards = ShardSet(str(tmp_path))
    assert shards.read(0)["txt"] == b"0"
    hidden = tmp_path / "elsewhere"
    for path in list(tmp_path.glob("*.tar")):
        path.rename(hidden.with_suffix(path.suffix + path.stem))
    assert shards.read(1)["txt"] == b"1"  # opened before: the file lives on
    with pytest.raises(OSError, match=r"000001.tar.*bring it back and start the same command"):
        shards.read(2)


def test_shard_sets_survive_pickling_and_forking(shards):
    opened = ShardSet(str(shards), max_open=2)
    expected = [opened.read(index) for index in range(len(opened))]
    assert [pickle.loads(pickle.dumps(opened)).read(index) for index in range(len(opened))] == expected
    with get_context("fork").Pool(2) as pool:
        assert pool.map(opened.read, range(len(opened))) == expected
    assert [opened.read(index) for index in range(len(opened))] == expected
    assert len(opened._descriptors) <= 2


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["jpg", "json", "txt", "alpha.png", "a.b.c"]), st.binary(max_size=900), min_size=1
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_whatever_is_written_is_read_back(tmp_path_factory, members, samples_per_shard):
    folder = tmp_path_factory.mktemp("round", numbered=True)
    samples = [{"__key__": f"sample {number}/é", **content} for number, content in enumerate(members)]
    write_shards(samples, folder, samples_per_shard=samples_per_shard)
    opened = ShardSet(str(folder))
    read = [opened.read(index) for index in range(len(opened))]
    assert [{k: v for k, v in sample.items() if k != "__shard__"} for sample in read] == samples
