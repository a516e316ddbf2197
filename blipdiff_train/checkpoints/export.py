"""A model in another project's format: ``python -m blipdiff_train export run=… format=… to=…``.

What can be loaded can be exported, so this also converts LAVIS's checkpoints to diffusers' and back.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from blipdiff_train.checkpoints import diffusers as diffusers_layout
from blipdiff_train.checkpoints import lavis
from blipdiff_train.checkpoints.model_folder import replace_folder
from blipdiff_train.checkpoints.sources import find_model, load_parts

FORMATS = ("diffusers", "lavis")


def export(source: str | Path, format: str, to: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model in another format; returns what was written.

    ``diffusers`` gives a folder for ``BlipDiffusionPipeline``. ``lavis`` gives a folder for
    ``BlipDiffusion.load_checkpoint_from_dir``, or, for a model of stage 1, one ``.pth`` for
    ``Blip2Base.load_from_pretrained``. An old export at ``to`` stays until the new one is complete.

    Args:
        source: run directory, model folder, or anything else that ``checkpoints.sources.load_parts`` opens.
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
    found, to = find_model(source), Path(to)
    if to.exists() and Path(found).resolve() == to.resolve():
        raise ValueError(f"to={to} is the model itself; choose another place")
    parts = load_parts(found)
    is_complete = parts.denoiser is not None
    if format == "diffusers":
        if not is_complete:
            raise ValueError(f"{found}: is a model of stage 1, which diffusers has no pipeline for; use format=lavis")
        if parts.subject_embeds is not None:
            warnings.warn(
                f"{found}: its fine-tuned subject embeddings have no place in diffusers' layout and are left out; "
                "format=lavis keeps them"
            )
        with replace_folder(to) as new:
            diffusers_layout.save(new, parts, dtype=dtype)
    elif is_complete:
        with replace_folder(to) as new:
            lavis.save_folder(new, parts)
    else:
        if to.suffix != ".pth":
            raise ValueError(f"to={to}: a model of stage 1 is one file in LAVIS's format; give a name ending in .pth")
        lavis.save_stage1(to, parts)
    return to
