"""From a checked configuration to objects, by plain functions: the only place where a configured word picks a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipdiff_train.config import (
    BatchPlan,
    DataSettings,
    ModelSettings,
    Stage1Config,
    Stage2Config,
    TrainConfig,
    plan_batches,
    resolve_devices,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from blipdiff_train.data.datamodule import ShardDataModule
    from blipdiff_train.models.parts import ModelParts
    from blipdiff_train.prepare.online import OnlineContext
    from blipdiff_train.stages.callbacks import StopSignals
    from blipdiff_train.stages.loggers import MetricsLogger
    from blipdiff_train.stages.stage1 import Stage1Module
    from blipdiff_train.stages.stage2 import Stage2Module

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_CLIPSEG = "embedded:toy_foundation/clipseg"
EMBEDDED_STAGE1 = "embedded:toy_blipdiffusion/stage1"
"""What a stage-2 run on the toy models starts from when there is no stage-1 run of its own."""


def resolve(source: str) -> str:
    """A folder or hub id; ``embedded:name`` is a folder inside the package.

    Raises:
        ValueError: there is no such embedded folder.
    """
    if not source.startswith("embedded:"):
        return source
    folder = ASSETS / source.removeprefix("embedded:")
    if not folder.is_dir():
        there = sorted(path.relative_to(ASSETS).as_posix() for path in ASSETS.glob("*/*") if path.is_dir())
        raise ValueError(
            f"{source}: there is no such embedded model (there are: {', '.join(there) or 'none'})"
        )
    return str(folder)


# ---- batches and devices -------------------------------------------------------------------------------------------


def batch_plan(config: TrainConfig) -> BatchPlan:
    """How the global batch is shared by devices, and the accumulation that follows."""
    _, devices, _ = resolve_devices(config.trainer)
    world = devices * config.trainer.num_nodes
    return plan_batches(config.global_batch_size, world=world, max_micro_batch=config.trainer.max_micro_batch)


def trainer(
    config: TrainConfig,
    plain: Mapping[str, Any],
    module: Stage1Module | Stage2Module,
    datamodule: ShardDataModule,
    loggers: list[MetricsLogger],
    state: Mapping[str, Any] | None,
    signals: StopSignals,
    frozen: Mapping[str, str],
    *,
    has_validation: bool,
    say: Callable[[str], None] = print,
) -> pl.Trainer:
    """Lightning's loop without its own checkpoints, loggers and progress bar: the callbacks do these.

    Args:
        plain: the configuration as plain data, for the checkpoints.
        loggers: of rank 0, none elsewhere.
        state: the checkpoint that the run continues from.
        frozen: hashes of the frozen parts.
        has_validation: whether there are shards to validate on.
        say: prints a line for the person who runs this, once.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    from blipdiff_train.stages.callbacks import (
        Averaging,
        Checkpointing,
        FaultLimit,
        FiniteCheck,
        ProgressLine,
        SampleGrids,
        StepLog,
    )
    from blipdiff_train.stages.latents import LatentCache
    from blipdiff_train.stages.resume import Saver

    settings, plan = config.trainer, batch_plan(config)
    accelerator, devices, _ = resolve_devices(settings)
    world = devices * settings.num_nodes
    # requeuing is the job script's business: it sees the exit code
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() and world > 1 else []
    has_validation = has_validation and config.every.validation is not None
    made = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings.strategy, accelerator, world),
        precision=settings.precision,
        max_steps=config.total_steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulation,
        gradient_clip_val=config.optim.gradient_clip,
        check_val_every_n_epoch=None,
        val_check_interval=(config.every.validation or 1) * plan.accumulation,
        limit_val_batches=1.0 if has_validation else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        plugins=plugins,
        default_root_dir=config.run_dir,
    )
    start = (0, 0) if state is None else (state["step"], state["position"])
    limit = FaultLimit(
        max_bad_fraction=config.data.max_bad_fraction,
        quarantine=datamodule.quarantine,
        samples_per_step=plan.global_batch,
        start=start,
        causes=None if state is None else state.get("faults"),
    )
    log = StepLog(
        loggers, every=config.every.log, samples_per_step=plan.global_batch, faults=lambda: limit.causes
    )
    saver = Saver(
        made,
        module,
        folder=config.run_dir,
        keep=config.keep_checkpoints,
        stage=config.stage,
        samples_per_step=plan.global_batch,
        config=plain,
        frozen=frozen,
        start=start,
        data=datamodule.fingerprint,
        faults=lambda: limit.causes,
        loggers=loggers,
    )
    if datamodule.latents is not None:
        made.callbacks.append(LatentCache(datamodule, signals, say))
    if module.ema is not None:
        made.callbacks.append(Averaging())
    made.callbacks += [FiniteCheck(), limit, log, ProgressLine(f"stage {config.stage}", log)]
    if config.every.samples is not None and has_validation:
        made.callbacks.append(
            SampleGrids(
                loggers,
                every=config.every.samples,
                first_batch=lambda: next(iter(datamodule.val_dataloader())),
            )
        )
    made.callbacks.append(
        Checkpointing(
            saver,
            every=config.every.checkpoint,
            validation_every=config.every.validation if has_validation else None,
            signals=signals,
            saved_step=start[0],
        )
    )
    return made


