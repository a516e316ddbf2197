"""A trained model in another project's format: ``python -m blipdiff_train export run=… format=… to=…``."""

from __future__ import annotations

from pathlib import Path

import torch

from blipdiff_train.checkpoints import diffusers as diffusers_layout
from blipdiff_train.checkpoints import lavis
from blipdiff_train.checkpoints.model_folder import MARKS, load_model_folder, replace_folder

FORMATS = ("diffusers", "lavis")
MODEL_SUBFOLDER = "model"  # where a run leaves its model folder


def find_model_folder(source: str | Path) -> Path:
    """The model folder that ``source`` is, or that the run directory ``source`` holds.

    Raises:
        ValueError: neither; the places looked at are named.
    """
    source = Path(source)
    for folder in (source, source / MODEL_SUBFOLDER):
        if folder.is_dir() and any((folder / mark).exists() for mark in MARKS[:3]):
            return folder
    raise ValueError(
        f"{source}: neither it nor {source / MODEL_SUBFOLDER} is a model folder (one has {', '.join(MARKS[:3])}); "
        "a run writes its model folder when training ends"
    )


def export(source: str | Path, format: str, to: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a run or model folder in another format; returns what was written.

    ``diffusers`` gives a folder for ``BlipDiffusionPipeline``. ``lavis`` gives a folder for
    ``BlipDiffusion.load_checkpoint_from_dir``, or, for a model of stage 1, one ``.pth`` for
    ``Blip2Base.load_from_pretrained``. An old export at ``to`` stays until the new one is complete.

    Args:
        source: run directory or model folder.
        format: one of :data:`FORMATS`.
        to: folder (``.pth`` file for stage 1 in LAVIS's format) to write.
        dtype: floating-point tensors are stored in this, in diffusers' format only; None keeps fp32.

    Raises:
        ValueError: an unknown format, a format that has no place for this model, a model that does not load, or a
            ``to`` that is in the way.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format == "lavis" and dtype is not None:
        raise ValueError("format=lavis stores fp32 only; leave the dtype out")
    folder, to = find_model_folder(source), Path(to)
    if to.exists() and folder.resolve() == to.resolve():
        raise ValueError(f"to={to} is the model folder itself; choose another place")
    parts = load_model_folder(folder)
    is_complete = parts.denoiser is not None
    if format == "diffusers":
        if not is_complete:
            raise ValueError(f"{folder}: is a model of stage 1, which diffusers has no pipeline for; use format=lavis")
        with replace_folder(to) as new:
            diffusers_layout.save(new, parts, dtype=dtype)
    elif is_complete:
        with replace_folder(to) as new:
            lavis.save_folder(new, parts)
    else:
        if to.suffix != ".pth":
            raise ValueError(
                f"to={to}: a model of stage 1 is one file in LAVIS's format; give a name ending in .pth"
            )
        lavis.save_stage1(to, parts)
    return to
