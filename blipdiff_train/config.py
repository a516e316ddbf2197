"""What every configuration key means, its unit and its limits, and the checks between keys.

The values stand in ``configs/*.yaml`` alone; nothing here has a default. :func:`check` walks a composed configuration
against these classes and returns *all* problems, each with the key, the value and what is allowed. Only ``build``,
``train`` and ``__main__`` import this module: the classes they build take plain arguments.
"""

# ruff: noqa: RUF009 (`key` only makes a dataclass field)
from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin


def key(
    meaning: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A field with its meaning (unit included) and the limits of its value: ``low`` ≤ value ≤ ``high``, > ``above``."""
    return field(metadata={"meaning": meaning, "low": low, "high": high, "above": above})


# ---- train ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QFormerSettings:
    init: str = key("weights: random, a BERT folder or hub id, a model folder, or a LAVIS folder or stage-1 .pth file")
    hidden_size: int = key("width; BERT-base has 768", low=1)
    num_hidden_layers: int = key("transformer layers", low=1)
    num_attention_heads: int = key("heads a layer; divides hidden_size", low=1)
    intermediate_size: int = key("width of the feed-forwards", low=1)
    num_query_tokens: int = key("learned queries, and so subject embeddings in a prompt", low=1)
    cross_attention_freq: int = key("every how many layers the queries read the image", low=1)
    max_position_embeddings: int = key("longest text in tokens that the embeddings can hold", low=1)
    dropout: float = key("probability, in attention and after each block", low=0.0, high=0.9)


@dataclass(frozen=True)
class ModelSettings:
    name: str = key("name of this set of models; the recipe `<name>_stage<n>` is applied where there is one")
    clip: str = key("image tower: local folder, hub id, or embedded:… for a folder inside the package")
    skip_last_layers: int = key("layers of the image tower left out at its end", low=0)
    text_tokenizer: str = key("the Q-Former's WordPiece tokenizer: folder, hub id or embedded:…")
    max_text_tokens: int = key("caption tokens the Q-Former reads, [CLS] and [SEP] included", low=3)
    embed_dim: int = key("width of the space in which images and captions are compared", low=1)
    qformer: QFormerSettings = key("the Q-Former")
    stable_diffusion: str = key("stage 2: Stable Diffusion 1.x folder, hub id or embedded:…")
    stage1: str = key(
        "stage 2 starts from: auto (the stage-1 run of the same name and output folder, else the embedded one), "
        "random, a model folder or hub id, or a LAVIS folder or stage-1 .pth file"
    )


@dataclass(frozen=True)
class ToyboxSettings:
    folder: str = key("where the shards are kept between runs")
    train_samples: int = key("training samples of each stage", low=1)
    val_samples: int = key("held-out samples of each stage", low=1)
    backgrounds: int = key("plain backgrounds for prompted context", low=1)
    samples_per_shard: int = key("samples a tar", low=1)
    size_px: int = key("side of the drawn images in pixels", low=16)
    matte: Literal["clipseg", "exact"] = key(
        "stage-2 mattes: clipseg runs the real annotation pipeline with the toy CLIPSeg, exact keeps the drawn alpha"
    )


@dataclass(frozen=True)
class AnnotationSettings:
    image: PrepareImage = key("how photographs are read and kept")
    segmenter: PrepareSegmenter = key("what finds the subject")
    trimap: PrepareTrimap = key("from probability to foreground, unknown, background")
    matting: PrepareMatting = key("from trimap to matte")
    filters: PrepareFilters = key("what is rejected and replaced by a neighbour; null switches a filter off")


@dataclass(frozen=True)
class DataSettings:
    source: Literal["toybox", "shards"] = key("toybox draws its own shards on first use; shards reads yours")
    shards: str | list[str] | list[dict] | None = key(
        "training tars: folder, glob, URL or a list; or several data sets, [{shards: A, weight: 3}, …]"
    )
    backgrounds: str | list[str] | None = key("stage 2: tars of plain photographs that subjects are put on")
    val_shards: str | list[str] | None = key("held-out tars; null: no validation")
    workers: int = key("loader processes a rank; 0 loads in the training process", low=0)
    window_shards: int = key("samples are shuffled inside windows of so many shards", low=1)
    max_bad_fraction: float = key("share of bad samples above which the run stops", low=0.0, high=1.0)
    cache: str | None = key("local folder for shards read from URLs; null: no remote shards")
    cache_gb: float = key("size of that folder, GB; the longest unused shards leave first", above=0.0)
    context: Literal["prepared", "online"] = key(
        "stage 2: prepared reads mattes from the shards; online makes them from plain photographs, while training"
    )
    cache_latents: bool = key(
        "stage 2: encode every photograph once, before the first step, and train on what is kept of it"
    )
    store: str | None = key(
        "folder for what online and cache_latents make; null: .made beside the shards (remote ones: in data.cache)"
    )
    annotation: AnnotationSettings = key("context=online: the keys of `prepare`, with the same values")
    toybox: ToyboxSettings = key("the embedded toy world")


@dataclass(frozen=True)
class OptimSettings:
    lr: float = key("peak learning rate", above=0.0)
    schedule: Literal["cosine", "constant"] = key("after the warm-up")
    warmup_steps: int = key("optimizer steps from warmup_lr to lr", low=0)
    warmup_lr: float = key("learning rate of the very first step when warmup_steps > 0", low=0.0)
    min_lr: float = key("cosine: learning rate at total_steps", low=0.0)
    weight_decay: float = key("AdamW's, on matrices and query tokens only", low=0.0)
    betas: list[float] = key("AdamW's two moment decays, each in [0, 1)")
    eps: float = key("AdamW's ε", above=0.0)
    gradient_clip: float | None = key("largest global gradient norm; null: no clipping", above=0.0)
    ema_decay: float | None = key(
        "decay of the averaged weights; null: none are kept", above=0.0, high=0.999999
    )


@dataclass(frozen=True)
class TrainerSettings:
    accelerator: Literal["auto", "cpu", "gpu"] = key("auto: the GPU where there is one")
    devices: int | Literal["auto"] = key(
        "processes on this machine: GPUs, or CPU processes; auto: every GPU, else 1"
    )
    num_nodes: int = key("machines", low=1)
    strategy: Literal["auto", "ddp"] = key("auto: ddp as soon as there is more than one process")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = key("arithmetic of the trained parts")
    frozen_precision: Literal["32", "bf16", "16"] = key(
        "arithmetic of image tower and VAE, which never train; the model folder keeps their own numbers"
    )
    max_micro_batch: int = key(
        "largest number of samples a device takes at once; accumulation makes up the rest of global_batch_size",
        low=1,
    )
    gradient_checkpointing: bool = key("recompute activations in the backward pass: less memory, more time")


@dataclass(frozen=True)
class EverySettings:
    log: int = key("optimizer steps between log rows", low=1)
    checkpoint: int = key("optimizer steps between training checkpoints", low=1)
    validation: int | None = key("optimizer steps between validations; null: none", low=1)
    samples: int | None = key("optimizer steps between picture grids; null: none", low=1)


@dataclass(frozen=True)
class LoggerSettings:
    tensorboard: bool = key("write TensorBoard events too")
    wandb: bool = key("log to Weights & Biases too")
    wandb_project: str = key("its project")
    wandb_entity: str | None = key("its team or user; null: your default")
    wandb_mode: Literal["online", "offline"] = key("offline keeps the run in the run folder for `wandb sync`")


@dataclass(frozen=True)
class TrainConfig:
    stage: int = key("1: image–text pre-training of the Q-Former; 2: subject-driven diffusion", low=1, high=2)
    name: str = key("name of the run; part of its folder")
    seed: int = key("of all randomness; 0 is a seed like any other", low=0)
    output_dir: str = key("folder of all runs")
    run_dir: str = key("folder of this run; the same folder continues the same run")
    resume: str = key(
        "auto (continue if there is something), never (start over) or a checkpoint file or run folder"
    )
    global_batch_size: int = key("samples an optimizer step over all devices and machines", low=1)
    total_steps: int = key("optimizer steps of the whole run", low=1)
    keep_checkpoints: int = key("newest training checkpoints kept", low=1)
    validation_samples: int = key("held-out samples a validation", low=1)
    trainable: list[str] = key("patterns of parameter names that train; everything else is frozen")
    optim: OptimSettings = key("optimizer and schedule")
    model: ModelSettings = key("the models")
    data: DataSettings = key("the data")
    trainer: TrainerSettings = key("devices")
    every: EverySettings = key("intervals in optimizer steps")
    logger: LoggerSettings = key("a CSV is always written")


@dataclass(frozen=True)
class Stage1Loss:
    itc: float = key("weight of image–text contrast", low=0.0)
    itm: float = key("weight of image–text matching", low=0.0)
    itg: float = key("weight of image-grounded captioning", low=0.0)
    label_smoothing: float = key("of the contrastive targets and of the captioning loss", low=0.0, high=0.5)
    temperature: float = key("initial temperature of the contrast; it is learned", above=0.0)
    mask_same_caption: bool = key(
        "matching: pairs whose captions read the same are no negatives, and a sample without a negative is left out; "
        "false: LAVIS's draw, which labels both as no match"
    )


@dataclass(frozen=True)
class Stage2Loss:
    weighting: Literal["constant", "truncated_snr"] = key(
        "of the timesteps: constant (paper), or more on high noise, where a subject's colours are settled"
    )


@dataclass(frozen=True)
class Stage2Subject:
    template: Literal["release", "paper"] = key("where the subject embeddings stand in the prompt")
    drop_probability: float = key("of training on the text prompt alone", low=0.0, high=1.0)


@dataclass(frozen=True)
class Stage2Sampling:
    steps: int = key("of the sampler", low=1)
    guidance: float = key("classifier-free guidance; generate and evaluate use it too; 1: none", low=1.0)


@dataclass(frozen=True)
class Stage1Augmentation:
    min_crop_scale: float = key(
        "smallest share of the area that a random crop keeps; 1: no random crop", above=0.0, high=1.0
    )
    flip_prob: float = key("probability of mirroring the photograph", low=0.0, high=1.0)


@dataclass(frozen=True)
class Stage2Augmentation:
    random_target_crop: bool = key("crop the target at random instead of in the middle")
    subject_scale: list[float] = key(
        "smallest and largest side of the subject on its background, share of the canvas"
    )
    subject_flip_prob: float = key(
        "probability of mirroring the subject on its background", low=0.0, high=1.0
    )


@dataclass(frozen=True)
class Stage1Config(TrainConfig):
    augmentation: Stage1Augmentation = key("random changes of the photographs")
    loss: Stage1Loss = key("weights of the three losses")


@dataclass(frozen=True)
class Stage2Config(TrainConfig):
    target_px: int | None = key(
        "side of the images that are denoised; null: what the UNet was made for", low=8
    )
    augmentation: Stage2Augmentation = key("random changes of subject and target")
    subject: Stage2Subject = key("the subject in the prompt")
    loss: Stage2Loss = key("the noise-prediction loss")
    sampling: Stage2Sampling = key("the pictures drawn during training")


# ---- the other commands --------------------------------------------------------------------------------------------

Depth = Literal["sample", "full"]
DEPTH = "sample: 64 samples of each data set are decoded; full: all of them"


@dataclass(frozen=True)
class Stage1Doctor(Stage1Config):
    depth: Depth = key(DEPTH)


@dataclass(frozen=True)
class Stage2Doctor(Stage2Config):
    depth: Depth = key(DEPTH)


@dataclass(frozen=True)
class PrepareImage:
    longest_side_px: int = key("larger photographs are resized to it; smaller ones are kept", low=16)
    shortest_side_px: int = key("smaller photographs are rejected", low=8)
    max_pixels: int = key("width × height read from the header before decoding", low=1)
    format: Literal["jpg", "png"] = key("of the stored photograph")
    jpeg_quality: int = key("of a stored jpg", low=1, high=100)


@dataclass(frozen=True)
class PrepareCaptioner:
    model: str | None = key("local folder or hub id such as Salesforce/blip2-opt-6.7b; null: no captioner")
    batch_size: int = key("photographs a forward", low=1)
    max_new_tokens: int = key("a longer caption is cut", low=1)
    dtype: Literal["float32", "bfloat16", "float16"] = key("of weights and arithmetic")
    replace: bool = key("also caption photographs that came with a caption")


@dataclass(frozen=True)
class PrepareSegmenter:
    name: Literal["grabcut", "clipseg", "alpha"] = key(
        "alpha: the photograph's own alpha or a mask beside it"
    )
    model: str | None = key("clipseg: local folder or hub id")
    batch_size: int = key("clipseg: photographs a forward", low=1)


@dataclass(frozen=True)
class PrepareTrimap:
    foreground_threshold: float = key("seg_prob at or above is foreground", low=0.0, high=1.0)
    background_threshold: float = key("seg_prob at or below is background", low=0.0, high=1.0)
    margin: float = key("unknown border added on both sides, share of the longest side", low=0.0, high=0.5)


@dataclass(frozen=True)
class PrepareMatting:
    engine: Literal["fast", "pymatting"] = key("fast, or pymatting: the reference")
    foreground_colours: bool = key("store .fg.jpg, estimated colours without background bleeding")


@dataclass(frozen=True)
class PrepareFilters:
    area: list[float] | None = key("share of the frame under the matte, smallest and largest")
    border_contact: float | None = key(
        "largest share of the frame's border pixels the subject may touch", low=0.0, high=1.0
    )
    unknown_share: float | None = key("largest unknown share of the trimap", low=0.0, high=1.0)
    blur: float | None = key("smallest variance of the Laplacian of the grey photograph (0..255)", low=0.0)
    num_components: int | None = key("most separate parts of the matte, each at least 1 % of it", low=1)
    agreement: float | None = key(
        "smallest IoU of the matte with what GrabCut finds from the whole frame, a second cut for each photograph",
        low=0.0,
        high=1.0,
    )
    duplicate_distance: int | None = key(
        "perceptual hashes (64 bits) this near are duplicates", low=0, high=16
    )


@dataclass(frozen=True)
class PrepareOpenImages:
    boxes: str | None = key("…-annotations-bbox.csv; null: input is something else")
    classes: str | None = key("…-class-descriptions-boxable.csv; needed with boxes")
    labels: str | None = key(
        "…-annotations-human-imagelabels.csv: photographs whose subject they call absent are left out"
    )
    area: list[float] = key("share of the frame under the subject's box, smallest and largest")
    dominance: float = key("the subject's box is so many times as large as any other", low=1.0)
    exclude: list[str] | None = key("classes that are no subject; null: Person, its parts and kinds, clothes on a body")


@dataclass(frozen=True)
class PrepareReport:
    enabled: bool = key("write report.html")
    num_thumbnails: int = key("mattes and composites shown", low=0)


@dataclass(frozen=True)
class PrepareConfig:
    input: str | None = key(
        "folder of photographs or tars, .tar, .csv, .tsv, .parquet, .json or .jsonl; null: toy photographs"
    )
    output: str = key("folder for shards, index, rejected.jsonl, report.html")
    kind: Literal["subjects", "backgrounds"] = key(
        "subjects: stage-2 shards with mattes; backgrounds: photographs only"
    )
    overwrite: bool = key("remove a job in output made with other settings or inputs")
    categories: str | None = key(
        "null: name of the sub-folder, the .json's or the table's column; a table's other column; a .csv/.json file of "
        "path → category; or one for all"
    )
    captions: str | None = key(
        "null: the .txt or .json beside it, or the table's column; or a .csv/.json file of path → caption"
    )
    openimages: PrepareOpenImages = key("the dataset's tables, where input is a folder of its photographs")
    limit: int | None = key("first so many photographs only", low=1)
    seed: int = key("for pictures in the report; nothing in the shards is random", low=0)
    photographs_per_shard: int = key("unit of work and of resuming", low=1)
    step: Literal["all", "duplicates", "shards", "report"] = key(
        "all; or one of the three steps of a job that several machines share, see part"
    )
    part: str | None = key("k/n with 0 ≤ k < n: do the k-th of n shares of step=duplicates or step=shards")
    engine: Literal["local", "ray"] = key("local: processes here; ray: a Ray cluster that is there already")
    workers: int | None = key(
        "CPU processes (ray: tasks at a time); null: one for each core at hand", low=1
    )
    accelerator: Literal["auto", "cpu", "gpu"] = key("where CLIPSeg and captioner run; auto: the GPUs, if any")
    devices: int | None = key(
        "processes with CLIPSeg and captioner, beside the workers; null: one for each GPU, without a GPU none: every "
        "worker has its own",
        low=1,
    )
    ray_address: str | None = key("engine=ray: host:port of the head; null: RAY_ADDRESS, or this machine's cluster")
    image: PrepareImage = key("how photographs are read and stored")
    captioner: PrepareCaptioner = key("an image-to-text model for the samples kept; off without a model")
    segmenter: PrepareSegmenter = key("what finds the subject")
    trimap: PrepareTrimap = key("from probability to foreground, unknown, background")
    matting: PrepareMatting = key("from trimap to matte")
    filters: PrepareFilters = key("what is rejected; null switches a filter off")
    report: PrepareReport = key("report.html")


@dataclass(frozen=True)
class GenerateConfig:
    model: str = key("model folder; auto: outputs/stage2/default/model, else the embedded toy model")
    image: str | list[str] | None = key(
        "a picture or a list of pictures of one subject; null: a held-out toy subject"
    )
    subject: str | None = key("category words, e.g. dog; needed with image")
    prompt: str | None = key('the rest of the sentence, e.g. "on the beach"; needed with image')
    output: str = key("folder for the pictures")
    num_images: int = key("pictures", low=1)
    steps: int = key("of the sampler", low=1)
    guidance: float | None = key("classifier-free guidance; 1: none; null: the model's own, else 7.5", low=1.0)
    scheduler: Literal["pndm", "ddim"] = key("the sampler")
    seed: int = key("picture j is a function of (seed, j)", low=0)
    template: Literal["release", "paper"] | None = key("null: the one the model was trained with")
    prompt_strength: float = key("times prompt_reps gives how often the sentence is repeated", above=0.0)
    prompt_reps: int | None = key("null: the model's own", low=1)
    negative_prompt: str = key("what to keep away from")
    drop_subject: bool = key("let the text alone guide")
    fit: str = key("crop or pad: how a picture becomes square")
    device: str = key("auto, cpu or cuda")


@dataclass(frozen=True)
class EvaluateJudges:
    clip: str = key("CLIP that recognises scenes: folder, hub id or embedded:…")
    clipseg: str = key("CLIPSeg that finds the subject: folder, hub id or embedded:…")


@dataclass(frozen=True)
class EvaluatePairs:
    count: int = key("held-out image–caption pairs", low=2)
    batch_size: int = key("pairs that compete for a hard negative", low=2)


@dataclass(frozen=True)
class EvaluateSubjects:
    count: int = key("held-out subjects", low=2)
    steps: int = key("of the sampler", low=1)
    guidance: float | None = key("classifier-free guidance; null: the model's own, else 7.5", low=1.0)
    batch_size: int = key("pictures sampled together", low=1)
    pictures: int = key("subjects on the contact sheet", low=1)


@dataclass(frozen=True)
class EvaluateConfig:
    model: str = key("model folder; auto: outputs/stage2/default/model, else the embedded toy model")
    output: str = key("folder for metrics.json and pictures")
    seed: int = key("of cases, negatives and noise", low=0)
    device: str = key("auto, cpu or cuda")
    judges: EvaluateJudges = key("the models that measure")
    pairs: EvaluatePairs = key("a model with stage 1's heads: retrieval, matching, captions")
    subjects: EvaluateSubjects = key("a complete model: subject and scene of what it draws")


@dataclass(frozen=True)
class ExportConfig:
    run: str = key(
        "a run's folder or a model folder; auto: outputs/stage2/default, else the embedded toy model"
    )
    format: Literal["diffusers", "lavis"] = key("layout: Salesforce/blipdiffusion's, or LAVIS's own")
    to: str = key("where to write it; a folder, for LAVIS's stage 1 a .pth file")
    dtype: Literal["float32", "float16", "bfloat16"] = key("diffusers: stored numbers")


# ---- the walk ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(ValueError):
    """All problems of a configuration at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


def leaf_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, in order, groups included."""
    hints = typing.get_type_hints(schema)
    for item in fields(schema):
        yield f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from leaf_keys(hints[item.name], f"{prefix}{item.name}.")


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the known names most like ``name``, at most three of about the same likeness; empty if none is."""

    def likeness(item: str) -> float:
        # a right key under the wrong group is likely too: lr, optimizer.lr
        last = difflib.SequenceMatcher(None, name.rsplit(".", 1)[-1], item.rsplit(".", 1)[-1]).ratio()
        whole = difflib.SequenceMatcher(None, name, item).ratio()
        begun = len(name) > 1 and item.startswith(name)
        return max(whole if whole >= 0.6 else 0.0, 0.95 * last if last >= 0.75 else 0.0, 0.9 * begun)

    by_likeness = sorted(((likeness(item), item) for item in known), key=lambda pair: -pair[0])
    close = [item for value, item in by_likeness[:3] if value > 0.0 and value >= by_likeness[0][0] - 0.1]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unknown_key(name: str, schema: type) -> Problem:
    """The problem of a key that ``schema`` does not have, with the nearest ones or those of its group."""
    known = list(leaf_keys(schema))
    hint = nearest(name, known)
    group = name.rsplit(".", 1)[0] + "." if "." in name else ""
    siblings = [item for item in known if item.startswith(group) and "." not in item[len(group) :]]
    allowed = siblings or [item for item in known if "." not in item]
    return Problem(name, f"there is no such key{hint} (here: {', '.join(allowed)})")


def check(schema: type, plain: Mapping[str, Any], prefix: str = "") -> tuple[Any, list[Problem]]:
    """Turn plain data into an instance of ``schema``.

    Returns:
        The instance (None if there are problems) and every problem found: unknown and missing keys, wrong types,
        values outside their limits.
    """
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    known = {item.name: item for item in fields(schema)}
    for name in plain:
        if name not in known:
            problems.append(
                unknown_key(f"{prefix}{name}", schema) if not prefix else _unknown_in(prefix, name, known)
            )
    for name, item in known.items():
        full = f"{prefix}{name}"
        if name not in plain:
            problems.append(Problem(full, f"is missing ({item.metadata['meaning']})"))
        elif is_dataclass(hints[name]):
            if isinstance(plain[name], Mapping):
                values[name], inner = check(hints[name], plain[name], f"{full}.")
                problems += inner
            else:
                problems.append(Problem(full, f"{plain[name]!r} is not a group of keys"))
        else:
            values[name], problem = _check_value(full, plain[name], hints[name], item.metadata)
            problems += [problem] if problem else []
    return (None if problems else schema(**values)), problems


def _unknown_in(prefix: str, name: str, known: Mapping[str, Any]) -> Problem:
    hint = nearest(name, list(known))
    return Problem(f"{prefix}{name}", f"there is no such key{hint} (here: {', '.join(known)})")


def _check_value(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> tuple[Any, Problem | None]:
    good, value = _convert(value, hint)
    if not good:
        near = nearest(str(value), _words(hint))
        return None, Problem(name, f"{value!r} is not {_describe(hint)}{near} ({metadata['meaning']})")
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        too_low = (low is not None and not value >= low) or (above is not None and not value > above)
        if too_low or (high is not None and not value <= high):
            return None, Problem(name, f"{value!r} must be {_limits(metadata)} ({metadata['meaning']})")
    return value, None


def _limits(metadata: Mapping[str, Any]) -> str:
    """The limits of a key in words, empty without any."""
    bounds = (("≥", metadata["low"]), (">", metadata["above"]), ("≤", metadata["high"]))
    return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a key may be set to, in words: its type and its limits."""
    limits = _limits(metadata)
    return _describe(hint) + (f", {limits}" if limits else "")


def _words(hint: Any) -> list[str]:
    """The words that an annotation allows."""
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    return [word for option in get_args(hint) for word in _words(option)]


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits the annotation, and the value in that type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            good, converted = _convert(value, option)
            if good:
                return True, converted
        return False, value
    if origin is Literal:
        # precision=32 arrives as a number, the allowed word is "32"
        words = {str(word): word for word in get_args(hint)}
        return (
            (True, words[str(value)])
            if str(value) in words and not isinstance(value, bool)
            else (False, value)
        )
    if origin is list:
        if not isinstance(value, (list, tuple)):
            return False, value
        items = [_convert(item, get_args(hint)[0]) for item in value]
        return all(good for good, _ in items), [item for _, item in items]
    if hint is Any or hint is type(None):
        return (hint is Any or value is None), value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float:
        return number, float(value) if number else value
    if hint is str:
        return (True, str(value)) if number else (isinstance(value, str), value)  # name=3 is a fine name
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint in (dict, Mapping):
        return isinstance(value, Mapping), value
    return isinstance(value, hint), value


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        words = [str(word) for word in get_args(hint)]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin is list:
        return f"a list of {_describe(get_args(hint)[0]).removeprefix('a ').removeprefix('an ')}s"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a group"}
    return "null" if hint is type(None) else names.get(hint, str(hint))


# ---- checks between keys -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: ``world × micro_batch × accumulation = global_batch``."""

    global_batch: int
    world: int
    micro_batch: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.world} process{'es' if self.world > 1 else ''} × "
            f"micro-batch {self.micro_batch} × accumulation {self.accumulation}"
        )


