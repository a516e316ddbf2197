"""What a stage receives: typed samples and batches, and the records they are written as.

Letters: B batch, S side of the subject image, H W target image, C h w latent.

A sample's images are bytes, as they were decoded; they become floats where the batch is put together.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blipdiff_train.data.pixels import TARGET, Normalisation


@dataclass
class Stage1Sample:
    """One photograph (S S 3 uint8) with its caption; other fields as in :class:`Stage1Batch`."""

    image: np.ndarray
    caption: str
    image_id: int
    key: str
    position: int
    fault: str | None = None


@dataclass
class Stage2Sample:
    """One subject (S S 3 uint8) with the picture to draw (H W 3 uint8); other fields as in :class:`Stage2Batch`."""

    subject_image: np.ndarray
    target_image: np.ndarray | None
    latent_moments: Tensor | None
    subject_text: str
    prompt: str
    subject_dropped: bool
    caption: str
    key: str
    position: int
    fault: str | None = None


class _Batch:
    """Moves its tensors, leaves its strings; Lightning and DataLoader find ``to`` and ``pin_memory``."""

    def to(self, device, non_blocking: bool = False):
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(Tensor.pin_memory)

    def _map(self, function):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class Stage1Batch(_Batch):
    """Photographs with captions.

    Attributes:
        image: (B, 3, S, S) float32, CLIP-normalised.
        caption: B texts.
        image_id: (B,) int64; equal numbers are the same photograph, which must not be each other's negatives.
        keys: B sample keys.
        positions: (B,) int64, positions in the global order.
        faults: causes of bad samples that were replaced in this batch, with counts.
    """

    image: Tensor
    caption: list[str]
    image_id: Tensor
    keys: list[str]
    positions: Tensor
    faults: dict[str, int] = field(default_factory=dict)


@dataclass
class Stage2Batch(_Batch):
    """Subjects on random backgrounds, and the photographs to draw.

    Attributes:
        subject_image: (B, 3, S, S) float32, CLIP-normalised; the subject on a background that is not its own.
        target_image: (B, 3, H, W) float32 in [-1, 1]; None when ``latent_moments`` stand in for it.
        latent_moments: (B, 2C, h, w) float32, mean and log-variance of the VAE; None unless cached ones are used.
        subject_text: B category words.
        prompt: B prompts without the subject's embeddings; templates are applied in the stage.
        subject_dropped: (B,) bool; True where the text alone must guide.
        caption: B captions.
        keys: B sample keys.
        positions: (B,) int64, positions in the global order.
        faults: causes of bad samples that were replaced in this batch, with counts.
    """

    subject_image: Tensor
    target_image: Tensor | None
    latent_moments: Tensor | None
    subject_text: list[str]
    prompt: list[str]
    subject_dropped: Tensor
    caption: list[str]
    keys: list[str]
    positions: Tensor
    faults: dict[str, int] = field(default_factory=dict)


def collate_stage1(samples: Sequence[Stage1Sample], normalisation: Normalisation) -> Stage1Batch:
    """Samples as a batch, images normalised for the image tower."""
    return Stage1Batch(
        image=normalisation([sample.image for sample in samples]),
        caption=[sample.caption for sample in samples],
        image_id=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        faults=_count_faults(samples),
    )


def collate_stage2(samples: Sequence[Stage2Sample], normalisation: Normalisation) -> Stage2Batch:
    """Samples as a batch, subjects normalised for the image tower; all have target images or all latent moments."""
    targets = [sample.target_image for sample in samples]
    moments = [sample.latent_moments for sample in samples]
    return Stage2Batch(
        subject_image=normalisation([sample.subject_image for sample in samples]),
        target_image=None if targets[0] is None else TARGET(targets),
        latent_moments=None if moments[0] is None else torch.stack(moments),
        subject_text=[sample.subject_text for sample in samples],
        prompt=[sample.prompt for sample in samples],
        subject_dropped=torch.tensor([sample.subject_dropped for sample in samples], dtype=torch.bool),
        caption=[sample.caption for sample in samples],
        keys=[sample.key for sample in samples],
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        faults=_count_faults(samples),
    )


def _count_faults(samples: Sequence[Stage1Sample | Stage2Sample]) -> dict[str, int]:
    return dict(Counter(sample.fault for sample in samples if sample.fault))


# ------------------------------------------------------------------------------------------------------- records


def stage1_record(
    key: str, image: np.ndarray | bytes, caption: str, *, image_id: int | str | None = None, **provenance: object
) -> dict[str, object]:
    """A stage-1 sample for :func:`~blipdiff_train.data.shards.write_shards`.

    Args:
        key: name of the sample, without dots.
        image: H W 3 uint8, or the bytes of a JPEG, PNG or WebP file, which are kept as they are.
        caption: its text.
        image_id: what samples of one photograph share, when it has several captions; the key if None.
        provenance: further entries of the JSON.
    """
    info = {"caption": caption, **({} if image_id is None else {"image_id": image_id}), **provenance}
    return {"__key__": key, **_photo(image), "json": info}


def stage2_record(
    key: str,
    image: np.ndarray | bytes,
    alpha_matte: np.ndarray | bytes,
    *,
    subject: str,
    caption: str,
    prompt: str | None = None,
    foreground: np.ndarray | bytes | None = None,
    **provenance: object,
) -> dict[str, object]:
    """A stage-2 sample for :func:`~blipdiff_train.data.shards.write_shards`.

    Args:
        key: name of the sample, without dots.
        image: H W 3 uint8 or file bytes; the target.
        alpha_matte: H W uint8 or PNG bytes; 255 is subject.
        subject: category words.
        caption: text of the photograph.
        prompt: what to draw with the subject; the caption if None.
        foreground: H W 3 uint8 or JPEG bytes, estimated colours of the subject without its old background.
        provenance: further entries of the JSON (segmenter, thresholds, versions, source).
    """
    info = {"caption": caption, "subject": subject, **({} if prompt is None else {"prompt": prompt}), **provenance}
    record = {"__key__": key, **_photo(image), "json": info, "alpha.png": _bytes(alpha_matte, "PNG")}
    if foreground is not None:
        record["fg.jpg"] = _bytes(foreground, "JPEG")
    return record


def background_record(key: str, image: np.ndarray | bytes) -> dict[str, object]:
    """A background for :func:`~blipdiff_train.data.shards.write_shards`: H W 3 uint8 or file bytes."""
    return {"__key__": key, **_photo(image)}


def _photo(image: np.ndarray | bytes) -> Mapping[str, bytes]:
    if isinstance(image, bytes):
        signatures = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpg"}
        for signature, suffix in signatures.items():
            if image.startswith(signature):
                return {suffix: image}
        raise ValueError("image bytes are neither JPEG, PNG nor WebP")
    # small drawings have hard edges, which JPEG smears; large photographs would be several times the size as PNG
    kind = "PNG" if max(image.shape[:2]) <= 128 else "JPEG"
    return {"png" if kind == "PNG" else "jpg": _bytes(image, kind)}


def _bytes(image: np.ndarray | bytes, kind: str) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"image has type {image.dtype}, expected uint8 in 0..255")
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"compress_level": 4}
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