def _strategy(name: str, accelerator: str, world: int) -> Any:
    from pytorch_lightning.strategies import DDPStrategy

    if name == "ddp" or world > 1:
        return DDPStrategy(process_group_backend="nccl" if accelerator == "gpu" else "gloo")
    return "auto"


# ---- data ----------------------------------------------------------------------------------------------------------


def data_sources(config: TrainConfig, say: Callable[[str], None]) -> DataSettings:
    """The data settings with toybox replaced by the folders of its shards, which are written on first use."""
    data = config.data
    if data.source != "toybox":
        return data
    from blipdiff_train.prepare.toybox import ensure_shards

    toy = data.toybox
    folders = ensure_shards(
        toy.folder,
        stage=config.stage,
        train_samples=toy.train_samples,
        val_samples=toy.val_samples,
        backgrounds=toy.backgrounds,
        samples_per_shard=toy.samples_per_shard,
        size_px=toy.size_px,
        clipseg=resolve(EMBEDDED_CLIPSEG) if toy.matte == "clipseg" else None,
        say=say,
    )
    backgrounds = None if folders.backgrounds is None else str(folders.backgrounds)
    return replace(data, shards=str(folders.train), val_shards=str(folders.val), backgrounds=backgrounds)


def datamodule(config: TrainConfig, parts: ModelParts, data: DataSettings) -> ShardDataModule:
    """Batches for the stage, in the order that the seed gives."""
    from blipdiff_train.data.datamodule import ShardDataModule

    plan = batch_plan(config)
    extra: dict[str, Any] = {}
    if isinstance(config, Stage1Config):
        extra["min_crop_scale"] = config.augmentation.min_crop_scale
        extra["flip_prob"] = config.augmentation.flip_prob
    elif isinstance(config, Stage2Config):
        parts.require("denoiser", purpose="stage 2")
        extra["target_size"] = config.target_px or parts.denoiser.default_size
        extra["drop_subject_prob"] = config.subject.drop_probability
        extra["random_target_crop"] = config.augmentation.random_target_crop
        extra["subject_scale"] = config.augmentation.subject_scale
        extra["subject_flip_prob"] = config.augmentation.subject_flip_prob
        extra["backgrounds"] = data.backgrounds
        extra["maker"] = maker = online_context(config) if data.context == "online" else None
        if data.cache_latents:
            from blipdiff_train.stages.latents import latent_store

            extra["latents"] = latent_store(
                parts.denoiser,
                target_size=extra["target_size"],
                photographs="shards" if maker is None else maker.store.key,
                folder=data.store,
            )
    accelerator, _, _ = resolve_devices(config.trainer)
    return ShardDataModule(
        stage=config.stage,
        shards=data.shards,
        global_batch_size=plan.global_batch,
        micro_batch_size=plan.micro_batch,
        total_steps=config.total_steps,
        seed=config.seed,
        val_shards=data.val_shards if config.every.validation else None,
        val_samples=config.validation_samples,
        image_size=parts.image_size,
        image_mean=parts.image_mean,
        image_std=parts.image_std,
        shuffle_window=data.window_shards,
        num_workers=data.workers,
        pin_memory=accelerator == "gpu",
        quarantine=str(Path(config.run_dir) / "quarantine.jsonl"),
        cache_dir=data.cache,
        cache_max_bytes=int(data.cache_gb * 1e9),
        **extra,
    )