def plan_batches(global_batch: int, *, world: int, max_micro_batch: int) -> BatchPlan:
    """The largest micro-batch that divides a rank's share of the global batch and is at most ``max_micro_batch``.

    Raises:
        ValueError: the global batch cannot be shared equally; names the nearest that can.
    """
    if global_batch % world:
        below, over = global_batch // world * world, -(-global_batch // world) * world
        choices = " or ".join(str(size) for size in (below, over) if size)
        raise ValueError(
            f"{global_batch} samples cannot be shared equally by {world} processes; use {choices}"
        )
    share = global_batch // world
    micro = next(size for size in range(min(share, max_micro_batch), 0, -1) if share % size == 0)
    return BatchPlan(global_batch, world, micro, share // micro)


def count_gpus() -> int:
    """GPUs that torch sees on this machine."""
    import torch

    return torch.cuda.device_count()


def resolve_devices(trainer: TrainerSettings) -> tuple[str, int, list[Problem]]:
    """Accelerator ("cpu" or "gpu") and processes on this machine, with the problems of asking for what is not there."""
    num_gpus = 0 if trainer.accelerator == "cpu" else count_gpus()
    accelerator = (
        "gpu" if trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and num_gpus) else "cpu"
    )
    devices = trainer.devices if trainer.devices != "auto" else max(1, num_gpus)
    there = f"this machine has {num_gpus} GPU{'' if num_gpus == 1 else 's'}"
    if devices < 1:
        return accelerator, 1, [Problem("trainer.devices", f"{devices} must be ≥ 1 or auto")]
    if trainer.accelerator == "auto" and not num_gpus and devices > 1:
        advice = f"for {devices} CPU processes add trainer.accelerator=cpu"
        return (
            "cpu",
            devices,
            [Problem("trainer.devices", f"{devices} devices asked for, but {there}; {advice}")],
        )
    if accelerator == "gpu" and devices > num_gpus:
        advice = f"allowed are 1 to {num_gpus}" if num_gpus else "use trainer.accelerator=cpu"
        return "gpu", devices, [Problem("trainer.devices", f"{devices} asked for, but {there}; {advice}")]
    return accelerator, devices, []


