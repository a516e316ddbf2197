"""The online mode: what `prepare` would make of a photograph, made when a training run first needs it.

It runs in the loaders, ahead of the step as far as they are: a loader reads the photographs of a micro-batch, asks for
their segmentation in one go, mattes them, and keeps each finished sample in a store beside the shards, where later
epochs, other ranks and resumed runs find it. What is stored for a photograph has the bytes that a preparation job with
the same settings writes into its shards, so a run cannot tell the two modes apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blipdiff_train.data.shards import SampleError, ShardSet, member_bytes
from blipdiff_train.data.store import SampleStore
from blipdiff_train.data.transforms import PHOTO_SUFFIXES
from blipdiff_train.prepare.models import ModelProcess, RemoteModels
from blipdiff_train.prepare.records import Record, json_object, tar_texts
from blipdiff_train.prepare.settings import Settings
from blipdiff_train.prepare.work import Unit, Worker, make_generator


@dataclass(frozen=True)
class ShardRecord(Record):
    """A photograph that has been read from a shard."""

    data: bytes = b""

    def read(self) -> bytes:
        return self.data


class OnlineContext:
    """Finished samples of shards that hold photographs and categories; a ``RecordMaker``.

    Args:
        settings: of the preparation; inputs, outputs and the search for duplicates do not apply.
        folder: of the store; None puts it beside the shards.
        models: what the settings name, if somebody has them already.

    Raises:
        ValueError: the segmenter cannot be loaded.
    """

    def __init__(self, settings: Settings, folder: str | None = None, models: RemoteModels | None = None) -> None:
        self.settings, self._models = settings, models
        self._process: ModelProcess | None = None
        if models is None and settings.has_models:
            self._process = ModelProcess(settings, settings.device)
            self._models = self._process.models()
        filters = asdict(settings.filters)
        del filters["duplicate_distance"]
        self.store = SampleStore(
            "context",
            {
                "made_by": make_generator(settings, self._models).describe(),
                "batch_size": settings.segmenter.batch_size,
                "image": asdict(settings.image),
                "filters": filters,
            },
            folder,
        )
        self._worker: Worker | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_worker": None, "_process": None}

    def ahead(self, wanted: Sequence[tuple[ShardSet, int]]) -> None:
        """See ``RecordMaker``."""
        once = {(id(shards), index): (shards, index) for shards, index in wanted}.values()
        self._make([(shards, index) for shards, index in once if not self.store.has(shards, index)])

    def record(self, shards: ShardSet, index: int) -> dict[str, bytes | str]:
        """See ``RecordMaker``.

        Raises:
            SampleError: the photograph was rejected, or is not there.
            OSError: the store cannot be written.
            RuntimeError: the segmenter's process ended.
        """
        members = self.store.read(shards, index)
        if members is None:
            (members,) = self._make([(shards, index)])
            if isinstance(members, SampleError):
                raise members
        shard, _ = shards.locate(index)
        return {"__key__": shards.key(index), "__shard__": shards.shards[shard].name, **members}

    def _make(self, wanted: Sequence[tuple[ShardSet, int]]) -> list[dict[str, bytes] | SampleError]:
        """Finished members of samples, or why there are none; kept in the store."""
        made: list[dict[str, bytes] | SampleError | None] = [None] * len(wanted)
        records: dict[int, ShardRecord] = {}
        for number, (shards, index) in enumerate(wanted):
            try:
                records[number] = read_record(shards, index)
            except SampleError as error:
                made[number] = error  # of the shard, not of what is made from it: it is not kept
        if not records:
            return made
        if self._worker is None:
            self._worker = Worker(self.settings, models=self._models)
        rejected: list[dict[str, Any]] = []
        unit = Unit(0, tuple(records), tuple(records.values()), {})
        for sample in self._worker.samples(unit, rejected, [], Counter()):
            number = int(sample.pop("__key__"))
            made[number] = {suffix: member_bytes(value) for suffix, value in sample.items()}
            self.store.write(*wanted[number], made[number])
        for entry in rejected:
            shards, index = wanted[entry["number"]]
            error = SampleError(f"rejected: {entry['cause']}", f"{shards.key(index)}: {entry['detail']}")
            made[entry["number"]] = error
            self.store.write(shards, index, error)
        return made


def read_record(shards: ShardSet, index: int) -> ShardRecord:
    """A shard's sample as a preparation job sees it.

    Raises:
        SampleError: damaged, or without a photograph.
    """
    sample = shards.read(index, (*PHOTO_SUFFIXES, "json", "txt"))
    suffix = next((suffix for suffix in PHOTO_SUFFIXES if suffix in sample), None)
    if suffix is None:
        expected = ", ".join("." + suffix for suffix in PHOTO_SUFFIXES)
        raise SampleError("missing member", f"{sample['__shard__']}: {sample['__key__']} has none of {expected}")
    caption, subject_text = tar_texts(json_object(sample.get("json", b"")), sample.get("txt"))
    tar = Path(sample["__shard__"])
    return ShardRecord(
        name=f"{tar.name}/{sample['__key__']}.{suffix}",
        file=str(tar),
        caption=caption,
        subject_text=subject_text,
        data=sample[suffix],
    )