def online_context(config: TrainConfig) -> OnlineContext:
    """What makes mattes while training, with its segmenter on this rank's device.

    Raises:
        ValueError: settings that make no sense, or a segmenter that cannot be loaded.
    """
    from blipdiff_train.prepare.online import OnlineContext
    from blipdiff_train.prepare.settings import make_settings

    accelerator, _, _ = resolve_devices(config.trainer)
    # as torchrun, Lightning and SLURM number the processes of a machine
    local_rank = next((os.environ[n] for n in ("LOCAL_RANK", "SLURM_LOCALID") if n in os.environ), "0")
    values = asdict(config.data.annotation)
    if values["segmenter"]["model"] is not None:
        values["segmenter"]["model"] = resolve(values["segmenter"]["model"])
    settings = make_settings(
        # neither is opened: photographs come from the data's shards and go into its store
        {"input": "data.shards", "output": "data.store", **values}
        | {"device": f"cuda:{local_rank}" if accelerator == "gpu" else "cpu"}
    )
    return OnlineContext(settings, folder=config.data.store)


# ---- models --------------------------------------------------------------------------------------------------------


def parts(config: TrainConfig, say: Callable[[str], None]) -> ModelParts:
    """The models of the stage: stage 1 a tower, a Q-Former and heads; stage 2 these and Stable Diffusion."""
    import torch

    # what starts from random numbers starts from the same ones on every rank and in every run of this seed
    torch.manual_seed(config.seed)
    if config.stage == 1:
        found = stage1_parts(config.model, temperature=config.loss.temperature)
    else:
        found = stage2_parts(config, say)
    return found


def lower_frozen(config: TrainConfig, parts: ModelParts, *, keep: bool) -> Callable[[], None]:
    """Cast image tower and VAE to ``trainer.frozen_precision``; see ``models.freezing.lower_precision``."""
    import torch

    from blipdiff_train.models.freezing import lower_precision

    dtype = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[config.trainer.frozen_precision]
    modules = [parts.image_encoder, *([parts.denoiser.vae] if parts.denoiser is not None else [])]
    return lower_precision(modules if dtype != torch.float32 else [], dtype, keep=keep)  # loaders give fp32


def stage1_parts(model: ModelSettings, *, temperature: float = 0.07) -> ModelParts:
    """A frozen CLIP tower under a Q-Former that starts random, from BERT or from an earlier model."""
    from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
    from blipdiff_train.checkpoints.transformers import load_bert_into_qformer, load_clip_vision
    from blipdiff_train.models.alignment import AlignmentHeads
    from blipdiff_train.models.parts import ModelParts
    from blipdiff_train.models.qformer import QFormer, QFormerConfig

    settings = model.qformer
    if _is_model(settings.init):
        found = _load_model(settings.init, model)
        heads = found.alignment_heads or AlignmentHeads(
            found.qformer.config.hidden_size, model.embed_dim, temperature
        )
        return replace(
            found, alignment_heads=heads, projection=None, text_encoder=None, denoiser=None, metadata={}
        )

    tower = load_clip_vision(resolve(model.clip), skip_last_layers=model.skip_last_layers)
    tokenizer = load_bert_tokenizer(resolve(model.text_tokenizer))
    qformer = QFormer(
        QFormerConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.intermediate_size,
            max_position_embeddings=settings.max_position_embeddings,
            num_query_tokens=settings.num_query_tokens,
            cross_attention_freq=settings.cross_attention_freq,
            image_width=tower.width,
            dropout=settings.dropout,
        )
    )
    if settings.init != "random":
        load_bert_into_qformer(qformer, resolve(settings.init))
    return ModelParts(
        image_encoder=tower,
        qformer=qformer,
        qformer_tokenizer=tokenizer,
        alignment_heads=AlignmentHeads(settings.hidden_size, model.embed_dim, temperature),
        image_size=tower.image_size,
    )


def stage2_parts(config: TrainConfig, say: Callable[[str], None]) -> ModelParts:
    """Stage 1's result with a fresh projection, and Stable Diffusion."""
    from blipdiff_train.checkpoints.diffusers import load_stable_diffusion
    from blipdiff_train.checkpoints.model_folder import add_generation

    source = stage1_source(config)
    if source is None:
        say("stage 2 starts from a random Q-Former (model.stage1=random): only for tests and ablations")
        found = stage1_parts(config.model)
    else:
        say(f"stage 2 starts from {source}")
        found = _load_model(source, config.model)
    if found.denoiser is not None:
        return found  # a complete model: stage 2 goes on with all of it
    return add_generation(found, load_stable_diffusion(resolve(config.model.stable_diffusion)))