def cross_checks(config: TrainConfig) -> list[Problem]:
    """Combinations that cannot work, all of them."""
    problems: list[Problem] = []
    optim, trainer, data = config.optim, config.trainer, config.data
    devices, on_cpu = trainer.devices, trainer.accelerator == "cpu"
    in_half = trainer.precision == "16-mixed" or trainer.frozen_precision == "16"
    if devices != 1 or trainer.accelerator == "gpu" or in_half:
        # counting GPUs imports torch, which takes seconds: only where the count decides something
        accelerator, devices, device_problems = resolve_devices(trainer)
        problems += device_problems
        on_cpu = accelerator == "cpu"
    try:
        plan_batches(
            config.global_batch_size,
            world=devices * trainer.num_nodes,
            max_micro_batch=trainer.max_micro_batch,
        )
    except ValueError as error:
        problems.append(Problem("global_batch_size", f"{error} (trainer.devices × trainer.num_nodes)"))
    if optim.warmup_steps > config.total_steps:
        problems.append(
            Problem("optim.warmup_steps", f"{optim.warmup_steps} must be ≤ total_steps={config.total_steps}")
        )
    if optim.min_lr > optim.lr:
        problems.append(Problem("optim.min_lr", f"{optim.min_lr} must be ≤ optim.lr={optim.lr}"))
    if optim.warmup_lr > optim.lr:
        problems.append(Problem("optim.warmup_lr", f"{optim.warmup_lr} must be ≤ optim.lr={optim.lr}"))
    if len(optim.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in optim.betas):
        problems.append(Problem("optim.betas", f"{optim.betas} must be two numbers in [0, 1)"))
    if config.model.qformer.hidden_size % config.model.qformer.num_attention_heads:
        heads = config.model.qformer.num_attention_heads
        problems.append(
            Problem(
                "model.qformer.num_attention_heads",
                f"{heads} does not divide model.qformer.hidden_size={config.model.qformer.hidden_size}",
            )
        )
    if config.model.max_text_tokens > config.model.qformer.max_position_embeddings:
        limit = config.model.qformer.max_position_embeddings
        problems.append(
            Problem(
                "model.max_text_tokens",
                f"{config.model.max_text_tokens} > model.qformer.max_position_embeddings={limit}",
            )
        )
    if not config.trainable:
        problems.append(Problem("trainable", "the list is empty: nothing would train"))
    if data.source == "shards" and data.shards is None:
        problems.append(
            Problem("data.shards", "is null; name the training tars, e.g. data.shards=path/to/folder")
        )
    problems += _data_checks(config)
    if data.source == "toybox":
        problems += [
            Problem(f"data.{name}", "is given, but data=toybox draws its own shards; use data=shards")
            for name in ("shards", "val_shards", "backgrounds")
            if getattr(data, name) is not None
        ]
    if on_cpu and trainer.precision == "16-mixed":
        problems.append(
            Problem("trainer.precision", "16-mixed needs a GPU; on the CPU use 32-true or bf16-mixed")
        )
    if on_cpu and trainer.frozen_precision == "16":
        problems.append(Problem("trainer.frozen_precision", "16 needs a GPU; on the CPU use 32 or bf16"))
    if isinstance(config, Stage2Config):
        scale = config.augmentation.subject_scale
        if len(scale) != 2 or not 0.0 < scale[0] <= scale[1] <= 1.0:
            problems.append(
                Problem("augmentation.subject_scale", f"{scale} must be two rising numbers in (0, 1]")
            )
    if isinstance(config, Stage1Config) and not config.loss.itc + config.loss.itm + config.loss.itg > 0:
        problems.append(Problem("loss", "all weights are 0: nothing would be learned"))
    return problems


