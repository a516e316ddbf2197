"""What the commands other than ``train`` do with their checked configuration; each returns an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipdiff_train.build import ASSETS, resolve

if TYPE_CHECKING:
    from blipdiff_train.config import EvaluateConfig, ExportConfig, GenerateConfig, PrepareConfig, TrainConfig

DEFAULT_RUN = Path("outputs/stage2/default")
EMBEDDED_MODEL = "toy_blipdiffusion"


def model_folder(wanted: str) -> str:
    """The model folder that a word means: a folder or hub id, a run's folder, or ``auto``.

    Raises:
        ValueError: ``auto`` finds neither a run nor an embedded model.
    """
    if wanted != "auto":
        return str(Path(wanted) / "model") if (Path(wanted) / "model").is_dir() else resolve(wanted)
    if (DEFAULT_RUN / "model").is_dir():
        return str(DEFAULT_RUN / "model")
    embedded = ASSETS / EMBEDDED_MODEL
    if (embedded / "model_index.json").is_file():
        return str(embedded)
    raise ValueError(
        f"there is no model yet: train one (it would be in {DEFAULT_RUN}/model) or name its folder"
    )


def device_of(wanted: str) -> str:
    """``auto`` is the GPU where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def prepare(config: PrepareConfig, plain: Mapping[str, Any]) -> int:
    """Photographs in, annotated shards out."""
    from blipdiff_train.prepare import job
    from blipdiff_train.prepare.advice import next_command, why_nothing

    settings = asdict(config)
    if config.input is None:
        from blipdiff_train.data.toybox.write import write_photograph_folder

        photographs = f"{config.output}-photographs"
        print(f"input is null: drawing 48 toy photographs into {photographs}")
        settings["input"] = str(write_photograph_folder(photographs, 48, size=128))
    for block in ("segmenter", "captioner"):
        if settings[block]["model"] is not None:
            settings[block]["model"] = resolve(settings[block]["model"])
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's is a user's Ctrl-C
    try:
        summary = job.run(**settings)
    except KeyboardInterrupt:
        without = " without overwrite=true" if config.overwrite else ""
        words = f"finished shards are kept in {config.output}: the same command{without} continues"
        raise KeyboardInterrupt(words) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        words = f"output={config.output}: {error.strerror}; make room, and the same command continues"
        raise ValueError(words) from error
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, terminate)
    print(summary)
    if summary.num_units_missing or config.part:
        return 0
    if not summary.num_samples:
        print(f"{why_nothing(summary.rejected)} ({config.output}/rejected.jsonl has all)", file=sys.stderr)
        return 1
    if config.report.enabled:
        print(f"look at {config.output}/report.html, then train:")
    print(f"  {next_command(config.kind, config.output)}")
    return 0


def generate(config: GenerateConfig, plain: Mapping[str, Any]) -> int:
    """Pictures of a subject in the scene that a prompt asks for."""
    from PIL import Image

    from blipdiff_train.checkpoints.model_folder import load_model_folder
    from blipdiff_train.common.files import atomic_path
    from blipdiff_train.common.images import load_image
    from blipdiff_train.data import toybox
    from blipdiff_train.inference.pipeline import SubjectPipeline

    folder = model_folder(config.model)
    if config.image is None:
        drawn = toybox.sample(config.seed, split="heldout", size=128)
        images = [Image.fromarray(drawn.image)]
        subject, prompt = config.subject or drawn.subject, config.prompt or "on the beach"
    else:
        missing = [name for name in ("subject", "prompt") if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"image is given, {' and '.join(missing)} is not; e.g. subject=dog prompt='on the beach'"
            )
        images = [
            load_image(path) for path in ([config.image] if isinstance(config.image, str) else config.image)
        ]
        subject, prompt = config.subject, config.prompt
    pipeline = SubjectPipeline(load_model_folder(folder)).to(device_of(config.device))
    made = pipeline.generate(
        images,
        subject,
        prompt,
        num_images=config.num_images,
        steps=config.steps,
        guidance=config.guidance,
        scheduler=config.scheduler,
        seed=config.seed,
        template=config.template,
        prompt_strength=config.prompt_strength,
        prompt_reps=config.prompt_reps,
        negative_prompt=config.negative_prompt,
        drop_subject=config.drop_subject,
        fit=config.fit,
    )
    output = Path(config.output)
    for name, image in [
        ("subject.png", images[0]),
        *((f"{number:03d}.png", image) for number, image in enumerate(made)),
    ]:
        with atomic_path(output / name) as temporary:
            image.save(temporary)
    print(f"{len(made)} pictures of {subject!r} {prompt!r} by {folder}: {output}/000.png …")
    return 0


def evaluate(config: EvaluateConfig, plain: Mapping[str, Any]) -> int:
    """Numbers and pictures of a trained model on held-out toy subjects."""
    from blipdiff_train.evaluation import report

    metrics = report.run(
        model_folder(config.model),
        config.output,
        clip=resolve(config.judges.clip),
        clipseg=resolve(config.judges.clipseg),
        pairs=config.pairs.count,
        pairs_batch_size=config.pairs.batch_size,
        subjects=config.subjects.count,
        steps=config.subjects.steps,
        guidance=config.subjects.guidance,
        batch_size=config.subjects.batch_size,
        pictures=config.subjects.pictures,
        seed=config.seed,
        device=device_of(config.device),
    )
    print(report.table(metrics))
    return 0


def export(config: ExportConfig, plain: Mapping[str, Any]) -> int:
    """A trained model in another layout."""
    import torch

    from blipdiff_train.checkpoints.export import export as write

    folder = model_folder(config.run)
    dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
    print(f"{folder} → {write(folder, config.format, config.to, dtype=dtype)} ({config.format})")
    return 0


def doctor(config: TrainConfig, plain: Mapping[str, Any]) -> int:
    """A table of what a training run with the same words would meet."""
    from blipdiff_train import doctor as clinic

    return clinic.run(config)
