"""The loader of both stages: shards in the global order, as typed batches, from any position."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from blipdiff_train.common import distributed
from blipdiff_train.common.images import MAX_PIXELS
from blipdiff_train.data.cache import ShardCache
from blipdiff_train.data.dataset import PositionDataset, RecordMaker
from blipdiff_train.data.faults import Quarantine
from blipdiff_train.data.order import EpochOrder, MixedOrder, PositionSampler, accumulation
from blipdiff_train.data.pixels import CLIP_MEAN, CLIP_STD, Normalisation
from blipdiff_train.data.samples import collate_stage1, collate_stage2
from blipdiff_train.data.shards import SampleError, ShardSet
from blipdiff_train.data.store import SampleStore
from blipdiff_train.data.transforms import Stage1Transform, Stage2Transform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

Shards = str | Sequence[str]
Mixture = Sequence[Mapping[str, object]]


class ShardDataModule(LightningDataModule):
    """Batches of stage 1 or 2 from shards.

    The whole state is :attr:`position`, the samples consumed by finished optimizer steps. What workers have loaded
    ahead does not count, so whoever counts steps sets it: ``set_position(global_step * global_batch_size)``.

    Args:
        stage: 1 (image and caption) or 2 (subject on a background, target).
        shards: folder, glob, brace pattern, URL or a list of them; or, to mix several data sets, a list of
            ``{"shards": …, "weight": …}``.
        global_batch_size: samples of one optimizer step over all ranks and micro-batches.
        micro_batch_size: samples of one forward of one rank.
        total_steps: optimizer steps of the run; the loader ends there.
        seed: of order and of everything random in a sample.
        backgrounds: shards of plain photographs (stage 2); drawn backgrounds if None.
        val_shards: shards for validation; none if None.
        val_backgrounds: backgrounds for validation; ``backgrounds`` if None.
        val_batch_size: samples a rank takes at once in validation; ``micro_batch_size`` if None.
        val_samples: validate on the first so many samples; all if None.
        image_size: S, side of the image tower's input, pixels.
        target_size: side of stage 2's target, pixels.
        image_mean, image_std: of the image tower.
        drop_subject_prob: share of stage-2 samples whose subject is dropped.
        min_crop_scale, flip_prob: stage 1, see :class:`Stage1Transform`.
        random_target_crop, subject_scale, subject_flip_prob: stage 2, see :class:`Stage2Transform`.
        maker: stage 2 from photographs without mattes, see :class:`RecordMaker`; None: the shards are annotated.
        latents: stage 2's cached latents, which must be complete before the first batch; None: none are used.
        shuffle_window: shards inside which samples are shuffled.
        num_workers: loader processes of each rank.
        prefetch_factor: batches each of them loads ahead.
        pin_memory: for GPUs.
        max_pixels: limit of an image's width × height.
        quarantine: file in which bad samples are listed; no list if None.
        cache_dir, cache_max_bytes: where remote shards are kept, and how much of them.

    Raises:
        ValueError: settings that contradict each other. Unusable shards are reported by :meth:`setup`.
    """

    def __init__(
        self,
        *,
        stage: int,
        shards: Shards | Mixture,
        global_batch_size: int,
        micro_batch_size: int,
        total_steps: int,
        seed: int,
        backgrounds: Shards | None = None,
        val_shards: Shards | None = None,
        val_backgrounds: Shards | None = None,
        val_batch_size: int | None = None,
        val_samples: int | None = None,
        image_size: int = 224,
        target_size: int = 512,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        drop_subject_prob: float = 0.15,
        min_crop_scale: float = 0.5,
        flip_prob: float = 0.5,
        random_target_crop: bool = False,
        subject_scale: Sequence[float] = (0.5, 0.95),
        subject_flip_prob: float = 0.5,
        maker: RecordMaker | None = None,
        latents: SampleStore | None = None,
        shuffle_window: int = 64,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        max_pixels: int = MAX_PIXELS,
        quarantine: str | Path | None = None,
        cache_dir: str | Path | None = None,
        cache_max_bytes: int = 100 * 2**30,
    ):
        super().__init__()
        if stage not in (1, 2):
            raise ValueError(f"stage={stage}: expected 1 or 2")
        if not 0.0 <= drop_subject_prob <= 1.0:
            raise ValueError(f"drop_subject_prob={drop_subject_prob}: expected a probability")
        if num_workers < 0 or total_steps < 1:
            raise ValueError(f"num_workers={num_workers}, total_steps={total_steps}: expected ≥ 0 and ≥ 1")
        if num_workers:
            check_socket_folder()
        if stage == 1 and (maker is not None or latents is not None):
            raise ValueError("mattes and latents are stage 2's; stage 1 has no use for them")
        if latents is not None and random_target_crop:
            raise ValueError("random_target_crop: latents are of the middle of a photograph; use one or the other")
        self.maker, self.latents = maker, latents
        self.stage, self.seed, self.total_steps = stage, seed, total_steps
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.val_batch_size, self.val_samples = val_batch_size or micro_batch_size, val_samples
        self.num_workers, self.prefetch_factor, self.pin_memory = num_workers, prefetch_factor, pin_memory
        self.shuffle_window = shuffle_window
        self.quarantine = quarantine
        self._cache = ShardCache(cache_dir, cache_max_bytes) if cache_dir else None
        self._mixture = _as_mixture(shards)
        self._backgrounds, self._val_shards = backgrounds, val_shards
        self._val_backgrounds = val_backgrounds if val_backgrounds is not None else backgrounds
        self.normalisation = Normalisation(tuple(image_mean), tuple(image_std))
        common = {"seed": seed, "image_size": image_size, "max_pixels": max_pixels}
        if stage == 1:
            self._transform = functools.partial(
                Stage1Transform, min_crop_scale=min_crop_scale, flip_probability=flip_prob, **common
            )
        else:
            self._transform = functools.partial(
                Stage2Transform,
                target_size=target_size,
                drop_subject_probability=drop_subject_prob,
                random_target_crop=random_target_crop,
                subject_scale=tuple(subject_scale),
                flip_probability=subject_flip_prob,
                cached_latents=latents is not None,
                **common,
            )
        self.position = 0
        self._train: PositionDataset | None = None
        self._val: PositionDataset | None = None
        self._loaders: list[Loader] = []

    # ------------------------------------------------------------------------------------------------- position

    def set_position(self, position: int) -> None:
        """Samples consumed so far; :meth:`train_dataloader` starts there."""
        if position < 0:
            raise ValueError(f"position={position}: expected samples consumed, ≥ 0")
        self.position = int(position)

    def fingerprint(self) -> str:
        """Shard names, sample counts and mixing weights, hashed: what the order depends on besides the settings."""
        self.setup("fit")
        pairs = zip(self._train.shard_sets, self._mixture, strict=True)
        return "+".join(f"{shards.fingerprint()}*{weight:g}" for shards, (_, weight) in pairs)

    @property
    def num_samples(self) -> int:
        """Training samples in all data sets."""
        self.setup("fit")
        return sum(len(shards) for shards in self._train.shard_sets)

    # ---------------------------------------------------------------------------------------------------- setup

    def prepare_data(self) -> None:
        """On one process of a machine: make the missing indexes, so that the others find them."""
        self.setup("fit")

    def setup(self, stage: str | None = None) -> None:
        """Open all shards.

        Raises:
            ShardError: unusable shards, all of them named.
            ValueError: no samples.
        """
        if self._train is not None:
            return
        shard_sets = [self._open(shards) for shards, _ in self._mixture]
        orders = [
            EpochOrder(shards.sizes, seed=self.seed, window=self.shuffle_window, dataset=number)
            for number, shards in enumerate(shard_sets)
        ]
        order = orders[0] if len(orders) == 1 else MixedOrder(orders, [w for _, w in self._mixture], seed=self.seed)
        if self._val_shards is not None:
            shards = self._open(self._val_shards)
            num_samples = min(len(shards), self.val_samples or len(shards))
            self._val = self._dataset(
                EpochOrder(shards.sizes, seed=self.seed, shuffle=False), [shards], self._val_backgrounds, num_samples
            )
        self._train = self._dataset(order, shard_sets, self._backgrounds, None)

    def _open(self, shards: Shards) -> ShardSet:
        return ShardSet(shards, cache=self._cache)

    def _dataset(self, order, shard_sets, backgrounds, num_positions) -> PositionDataset:
        quarantine = Quarantine(self.quarantine)
        extra = {}
        if self.stage == 2:
            extra["backgrounds"] = self._open(backgrounds) if backgrounds is not None else None
            extra["report"] = functools.partial(_report_background, quarantine)
            if extra["backgrounds"] is not None and len(extra["backgrounds"]) == 0:
                raise ValueError(f"background shards {backgrounds} hold no photographs")
        transform = self._transform(train=num_positions is None, **extra)
        made = {"maker": self.maker, "latents": self.latents}
        return PositionDataset(order, shard_sets, transform, quarantine, num_positions=num_positions, **made)

    def datasets(self) -> list[PositionDataset]:
        """Training, and validation where there is one."""
        self.setup("fit")
        return [dataset for dataset in (self._train, self._val) if dataset is not None]

    # -------------------------------------------------------------------------------------------------- loaders

    def train_dataset(self) -> PositionDataset:
        """``dataset[position]`` for any position of the run."""
        self.setup("fit")
        return self._train

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank from :attr:`position` to the end of the run."""
        rank, world_size = self._rank_and_world_size()
        end = self.total_steps * self.global_batch_size
        left = max(0, end - self.position) // self.global_batch_size
        sampler = PositionSampler(
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_position=self.position,
            stop_position=self.position + left * self.global_batch_size,
        )
        return self._loader(self.train_dataset(), sampler)

    def val_dataloader(self) -> DataLoader | list:
        """The validation samples in their own order, the same every time; an empty list without validation shards."""
        self.setup("fit")
        if self._val is None:
            return []
        rank, world_size = self._rank_and_world_size()
        sampler = ValidationSampler(len(self._val), self.val_batch_size, rank=rank, world_size=world_size)
        return self._loader(self._val, sampler, persistent=True)

    def _loader(self, dataset: PositionDataset, sampler, *, persistent: bool = False) -> DataLoader:
        options = {}
        if self.num_workers:
            options = {"prefetch_factor": self.prefetch_factor, "persistent_workers": persistent}
            options["worker_init_fn"] = start_worker
        loader = Loader(
            dataset,
            batch_sampler=sampler,
            collate_fn=functools.partial(
                collate_stage1 if self.stage == 1 else collate_stage2, normalisation=self.normalisation
            ),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # a loader draws a seed for its workers from the global generator; nothing here uses it, so keep it apart
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        self._loaders.append(loader)
        return loader

    def close(self) -> None:
        """End all loader processes, also after an error that left them waiting."""
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        else:
            rank, world_size = distributed.rank(), distributed.world_size()
        accumulation(self.global_batch_size, self.micro_batch_size, world_size)
        return rank, world_size


class Loader(DataLoader):
    """A DataLoader whose processes can be ended.

    They do not listen to SIGTERM (:func:`start_worker`), which is how Python would end them when it exits: it would
    wait for them forever.
    """

    def __iter__(self):
        iterator = super().__iter__()
        self._running = weakref.ref(iterator)
        return iterator

    def close(self) -> None:
        iterator = self._running() if hasattr(self, "_running") else None
        if self.num_workers and iterator is not None:
            iterator._shutdown_workers()  # Lightning calls it too, but for persistent ones only


def check_socket_folder() -> None:
    """Loaders hand over batches through sockets in the folder for temporary files; where its name is too long, torch's
    would print errors and the run wait for them forever.

    Raises:
        ValueError: with what to change.
    """
    # sun_path holds 107 bytes and a zero; Python appends /pymp-xxxxxxxx/listener-xxxxxxxx
    folder, room = tempfile.gettempdir(), 107 - 32
    if len(os.fsencode(folder)) > room:
        raise ValueError(
            f"TMPDIR={folder} is too long for the loaders' sockets ({len(os.fsencode(folder))} bytes, at most {room}): "
            "set TMPDIR to a folder with a shorter name, or data.workers=0"
        )


def message_of(error: Exception) -> str:
    """What an error says; of one from a loader process what it said there, without that process's traceback."""
    text = str(error)
    if "DataLoader worker process" not in text.split("\n", 1)[0]:
        return text
    return re.split(rf"\n(?:[\w.]+\.)?{type(error).__name__}: ", text)[-1].strip()


def error_number(error: Exception) -> int | None:
    """The system's number of an error; torch keeps only the words of one from a loader process, where it stands too."""
    number = getattr(error, "errno", None)
    words = re.match(r"\[Errno (\d+)\]", message_of(error)) if number is None else None
    return int(words[1]) if words else number


class ValidationSampler:
    """Batches of one rank over 0..num_samples-1, the same number and sizes on every rank.

    The last round is divided among the ranks; where that does not go up, it is filled with the first samples again, so
    that no rank waits for another. ``positions`` in a batch tell which ones came twice.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1):
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_samples, self.batch_size * self.world_size):
            size = min(self.batch_size, -(-(self.num_samples - start) // self.world_size))
            first = start + self.rank * size
            yield [position % self.num_samples for position in range(first, first + size)]

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))


def _as_mixture(shards: Shards | Mixture) -> list[tuple[Shards, float]]:
    if isinstance(shards, str) or not any(isinstance(part, Mapping) for part in shards):
        return [(shards if isinstance(shards, str) else [str(part) for part in shards], 1.0)]
    mixture = []
    for part in shards:
        if not isinstance(part, Mapping) or set(part) != {"shards", "weight"}:
            raise ValueError(f"data set {part!r}: in a mixture each is {{'shards': …, 'weight': …}}")
        mixture.append((part["shards"], float(part["weight"])))
    return mixture


def _report_background(quarantine: Quarantine, error: SampleError, shard: str, key: str) -> None:
    quarantine.add(cause=f"background: {error.cause}", message=str(error), shard=shard, key=key)


def start_worker(number: int) -> None:
    """Schedulers send their warning to every process of a job; loaders pay no heed.

    The trainer answers it by finishing the step and saving, for which it needs them. They end with it.
    """
    for warning in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(warning, signal.SIG_IGN)
    init_worker()


def init_worker() -> None:
    """One of many processes that decode images: no threads of its own, and memory that is kept for reuse."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):  # glibc only; elsewhere it is merely slower
        libc = ctypes.CDLL(None)
        # by default every image is mapped from and returned to the system: page faults cost a tenth of the time
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
