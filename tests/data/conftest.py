"""Small shards of drawn photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_makers import annotated, picture

from blipdiff_train.data.samples import background_record
from blipdiff_train.data.shards import write_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """23 annotated samples in shards of 5: the last one holds 3."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards((annotated(number) for number in range(23)), folder, samples_per_shard=5)
    return folder


@pytest.fixture(scope="session")
def backgrounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backgrounds")
    write_shards((background_record(f"scene{n}", picture(1000 + n)) for n in range(7)), folder, samples_per_shard=4)
    return folder
