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
from typing import TYPE_CHECKING

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from blipdiff_train.common import distributed
from blipdiff_train.common.files import sha256_tensors
from blipdiff_train.data.datamodule import Loader, start_worker
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

_LINE_SECONDS = 15.0
_READ_TOGETHER = 8
_ROUND = 64


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
        say: called with a line now and then, on the first rank.
    """

    def __init__(self, datamodule: ShardDataModule, signals: StopSignals, say: Callable[[str], None]) -> None:
        self.datamodule, self.signals, self.say = datamodule, signals, say

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        store, rank, world = self.datamodule.latents, trainer.global_rank, trainer.world_size
        datasets = self.datamodule.datasets()
        shares = [
            (dataset, shards, store.missing(shards, range(rank, len(shards), world)))
            for dataset in datasets
            for shards in dataset.shard_sets
        ]
        count = sum(len(indices) for _, _, indices in shares)
        total = sum(len(shards) for _, shards, _ in shares)
        of_ranks = f" by each of {world} processes" if world > 1 else ""
        self.say(f"latents: {count} of {total} photographs to encode{of_ranks}" if count else "latents: all are there")
        for other in store.others(shares[0][1]) if count else ():
            self.say(f"  not used, made otherwise (remove it if nothing else needs it): {other}")
        started = said = time.monotonic()
        done, encoded = 0, self._encode(module, shares)
        counts = distributed.gather_no_grad(torch.tensor([count], device=module.device))
        # in rounds, so that no rank waits long for another and all of them notice a signal to one
        for _ in range(-(-int(counts.max()) // _ROUND)):
            for _ in itertools.islice(encoded, _ROUND):
                done += 1
                if self.signals.received is not None:
                    break
            if distributed.any_rank(self.signals.received is not None, device=module.device):
                raise RunInterrupted("stopped by a signal while latents were cached; those that are finished are kept")
            if done and time.monotonic() - said > _LINE_SECONDS:
                said = time.monotonic()
                rate = done / (said - started)
                self.say(f"latents: {done}/{count}  {rate:.1f} a second  {(count - done) / rate / 60:.0f} min left")
        for _, shards, _ in shares:
            left = store.missing(shards, range(len(shards)))
            if left:
                raise FileNotFoundError(
                    f"the latents of {len(left)} of {len(shards)} samples are not there after all ranks made theirs: "
                    "the shards' folder, or data.store, must be on a file system that all machines share"
                )

    def _encode(
        self, module: LightningModule, shares: Sequence[tuple[PositionDataset, ShardSet, list[int]]]
    ) -> Iterator[None]:
        """Make and keep what is missing; yields after each photograph."""
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
                for index, target in zip(indices, itertools.chain.from_iterable(loader), strict=True):
                    if isinstance(target, SampleError):
                        store.write(shards, index, target)
                    else:
                        moments = module.denoiser.encode_moments(TARGET([target]).to(module.device))[0]  # 2C h w
                        store.write(shards, index, {LATENT_SUFFIX: npy_bytes(moments)})
                    yield
            finally:
                loader.close()


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
