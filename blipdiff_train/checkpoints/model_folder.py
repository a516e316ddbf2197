"""The model folder: what training ends with, and what stage 2, generation, editing, evaluation and the page start from.

It is the diffusers layout of ``Salesforce/blipdiffusion`` with three additions that diffusers does not look at:
``qformer_tokenizer/``, ``alignment_heads/`` (stage 1's heads, temperature and prediction head) and
``blipdiff_train.json`` (metadata and the SHA-256 of every file). A folder of stage 1 has ``qformer/``,
``image_processor/`` and the additions only.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blipdiff_train.checkpoints import diffusers as diffusers_layout
from blipdiff_train.checkpoints.keys import fill_parts, part_shapes, part_tensors, to_ours, to_theirs
from blipdiff_train.checkpoints.safety import find_file, read_json, read_tensors
from blipdiff_train.checkpoints.tables import our_heads
from blipdiff_train.common.files import fsync_directory, sha256_file, write_json
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

if TYPE_CHECKING:
    from blipdiff_train.checkpoints.diffusers import StableDiffusion

METADATA_FILE = "blipdiff_train.json"
FORMAT = 1
HEADS_FOLDER = "alignment_heads"
MARKS = (METADATA_FILE, "model_index.json", "qformer", "blip_model")  # any of these: a model, which may be replaced


def save_model_folder(
    path: str | Path,
    parts: ModelParts,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``parts`` as a model folder, whole or not at all; an old one stays until the new one is complete.

    Args:
        parts: with projection, text encoder and denoiser a complete folder, without all three one of stage 1.
        metadata: plain data, put over ``parts.metadata``: recipe, steps, template, versions.
        dtype: floating-point tensors are stored in this; None keeps each module's own.

    Raises:
        ValueError: some of projection, text encoder and denoiser are there and some not, metadata that is not plain
            data, or something else than a model folder stands at ``path``.
    """
    complete = parts.denoiser is not None or parts.text_encoder is not None
    described = replace(parts, metadata={**parts.metadata, **(metadata or {})})
    with replace_folder(path) as folder:
        if complete:
            diffusers_layout.save(folder, described, dtype=dtype)
        else:
            diffusers_layout.save_subject_side(folder, described, dtype=dtype)
        if parts.alignment_heads is not None:
            modules = {"heads": parts.alignment_heads, "qformer": parts.qformer}
            rows = our_heads()
            wanted = {name for r in rows for name in r.ours}
            tensors = part_tensors(modules)
            theirs = to_theirs({name: tensor for name, tensor in tensors.items() if name in wanted}, rows)
            diffusers_layout.write_tensors(folder / HEADS_FOLDER / "model.safetensors", theirs, dtype=dtype)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        try:
            write_json(
                folder / METADATA_FILE,
                {
                    "format": FORMAT,
                    "kind": "complete" if complete else "stage1",
                    "metadata": described.metadata,
                    "sha256": {file.relative_to(folder).as_posix(): sha256_file(file) for file in files},
                },
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the metadata is not plain data ({error})") from error


def load_model_folder(
    path: str | Path, *, bert_tokenizer: str | Path | None = None, verify: bool = False
) -> ModelParts:
    """The parts of a model folder, in fp32 and on the CPU; also of ``Salesforce/blipdiffusion`` itself or a hub id.

    Args:
        bert_tokenizer: the Q-Former's vocabulary where the folder has none; None means ``bert-base-uncased``.
        verify: compare every file with its recorded SHA-256 first (seconds for a full-size model).

    Raises:
        ValueError: no model folder, a file that is missing, damaged or does not fit; it and the keys are named.
    """
    previous = _previous(Path(path))
    if previous.is_dir() and not Path(path).exists():
        raise ValueError(
            f"{path}: a save was interrupted at its last step; the model before it is at {previous}, rename it back"
        )
    description_file = find_file(path, [METADATA_FILE], required=False)
    description = {} if description_file is None else read_json(description_file)
    if description.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{description_file}: format {description['format']} is not known, expected {FORMAT}; update blipdiff_train"
        )
    if verify and description_file is not None:
        verify_model_folder(path)
    if description.get("kind") == "stage1":
        parts = diffusers_layout.load_subject_side(path, bert_tokenizer=bert_tokenizer)
    else:
        parts = diffusers_layout.load(path, bert_tokenizer=bert_tokenizer)
    parts.metadata.update(description.get("metadata", {}))
    heads_file = find_file(path, ["model.safetensors"], subfolder=HEADS_FOLDER, required=False)
    if heads_file is not None:
        parts.alignment_heads = _load_heads(heads_file, parts)
    return parts


def _load_heads(file: Path, parts: ModelParts) -> AlignmentHeads:
    """The heads of stage 1; the prediction head goes into the Q-Former."""
    tensors = read_tensors(file)
    if "vision_proj.weight" not in tensors:
        raise ValueError(f"{file}: missing keys: vision_proj.weight")
    heads = AlignmentHeads(parts.qformer.config.hidden_size, tensors["vision_proj.weight"].shape[0])
    modules = {"heads": heads, "qformer": parts.qformer}
    fill_parts(modules, to_ours(tensors, our_heads(), part_shapes(modules), file=file))
    return heads


def verify_model_folder(path: str | Path) -> None:
    """Compare every file of a local model folder with the SHA-256 recorded when it was written.

    Raises:
        ValueError: files that are missing or differ, by name.
    """
    folder = Path(path)
    recorded = read_json(folder / METADATA_FILE).get("sha256", {})
    bad = []
    for name, digest in recorded.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / METADATA_FILE}: {name!r} points outside the folder")
        if not file.is_file() or sha256_file(file) != digest:
            bad.append(name)
    if bad:
        raise ValueError(f"{folder}: damaged or changed since it was written: {', '.join(bad)}; copy the folder again")


def add_generation(parts: ModelParts, stable_diffusion: StableDiffusion) -> ModelParts:
    """Stage 1's parts completed for stage 2: a fresh projection and Stable Diffusion's text tower, VAE and UNet.

    Raises:
        ValueError: the Q-Former's width is not the text tower's.
    """
    width = stable_diffusion.text_model.config.hidden_size
    if parts.qformer.config.hidden_size != width:
        raise ValueError(
            f"the Q-Former is {parts.qformer.config.hidden_size} wide, the text encoder {width}; the projection "
            "between them is residual, so choose model.qformer.hidden_size equal to the text encoder's"
        )
    return replace(
        parts,
        projection=parts.projection or SubjectProjection(width),
        text_encoder=TextEncoder(stable_diffusion.text_model, stable_diffusion.tokenizer),
        denoiser=Denoiser(stable_diffusion.vae, stable_diffusion.unet, stable_diffusion.scheduler),
    )


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path``; on a clean exit it takes ``path``'s place, on an error it is removed.

    What stood at ``path`` stays until the new folder is complete and on the disk; between the two renames at the end it
    is at ``.<name>.previous``.

    Raises:
        ValueError: ``path`` is a file, or a folder with other things than a model in it.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.is_dir():
        if any(path.iterdir()) and not any((path / mark).exists() for mark in MARKS):
            raise ValueError(f"{path}: is a folder with other things than a model in it; choose a new name")
    elif path.exists():
        raise ValueError(f"{path}: is a file; choose another name for the folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~umask)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                fsync_directory(file)
        previous = _previous(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(temporary, path)
        fsync_directory(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