def _data_checks(config: TrainConfig) -> list[Problem]:
    """What mattes made online and cached latents need."""
    problems: list[Problem] = []
    data, online = config.data, config.data.context == "online"
    if online and config.stage != 2:
        problems.append(Problem("data.context", "online makes mattes, which only stage=2 reads; use prepared"))
    if online and data.source != "shards":
        problems.append(
            Problem(
                "data.context",
                "online reads your own photographs: data=shards data.shards=…; toybox draws annotated ones",
            )
        )
    if data.cache_latents and not isinstance(config, Stage2Config):
        problems.append(Problem("data.cache_latents", "stage 1 has no latents; use it with stage=2"))
    if data.cache_latents and isinstance(config, Stage2Config) and config.augmentation.random_target_crop:
        problems.append(
            Problem(
                "data.cache_latents",
                "true needs the same target every time; set augmentation.random_target_crop=false",
            )
        )
    if not online:
        return problems
    annotation, where = data.annotation, "data.annotation"
    if annotation.segmenter.name == "clipseg" and not annotation.segmenter.model:
        expected = "is null; a folder or hub id such as CIDAS/clipseg-rd64-refined, or embedded:toy_foundation/clipseg"
        problems.append(Problem(f"{where}.segmenter.model", expected))
    low, high = annotation.trimap.background_threshold, annotation.trimap.foreground_threshold
    if not low < high:
        problems.append(
            Problem(f"{where}.trimap.foreground_threshold", f"{high} must be > background_threshold={low}")
        )
    area = annotation.filters.area
    if area is not None and not (len(area) == 2 and 0.0 <= area[0] < area[1] <= 1.0):
        problems.append(Problem(f"{where}.filters.area", f"{area} must be two rising shares in [0, 1], or null"))
    if annotation.filters.duplicate_distance is not None:
        problems.append(
            Problem(
                f"{where}.filters.duplicate_distance",
                "must be null: near-duplicates are found among all photographs, which only `prepare` sees",
            )
        )
    return problems


def train_schema(plain: Mapping[str, Any]) -> type[TrainConfig]:
    """The schema of the stage that ``plain`` names."""
    return Stage2Config if plain.get("stage") == 2 else Stage1Config


SCHEMAS: dict[str, type] = {
    "prepare": PrepareConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}


def schema_of(command: str, plain: Mapping[str, Any]) -> type:
    """The schema of a command; train's and doctor's depend on the stage."""
    if command == "doctor":
        return Stage2Doctor if plain.get("stage") == 2 else Stage1Doctor
    return train_schema(plain) if command == "train" else SCHEMAS[command]


def check_command(command: str, plain: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """A command's composed configuration, or every problem with it."""
    config, problems = check(schema_of(command, plain), plain)
    if config is not None and command in ("train", "doctor"):
        problems = cross_checks(config)
    return (None if problems else config), problems
