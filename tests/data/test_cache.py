"""Remote shards: one download, a bounded folder, any worker."""

from __future__ import annotations

import functools
import http.server
import threading
from multiprocessing import get_context
from typing import ClassVar

import fsspec
import pytest

from blipdiff_train.data import cache as cache_module
from blipdiff_train.data.cache import ShardCache
from blipdiff_train.data.shards import ShardSet, write_shards
from blipdiff_train.data.tar_index import ShardError


class Handler(http.server.SimpleHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_GET(self):
        type(self).requests.append(self.path)
        super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    write_shards(({"__key__": f"k{n}", "txt": str(n) * 3000} for n in range(12)), folder, samples_per_shard=2)
    for path in folder.glob("*.idx"):
        path.unlink()
    Handler.requests = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def downloads():
    return [path for path in Handler.requests if path.endswith(".tar")]


def read_all(shards, indices):
    return [shards.read(index)["txt"][:1] for index in indices]


def test_shards_of_an_http_server(server, tmp_path):
    pytest.importorskip("aiohttp")
    cache = ShardCache(tmp_path / "cache")
    shards = ShardSet(f"{server}/shard-{{000000..000005}}.tar", cache=cache)
    assert len(shards) == 12
    assert read_all(shards, [11, 0, 5]) == [b"1", b"0", b"5"]
    assert len(set(downloads())) == len(downloads()) == 6
    again = ShardSet(f"{server}/shard-{{000000..000005}}.tar", cache=cache)
    assert read_all(again, range(3)) == [b"0", b"1", b"2"]
    assert len(downloads()) == 6


def test_the_cache_stays_below_its_size_and_still_serves_everything(server, tmp_path):
    pytest.importorskip("aiohttp")
    size = 20_480  # of each shard
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * size + 100)
    shards = ShardSet(f"{server}/shard-{{000000..000005}}.tar", cache=cache, max_open=1)
    order = [0, 11, 3, 7, 1, 9, 5, 2, 10, 4, 8, 6]
    assert read_all(shards, order) == [str(n)[:1].encode() for n in order]
    held = list((tmp_path / "cache").glob("*.shard"))
    assert sum(path.stat().st_size for path in held) <= cache.max_bytes
    # indexes outlive eviction: opening again downloads nothing
    before = len(downloads())
    assert len(ShardSet(f"{server}/shard-{{000000..000005}}.tar", cache=cache)) == 12
    assert len(downloads()) == before


@pytest.mark.slow
def test_of_many_processes_one_downloads(server, tmp_path):
    pytest.importorskip("aiohttp")
    cache = ShardCache(tmp_path / "cache")
    with get_context("spawn").Pool(3) as pool:
        found = pool.map(functools.partial(_read_first, cache), [f"{server}/shard-000000.tar"] * 6)
    assert found == [b"0"] * 6
    assert len(downloads()) == 1


def _read_first(cache, url):
    return ShardSet(url, cache=cache).read(0)["txt"][:1]


def test_shards_in_memory_with_their_indexes(tmp_path):
    write_shards(({"__key__": f"k{n}", "txt": str(n)} for n in range(4)), tmp_path / "local", samples_per_shard=2)
    files = fsspec.filesystem("memory")
    for path in (tmp_path / "local").iterdir():
        files.pipe(f"/shards/{path.name}", path.read_bytes())
    cache = ShardCache(tmp_path / "cache")
    shards = ShardSet("memory://shards/shard-{000000..000001}.tar", cache=cache)
    assert list((tmp_path / "cache").glob("*.shard")) == []  # the counts came from the indexes
    assert read_all(shards, range(4)) == [b"0", b"1", b"2", b"3"]
    files.rm("/shards", recursive=True)
    assert read_all(shards, range(4)) == [b"0", b"1", b"2", b"3"]


def test_what_goes_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.time, "sleep", lambda seconds: None)
    with pytest.raises(ShardError, match=r"data\.cache\b"):
        ShardSet("memory://shards/missing.tar")
    cache = ShardCache(tmp_path / "cache", max_bytes=5000)
    with pytest.raises(ShardError, match=r"missing\.tar: no such shard"):
        ShardSet("memory://shards/missing.tar", cache=cache)
    fsspec.filesystem("memory").pipe("/big.tar", bytes(10_240))
    with pytest.raises(ShardError, match=r"10240 bytes, more than the cache of 5000"):
        ShardSet("memory://big.tar", cache=cache)
    attempts = []

    def broken(self, url, path):
        attempts.append(url)
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(ShardCache, "_fetch", broken)
    with pytest.raises(ShardError, match="after 4 attempts: reset by peer"):
        ShardSet("memory://other.tar", cache=cache)
    assert len(attempts) == 4
    with pytest.raises(ValueError, match="max_bytes=0"):
        ShardCache(tmp_path, 0)


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.time, "sleep", lambda seconds: None)
    fsspec.filesystem("memory").pipe("/cut.tar", bytes(10_240))
    monkeypatch.setattr(cache_module.shutil, "copyfileobj", lambda source, target, length: target.write(b"half"))
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(ShardError, match="got 4 of 10240 bytes"):
        cache.open("memory://cut.tar")
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []
