"""Cached latents: before the first step, the VAE looks once at every photograph that it has not seen yet.

Each rank takes its share of the samples, by number, and keeps the moments in a store beside the shards. What decides
them (the VAE's weights and arithmetic, the target's size and crop, the photograph) is in the store's settings, so
moments of anything else are never read; they are made anew. One photograph at a time goes through the VAE: its moments
then depend on nothing but itself, however many ranks there are and wherever an earlier start was stopped.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from blipdiff_train.common import distributed
from blipdiff_train.common.files import sha256_tensors
from blipdiff_train.common.progress import Progress
from blipdiff_train.data.datamodule import Loader, error_number, message_of, start_worker
from blipdiff_train.data.dataset import PositionDataset
from blipdiff_train.data.pixels import TARGET
from blipdiff_train.data.shards import SampleError, ShardSet
from blipdiff_train.data.store import SampleStore
from blipdiff_train.data.transforms import LATENT_SUFFIX
from blipdiff_train.stages.callbacks import RunInterrupted, StopSignals

if TYPE_CHECKING:
    from blipdiff_train.data.datamodule import ShardDataModule
    from blipdiff_train.models.denoiser import Denoiser

CROP = "shorter side, bicubic with antialiasing, middle square, version 1"
"""How a photograph becomes a target; the version is raised when the pixels change."""

_ROUND_SECONDS = 2.0
_READ_TOGETHER = 8

Share = tuple[PositionDataset, ShardSet, list[int]]
"""Samples of one set of shards, by number."""


def latent_store(denoiser: Denoiser, *, target_size: int, photographs: str, folder: str | None) -> SampleStore:
    """The store of this VAE's moments.

    Args:
        target_size: side of the target, pixels.
        photographs: what the targets are made of: ``shards``, or the key of the store they come from.
        folder: see :class:`SampleStore`.
    """
    settings = {
        "vae": sha256_tensors(denoiser.vae.state_dict()),  # the arithmetic is in it, as the type of the weights
        "target": CROP,
        "target_px": target_size,
        "photographs": photographs,
    }
    return SampleStore("latents", settings, folder)


class LatentCache(Callback):
    """Completes the datamodule's latents before its first batch.

    Args:
        signals: asked after each photograph; a stop keeps what is finished.
        say: called with a line on what there is to do.
    """

    def __init__(self, datamodule: ShardDataModule, signals: StopSignals, say: Callable[[str], None]) -> None:
        self.datamodule, self.signals, self.say = datamodule, signals, say

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        with _together():
            absent = [
                (dataset, shards, self.datamodule.latents.missing(shards, range(len(shards))))
                for dataset in self.datamodule.datasets()
                for shards in dataset.shard_sets
            ]
            # by number and not by place among the missing: ranks may have looked at different moments
            shares = [(*of, [index for index in missing if index % world == rank]) for *of, missing in absent]
        count = sum(len(indices) for *_, indices in shares)
        total = self._over_ranks(module, count)[0]
        if total:
            of_ranks = f", shared by {world} processes" if world > 1 else ""
            in_all = sum(len(shards) for _, shards, _ in absent)
            self.say(f"latents: {total} of {in_all} photographs to encode{of_ranks}")
            for other in self.datamodule.latents.others(absent[0][1]):
                self.say(f"  not used, made otherwise (remove it if nothing else needs it): {other}")
            with Progress(total, name="latents", unit="photographs", show=trainer.is_global_zero) as progress:
                self._encode_all(module, shares, count, progress)
        else:
            self.say("latents: all are there")
        with _together():
            self._check(absent)

    def _encode_all(self, module: LightningModule, shares: Sequence[Share], count: int, progress: Progress) -> None:
        """In short rounds, so that no rank waits long for another and all notice a signal or an error of one."""
        with closing(self._encode(module, shares)) as encoded:
            while progress.done < progress.total:
                with _together():
                    round_ends = time.monotonic() + _ROUND_SECONDS
                    for _ in encoded:
                        count -= 1
                        if self.signals.received is not None or time.monotonic() > round_ends:
                            break
                left, stopped = self._over_ranks(module, count, int(self.signals.received is not None))
                progress.update(progress.total - left - progress.done)
                if stopped:
                    raise RunInterrupted(
                        "stopped by a signal while latents were cached; those that are finished are kept"
                    )

    def _encode(self, module: LightningModule, shares: Sequence[Share]) -> Iterator[None]:
        """Make and keep this rank's share; yields after each photograph that is kept."""
        store = self.datamodule.latents
        for dataset, shards, indices in shares:
            targets = Targets(dataset, shards, indices)
            loader = Loader(
                targets,
                batch_size=_READ_TOGETHER,
                collate_fn=list,
                num_workers=min(self.datamodule.num_workers, len(indices)),
                worker_init_fn=start_worker,
                generator=torch.Generator().manual_seed(0),
            )
            try:
                computed: tuple[int, Tensor | SampleError] | None = None
                for index, target in zip(indices, itertools.chain.from_iterable(loader), strict=True):
                    # a GPU works on this one while the one before is written
                    last, computed = computed, (index, self._compute(module, target))
                    if last is not None:
                        _keep(store, shards, *last)
                        yield
                if computed is not None:
                    _keep(store, shards, *computed)
                    yield
            finally:
                loader.close()

    @staticmethod
    def _compute(module: LightningModule, target: np.ndarray | SampleError) -> Tensor | SampleError:
        if isinstance(target, SampleError):
            return target
        return module.denoiser.encode_moments(TARGET([target]).to(module.device))[0]  # 2C h w

    def _check(self, absent: Sequence[Share]) -> None:
        """Raises: FileNotFoundError, if what the other ranks made is not there for this one."""
        store = self.datamodule.latents
        for _, shards, indices in absent:
            left = store.missing(shards, indices)
            # a network file system may show a folder as it was a minute ago; what is asked for by name it looks up
            lost = next((index for index in left if not store.has(shards, index)), None)
            if lost is not None:
                raise FileNotFoundError(
                    f"the latents of about {len(left)} of {len(shards)} samples are not there after all ranks made "
                    f"theirs, the first in {store.where(shards, lost)}: the shards' folder, or data.store, must be on "
                    "a file system that all machines share"
                )

    @staticmethod
    def _over_ranks(module: LightningModule, *numbers: int) -> list[int]:
        """Each number's sum over the ranks."""
        return distributed.gather_no_grad(torch.tensor([numbers], device=module.device)).sum(0).tolist()


def _together() -> AbstractContextManager[None]:
    return distributed.together(lambda error: (message_of(error), error_number(error)))


def _keep(store: SampleStore, shards: ShardSet, index: int, made: Tensor | SampleError) -> None:
    store.write(shards, index, made if isinstance(made, SampleError) else {LATENT_SUFFIX: npy_bytes(made)})


class Targets(Dataset):
    """The targets of some samples, H W 3 uint8 as the transform makes them, or the error of a bad one."""

    def __init__(self, dataset: PositionDataset, shards: ShardSet, indices: Sequence[int]) -> None:
        self.dataset, self.shards, self.indices = dataset, shards, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, numbers: Sequence[int]) -> list[np.ndarray | SampleError]:
        """Loaders ask for a batch at once; so what a record lacks is made together."""
        if self.dataset.maker is not None:
            self.dataset.maker.ahead([(self.shards, self.indices[number]) for number in numbers])
        return [self[number] for number in numbers]

    def __getitem__(self, number: int) -> np.ndarray | SampleError:
        try:
            return self.dataset.transform.target(self.dataset.record(self.shards, self.indices[number]))
        except SampleError as error:
            return SampleError(error.cause, str(error))  # without its frames


def npy_bytes(moments: Tensor) -> bytes:
    """An .npy file of (2C h w) float32."""
    stream = io.BytesIO()
    np.save(stream, moments.float().cpu().numpy(), allow_pickle=False)
    return stream.getvalue()
