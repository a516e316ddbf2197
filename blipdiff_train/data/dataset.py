"""Samples by their position in the global order; a bad one is replaced by a deterministic neighbour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from blipdiff_train.data.faults import NoGoodSample, Quarantine
from blipdiff_train.data.order import Place
from blipdiff_train.data.shards import SampleError, ShardSet
from blipdiff_train.data.store import SampleStore

MAX_NEIGHBOURS = 64
"""How far a replacement is looked for."""

Sample = TypeVar("Sample")


class RecordMaker(Protocol):
    """Makes what a sample's record lacks, and keeps it; the online mode."""

    def ahead(self, wanted: Sequence[tuple[ShardSet, int]]) -> None:
        """Make the records of these samples that are not made yet, together; bad ones are no error here."""
        ...

    def record(self, shards: ShardSet, index: int) -> dict[str, bytes | str]:
        """The whole record of a sample. Raises SampleError if it cannot be made."""
        ...


class PositionDataset(Dataset, Generic[Sample]):
    """``dataset[position]`` is a sample; any process that asks for a position gets the same one.

    A sample that cannot be read or decoded is replaced by the next in the order that can; its own position keeps all
    randomness, so no other position notices.

    Args:
        order: position → place.
        shard_sets: one for each data set of the order.
        transform: (record, position) → sample, with a ``suffixes`` attribute; raises SampleError for bad samples.
        quarantine: where bad samples are listed.
        num_positions: length to report; None for an endless training order.
        maker: where records come from that are not in the shards as they are; None: all are.
        latents: members that complete each record with its latents; None: without.
    """

    def __init__(
        self,
        order: Callable[[int], Place],
        shard_sets: Sequence[ShardSet],
        transform: Callable[..., Sample],
        quarantine: Quarantine,
        *,
        num_positions: int | None = None,
        maker: RecordMaker | None = None,
        latents: SampleStore | None = None,
    ):
        self.order, self.shard_sets, self.transform, self.quarantine = order, list(shard_sets), transform, quarantine
        self.num_positions, self.maker, self.latents = num_positions, maker, latents
        self._bad: dict[tuple[int, int], tuple[str, str]] = {}  # cause and message; an error would keep its frames

    def __len__(self) -> int:
        if self.num_positions is None:
            raise TypeError("a training order has no end")
        return self.num_positions

    def __getitem__(self, position: int) -> Sample:
        first: tuple[str, str] | None = None
        for step in range(MAX_NEIGHBOURS):
            place = self.order(position + step)
            fault = self._bad.get((place.dataset, place.index))
            if fault is None:
                try:
                    sample = self._read(place, position)
                except SampleError as error:
                    fault = self._report(error, place)
                else:
                    sample.fault = first[0] if first else None
                    return sample
            first = first or fault
        where = f"; they are listed in {self.quarantine.path}" if self.quarantine.path else ""
        raise NoGoodSample(
            f"none of {MAX_NEIGHBOURS} samples from position {position} on is good{where}. The first: {first[1]}"
        )

    def __getitems__(self, positions: Sequence[int]) -> list[Sample]:
        """The samples of a micro-batch (loaders ask for it whole): what must be made for them is made together."""
        if self.maker is not None:
            places = [self.order(position) for position in positions]
            good = [place for place in places if (place.dataset, place.index) not in self._bad]
            self.maker.ahead([(self.shard_sets[place.dataset], place.index) for place in good])
        return [self[position] for position in positions]

    def record(self, shards: ShardSet, index: int) -> dict[str, bytes | str]:
        """A sample's record without latents.

        Raises:
            SampleError: it is bad.
        """
        if self.maker is not None:
            return self.maker.record(shards, index)
        return shards.read(index, self.transform.suffixes)

    def _read(self, place: Place, position: int) -> Sample:
        shards = self.shard_sets[place.dataset]
        record = self.record(shards, place.index)
        if self.latents is not None:
            record |= self.latents.need(shards, place.index)
        return self.transform(record, position)

    def _report(self, error: SampleError, place: Place) -> tuple[str, str]:
        shards = self.shard_sets[place.dataset]
        shard, _ = shards.locate(place.index)
        fault = self._bad[place.dataset, place.index] = (error.cause, str(error))
        self.quarantine.add(
            cause=error.cause, message=str(error), shard=shards.shards[shard].name, key=shards.key(place.index)
        )
        return fault
