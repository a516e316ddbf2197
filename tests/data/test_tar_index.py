"""The index: what a tar holds, found without trusting it. Hostile and broken tars are refused and named."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipdiff_train.data.shards import SampleError, ShardSet, write_shards
from blipdiff_train.data.tar_index import INDEX_SUFFIX, ShardError, read_index, scan_tar, write_index


def make_tar(path, members, *, format=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes) pairs or ready TarInfo objects."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_any_plain_tar_is_read_at_random(tmp_path, format):
    long = "folder/" * 20 + "long-name" if format != tarfile.USTAR_FORMAT else "folder/name"
    members = [
        ("a.jpg", b"A" * 600),
        ("a.json", b"{}"),
        (f"{long}.jpg", b"B"),
        (f"{long}.alpha.png", b""),
        ("ü.txt", b"C"),
    ]
    path = make_tar(tmp_path / "x.tar", members, format=format)
    index = scan_tar(path)
    assert [index.key(number) for number in range(len(index))] == ["a", long, "ü"]
    shards = ShardSet(str(path))
    assert shards.read(0) == {"__key__": "a", "__shard__": str(path), "jpg": b"A" * 600, "json": b"{}"}
    assert shards.read(1)["alpha.png"] == b""
    assert shards.read(2, ["jpg"]) == {"__key__": "ü", "__shard__": str(path)}
    assert shards.suffixes(1) == ["jpg", "alpha.png"]


def test_folders_hidden_files_and_webdatasets_own_metadata_are_no_samples(tmp_path):
    members = [
        special("d", tarfile.DIRTYPE),
        ("d/a.txt", b"1"),
        ("README", b""),
        (".hidden", b""),
        ("__meta__", b"{}"),
    ]
    assert len(scan_tar(make_tar(tmp_path / "x.tar", members))) == 1


REFUSED = {
    "symbolic link": [special("a.jpg", tarfile.SYMTYPE, "/etc/passwd")],
    "hard link": [special("a.jpg", tarfile.LNKTYPE, "../../secret")],
    "character device": [special("a.jpg", tarfile.CHRTYPE)],
    "block device": [special("a.jpg", tarfile.BLKTYPE)],
    "FIFO": [special("a.jpg", tarfile.FIFOTYPE)],
    "points outside": [("../../home/a.jpg", b"x")],
    "outside the archive": [("/etc/a.jpg", b"x")],
    "is a pickle": [("a.pyd", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")],
    "could run code": [("a.meta.pickle", b"x")],
    "interleaved key 'a'": [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.json", b"{}")],
    "duplicate key 'a'": [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.jpg", b"y")],
    "there twice": [("a.jpg", b"x"), ("a.jpg", b"y")],
}


@pytest.mark.parametrize("message", REFUSED)
def test_hostile_and_disordered_members_are_refused_and_named(tmp_path, message):
    path = make_tar(tmp_path / "bad.tar", REFUSED[message])
    with pytest.raises(ShardError, match=rf"bad\.tar.*{message}"):
        scan_tar(path)
    with pytest.raises(ShardError, match=r"1 of 1 shards cannot be used"):
        ShardSet(str(path))


def test_a_cut_tar_is_found_wherever_it_was_cut(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", [(f"{n}.jpg", os.urandom(700)) for n in range(4)]).read_bytes()
    end = len(whole) - len(whole.rstrip(b"\0")) and max(
        i for i in range(0, len(whole), 512) if whole[i : i + 512].strip(b"\0")
    )
    for length in (0, 100, 512, 800, 1536, end, end + 300, end + 512):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        with pytest.raises(ShardError, match="cut off"):
            scan_tar(path)


def test_sizes_that_lie_ask_for_no_memory(tmp_path):
    for lie in (10**6, 8**11 - 1, 2**62, 2**70):
        path = make_tar(tmp_path / "lie.tar", [("a.jpg", b"x"), ("b.jpg", b"x")])
        data = bytearray(path.read_bytes())
        info = tarfile.TarInfo("a.jpg")
        info.size = lie
        data[:512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(ShardError, match=r"claims|no readable size"):
            scan_tar(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


def test_a_negative_size_and_a_huge_extended_header_are_refused(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136] = b"\xff" * 12
    for data, message in ((header, "no readable size"), (_header("x", b"x", 2**40), "extended header")):
        if data is header:
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
        path = tmp_path / "x.tar"
        path.write_bytes(bytes(data) + bytes(10240))
        with pytest.raises(ShardError, match=message):
            scan_tar(path)


def _header(name, kind, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)[:512]


def test_a_compressed_tar_says_so(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    path.write_bytes(path.read_bytes() + os.urandom(600))
    with pytest.raises(ShardError, match="decompress"):
        scan_tar(path)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=3000))
def test_fuzz_any_bytes_are_an_index_or_a_shard_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(data)
    for reader in (scan_tar, read_index):
        with contextlib.suppress(ShardError):  # nothing else may come out
            reader(path)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_fuzz_a_damaged_tar_gives_shard_errors_or_bounded_samples(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    members = [("a.jpg", b"x" * 700), ("a.json", b"{}"), ("b.jpg", b"y" * 20), ("ü" * 60 + ".txt", b"z")]
    raw = bytearray(make_tar(folder / "base.tar", members, format=tarfile.PAX_FORMAT).read_bytes()[:8192])
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.tar"
    path.write_bytes(raw)
    try:
        index = scan_tar(path)
        write_index(index, folder / "damaged.idx")
        again = read_index(folder / "damaged.idx")
    except ShardError:
        return
    assert len(again) == len(index)
    for number in range(len(index)):
        assert all(member.offset + member.size <= len(raw) for member in again.members(number))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_fuzz_a_damaged_index_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    tar = make_tar(folder / "base.tar", [("a.jpg", b"x" * 700), ("b.jpg", b"y")])
    write_index(scan_tar(tar), folder / "fuzz.idx")
    raw = bytearray((folder / "fuzz.idx").read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255))
    unchanged = raw[position] == value
    raw[position] = value
    (folder / "fuzz.idx").write_bytes(raw)
    try:
        index = read_index(folder / "fuzz.idx")
    except ShardError:
        assert not unchanged
        return
    assert all(member.offset + member.size <= index.tar_bytes for n in range(len(index)) for member in index.members(n))


def test_a_replaced_or_damaged_index_is_made_again(tmp_path):
    (path,) = write_shards([{"__key__": str(n), "txt": f"text {n}"} for n in range(3)], tmp_path)
    index_path = tmp_path / (path.name + INDEX_SUFFIX)
    for damage in (b"", b"{}", b"\x00" * 50, index_path.read_bytes()[:-3]):
        index_path.write_bytes(damage)
        assert ShardSet(str(path)).read(2)["txt"] == b"text 2"
        assert len(read_index(index_path)) == 3
    other = make_tar(tmp_path / "other.tar", [("z.txt", b"other")])
    os.replace(other, path)
    assert ShardSet(str(path)).read(0)["txt"] == b"other"


def test_decay_after_writing_is_noticed(tmp_path):
    (path,) = write_shards([{"__key__": str(n), "txt": f"text {n}" * 20_000} for n in range(3)], tmp_path)
    shards = ShardSet(str(path))
    data = bytearray(path.read_bytes())
    data[data.index(b"text 1") + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleError, match=r"1\.txt changed since it was written") as error:
        shards.read(1)
    assert error.value.cause == "checksum"
    assert shards.read(2)["txt"].startswith(b"text 2")


def test_a_read_only_folder_is_no_obstacle(tmp_path, monkeypatch):
    path = make_tar(tmp_path / "x.tar", [("a.txt", b"1")])

    def refuse(index, target):
        if str(target).startswith(str(path)):
            raise PermissionError(str(target))
        return write_index(index, target)

    monkeypatch.setattr("blipdiff_train.data.shards.write_index", refuse)
    assert ShardSet(str(path)).read(0)["txt"] == b"1"
    elsewhere = tmp_path / "indexes"
    assert ShardSet(str(path), index_dir=elsewhere).read(0)["txt"] == b"1"
    assert len(list(elsewhere.iterdir())) == 1
