"""A model from any of the places it may come from: one name, told apart by what stands there."""

from __future__ import annotations

from pathlib import Path

from blipdiff_train.checkpoints import lavis
from blipdiff_train.checkpoints.model_folder import MARKS, load_model_folder
from blipdiff_train.checkpoints.safety import HUB_ID
from blipdiff_train.models.parts import ModelParts

MODEL_SUBFOLDER = "model"  # where a run leaves its model folder
STAGE1_SUFFIXES = (".pth", ".pt")


def find_model(source: str | Path) -> str | Path:
    """``source`` itself, or the model folder inside a run directory.

    Raises:
        ValueError: nothing there that could be a model; the places looked at are named.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in STAGE1_SUFFIXES:
        return path
    for folder in (path, path / MODEL_SUBFOLDER):
        if any((folder / mark).exists() for mark in MARKS):
            return folder
    may_be_hub_id = not path.exists() and not path.is_absolute() and path.suffix not in STAGE1_SUFFIXES
    if may_be_hub_id and HUB_ID.match(str(source)):
        return str(source)
    raise ValueError(
        f"{source}: neither it nor {path / MODEL_SUBFOLDER} is a model folder (one has {', '.join(MARKS)}), "
        f"and it is no {' or '.join(STAGE1_SUFFIXES)} file of LAVIS; a run writes its model folder when training ends"
    )


def load_parts(
    source: str | Path,
    *,
    bert_tokenizer: str | Path | None = None,
    image_encoder: str | Path = lavis.DEFAULT_TOWER,
    stable_diffusion: str | Path = lavis.DEFAULT_STABLE_DIFFUSION,
    sizes: lavis.Sizes | None = None,
) -> ModelParts:
    """The model of a run, a model folder, a BLIP-Diffusion folder of diffusers or LAVIS, or LAVIS's stage-1 file.

    Args:
        source: a path, or a hub id such as ``Salesforce/blipdiffusion``.
        bert_tokenizer: the Q-Former's vocabulary where the source has none; None means ``bert-base-uncased``.
        image_encoder, stable_diffusion, sizes: what LAVIS's formats leave out, see ``checkpoints.lavis``.

    Raises:
        ValueError: no model there, or one that is damaged or does not fit; file and keys are named.
    """
    found = find_model(source)
    if isinstance(found, Path) and found.is_file():
        return lavis.load_stage1(
            found,
            image_encoder=image_encoder,
            bert_tokenizer=bert_tokenizer or lavis.diffusers_layout.DEFAULT_BERT,
            sizes=sizes,
        )
    if isinstance(found, Path) and (found / "blip_model").is_dir():
        return lavis.load_folder(
            found,
            stable_diffusion=stable_diffusion,
            image_encoder=image_encoder,
            bert_tokenizer=bert_tokenizer,
            sizes=sizes,
        )
    return load_model_folder(found, bert_tokenizer=bert_tokenizer)