def stage1_source(config: TrainConfig) -> str | None:
    """The folder that stage 2 starts from, None for a random start.

    ``auto`` is the finished stage-1 run of the same name and output folder, else, for the toy models, the embedded one.

    Raises:
        ValueError: ``auto`` finds nothing.
    """
    wanted = config.model.stage1
    if wanted == "random":
        return None
    if wanted != "auto":
        return resolve(wanted)
    names = [config.name, config.name.split("/")[0]]
    folders = [Path(config.output_dir) / "stage1" / name / "model" for name in dict.fromkeys(names)]
    for folder in folders:
        if folder.is_dir():
            return str(folder)
    embedded = ASSETS / EMBEDDED_STAGE1.removeprefix("embedded:")
    if config.model.name == "toy" and embedded.is_dir():
        return str(embedded)
    raise ValueError(
        f"model.stage1=auto found no finished stage-1 run ({' or '.join(map(str, folders))} is not there): "
        "train stage 1 first (stage=1, same name), give its folder (model.stage1=…/model), or model.stage1=random"
    )


def _is_model(source: str) -> bool:
    """Whether a local path is a model of ours, of diffusers or of LAVIS; a BERT folder or hub id is none."""
    if source == "random":
        return False
    path = Path(resolve(source))
    if path.is_file():
        return True
    return any((path / name).exists() for name in ("blipdiff_train.json", "model_index.json", "blip_model"))


def _load_model(source: str, model: ModelSettings) -> ModelParts:
    """A model folder, a BLIP-Diffusion folder of diffusers or LAVIS, or LAVIS's stage-1 file.

    LAVIS's formats leave out tokenizers and configurations: these come from the other models that are named.
    """
    from blipdiff_train.checkpoints.sources import load_parts

    return load_parts(
        resolve(source),
        bert_tokenizer=resolve(model.text_tokenizer),
        image_encoder=resolve(model.clip),
        stable_diffusion=resolve(model.stable_diffusion),
    )


def module(config: TrainConfig, parts: ModelParts) -> Stage1Module | Stage2Module:
    """The stage's step over its parts."""
    optim = config.optim
    common: dict[str, Any] = {
        "total_steps": config.total_steps,
        "seed": config.seed,
        "lr": optim.lr,
        "schedule": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "warmup_lr": optim.warmup_lr,
        "min_lr": optim.min_lr,
        "weight_decay": optim.weight_decay,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "trainable": config.trainable,
        "ema_decay": optim.ema_decay,
        "gradient_checkpointing": config.trainer.gradient_checkpointing,
    }
    if isinstance(config, Stage1Config):
        from blipdiff_train.stages.stage1 import Stage1Module

        return Stage1Module(
            parts.image_encoder,
            parts.qformer,
            parts.alignment_heads,
            parts.qformer_tokenizer,
            max_text_len=config.model.max_text_tokens,
            loss_weights={"itc": config.loss.itc, "itm": config.loss.itm, "itg": config.loss.itg},
            label_smoothing=config.loss.label_smoothing,
            mask_same_caption=config.loss.mask_same_caption,
            **common,
        )
    from blipdiff_train.stages.stage2 import Stage2Module

    return Stage2Module(
        parts,
        template=config.subject.template,
        loss_weighting=config.loss.weighting,
        sampling_steps=config.sampling.steps,
        guidance=config.sampling.guidance,
        **common,
    )


# ---- loggers -------------------------------------------------------------------------------------------------------


def loggers(
    config: TrainConfig, plain: Mapping[str, Any], state: Mapping[str, Any] | None
) -> list[MetricsLogger]:
    """What the configuration asks for, and the CSV files; for rank 0.

    The files come last: what stands in them has been handed to the others, which a later start relies on.

    Args:
        state: the checkpoint that the run continues from.
    """
    from blipdiff_train.stages.loggers import CsvLogger, TensorBoardLogger, WandbLogger

    step = 0 if state is None else state["step"]
    due = state is not None and state["validation_due"]
    table = CsvLogger(config.run_dir, step=step, validation_due=due)
    found: list[MetricsLogger] = []
    if config.logger.tensorboard:
        found.append(TensorBoardLogger(config.run_dir, step=step, validated=table.validated))
    if config.logger.wandb:
        found.append(
            WandbLogger(
                config.run_dir,
                run_id=None if state is None else state["wandb_run_id"],
                written=table.written(),
                project=config.logger.wandb_project,
                entity=config.logger.wandb_entity,
                mode=config.logger.wandb_mode,
                name=f"stage{config.stage}/{config.name}",
                config=plain,
            )
        )
    return [*found, table]
