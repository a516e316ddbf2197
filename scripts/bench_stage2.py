"""What cached latents save of a stage-2 step, and how long a step waits for data with mattes made while training.

    python scripts/bench_stage2.py toy           # a step of the embedded models: forward, backward, AdamW; and loading
    python scripts/bench_stage2.py full          # the same at the size of Stable Diffusion 1.5, without AdamW
    python scripts/bench_stage2.py operations    # multiplications of the full-size step by part, on any machine
    python scripts/bench_stage2.py wait          # runs on prepared shards, online, and online again, as typed

The two sides of a ratio are timed in turn, in one process. ``full`` takes minutes on a CPU and 13 GiB, and its weights
are random, which changes no time.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blipdiff_train.data.samples import Stage2Batch
from blipdiff_train.stages.stage2 import Stage2Module

ROOT = Path(__file__).resolve().parent.parent
TOY_MODEL = ROOT / "blipdiff_train/assets/toy_blipdiffusion"
CLIPSEG = "embedded:toy_foundation/clipseg"


def toy_module() -> Stage2Module:
    from blipdiff_train.checkpoints.model_folder import load_model_folder

    return Stage2Module(load_model_folder(str(TOY_MODEL)), template="release", total_steps=10, lr=1e-4, seed=0)


def full_module(*, gradient_checkpointing: bool) -> Stage2Module:
    """Every part at its published size, with random weights and the toy model's tokenizers."""
    from blipdiff_train.checkpoints.model_folder import load_model_folder
    from blipdiff_train.models import presets
    from blipdiff_train.models.denoiser import Denoiser
    from blipdiff_train.models.image_encoder import ImageEncoder
    from blipdiff_train.models.parts import ModelParts
    from blipdiff_train.models.qformer import QFormer, QFormerConfig
    from blipdiff_train.models.subject_encoder import SubjectProjection
    from blipdiff_train.models.text_encoder import TextEncoder

    toy = load_model_folder(str(TOY_MODEL))
    vae, unet = presets.build_vae(presets.SD15_VAE), presets.build_unet(presets.SD15_UNET)
    parts = ModelParts(
        image_encoder=ImageEncoder.from_config(**presets.CLIP_VIT_L_14),
        qformer=QFormer(QFormerConfig(**presets.QFORMER_BASE)),
        qformer_tokenizer=toy.qformer_tokenizer,
        projection=SubjectProjection(768),
        text_encoder=TextEncoder(presets.build_text_model(presets.SD15_TEXT), toy.text_encoder.tokenizer),
        denoiser=Denoiser(vae, unet, presets.build_noise_scheduler({})),
    )
    return Stage2Module(
        parts, template="release", total_steps=10, lr=2e-6, seed=0, gradient_checkpointing=gradient_checkpointing
    )


def make_batch(size: int, image_px: int, target_px: int, device: str = "cpu") -> Stage2Batch:
    prompts = ["a dog on the beach"] * size
    return Stage2Batch(
        subject_image=torch.randn(size, 3, image_px, image_px, device=device),
        target_image=torch.rand(size, 3, target_px, target_px, device=device) * 2 - 1,
        latent_moments=None,
        subject_text=["dog"] * size,
        prompt=prompts,
        subject_dropped=torch.zeros(size, dtype=torch.bool),
        caption=prompts,
        keys=[str(number) for number in range(size)],
        positions=torch.arange(size),
    )


def timed(call: Callable[[], Tensor | None]) -> tuple[float, float]:
    """By the clock, and on the processors, which other work disturbs less."""
    clock, processors = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processors


def step(module: Stage2Module, optimizer: torch.optim.Optimizer | None, batch: Stage2Batch) -> None:
    torch.manual_seed(0)
    module.zero_grad(set_to_none=True)
    module.noise_loss(batch).backward()
    if optimizer is not None:
        optimizer.step()


def compare(name: str, module: Stage2Module, batch: Stage2Batch, *, pairs: int, optimise: bool) -> None:
    """A step that encodes against one from moments, and the VAE alone."""
    module.train()
    optimizer = module.configure_optimizers()["optimizer"] if optimise else None
    moments = module.denoiser.encode_moments(batch.target_image)
    cached = replace(batch, target_image=None, latent_moments=moments)
    if pairs > 1:  # a first step allocates
        step(module, optimizer, batch)
    rows = []
    for _ in range(pairs):
        encode = timed(lambda: module.denoiser.encode_moments(batch.target_image))
        encoded = timed(lambda: step(module, optimizer, batch))
        from_cache = timed(lambda: step(module, optimizer, cached))
        rows.append((*encode, *encoded, *from_cache))
        print(
            f"{name}: VAE {encode[0]:.3f} s, step {encoded[0]:.3f} s, from moments {from_cache[0]:.3f} s; "
            f"ratio {encoded[0] / from_cache[0]:.3f} ({encoded[1] / from_cache[1]:.3f} of processor time)",
            flush=True,
        )
    ratio = statistics.median(row[2] / row[4] for row in rows), statistics.median(row[3] / row[5] for row in rows)
    share = statistics.median(row[1] / row[3] for row in rows)
    print(
        f"{name}: median of {pairs}: {ratio[0]:.3f} times as fast by the clock, {ratio[1]:.3f} of processor time; "
        f"the VAE is {share:.1%} of a step's processor time"
    )


def compare_loading(pairs: int) -> None:
    """What a loader does for a sample of 512 px, with and without its target."""
    import cv2

    from blipdiff_train.data.pixels import TARGET
    from blipdiff_train.data.samples import stage2_record
    from blipdiff_train.data.transforms import LATENT_SUFFIX, Stage2Transform
    from blipdiff_train.stages.latents import npy_bytes

    generator = np.random.default_rng(0)
    photo = cv2.resize(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8), (640, 512))
    alpha = np.zeros((512, 640), np.uint8)
    alpha[100:400, 150:450] = 255
    made = stage2_record("a", photo, alpha, subject="dog", caption="a dog", foreground=photo)
    record = {k: v for k, v in made.items() if k != "json"} | {"json": b'{"subject": "dog", "caption": "a dog"}'}
    record[LATENT_SUFFIX] = npy_bytes(torch.zeros(8, 64, 64))
    sides = [Stage2Transform(224, 512, seed=0, cached_latents=cached) for cached in (False, True)]

    def load(transform: Stage2Transform) -> None:
        for position in range(20):
            sample = transform(record, position)
            if sample.target_image is not None:
                TARGET([sample.target_image])

    rows = [tuple(timed(lambda side=side: load(side))[1] / 20 for side in sides) for _ in range(pairs)]
    ratio = statistics.median(whole / without for whole, without in rows)
    print(
        f"loading at 512 px: {1e3 * statistics.median(row[0] for row in rows):.1f} ms of processor time a sample, with "
        f"latents {1e3 * statistics.median(row[1] for row in rows):.1f} ms: {ratio:.2f} times as fast"
    )


def operations() -> None:
    """Multiplications of one full-size sample at 512 px, counted by torch on tensors without content."""
    from torch.utils.flop_counter import FlopCounterMode

    from blipdiff_train.models import presets

    def count(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops() / 2e12

    with torch.device("meta"):
        vae, unet = presets.build_vae(presets.SD15_VAE), presets.build_unet(presets.SD15_UNET)
        image, latents = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        encode = count(lambda: vae.encode(image))
        forward = count(lambda: unet(latents, torch.zeros(1), encoder_hidden_states=torch.empty(1, 77, 768)))
    print(f"VAE encoder {encode:.2f}, UNet forward {forward:.2f} tera-multiplications at 512 px")
    for name, passes in (("forward and backward", 3), ("with gradient checkpointing", 4)):
        print(f"  UNet {name} ({passes} ×): the VAE adds {encode / (passes * forward):.1%}")


def write_photographs(source: Path, output: Path, count: int, size: int) -> None:
    """Plain shards from a folder with a sub-folder for each category, longest side ``size`` px."""
    from blipdiff_train.common.images import load_image
    from blipdiff_train.data.shards import write_shards
    from blipdiff_train.prepare.work import encode

    def samples() -> Iterator[dict[str, object]]:
        for number, path in enumerate(files):
            image = load_image(path)
            factor = size / max(image.size)
            image = image.resize((round(image.width * factor), round(image.height * factor)))
            category = path.parent.name.replace("_", " ")
            yield {
                "__key__": f"{number:06d}",
                "jpg": encode(np.asarray(image), "jpg", 95),
                "json": {"subject": category},
            }

    files = sorted(source.glob("*/*.jpg"))[:count]
    if len(files) < count:
        raise SystemExit(f"{source}: {len(files)} photographs as CATEGORY/NAME.jpg, --samples asks for {count}")
    write_shards(samples(), output, samples_per_shard=64)


def wait(options: argparse.Namespace) -> None:
    """The logged share of a step's time that it waits for data, in three runs of the command line."""
    from blipdiff_train.data.toybox.write import write_toybox

    annotation = [
        "image.format=png", "image.shortest_side_px=16", f"segmenter.name={options.segmenter}",
        f"segmenter.model={CLIPSEG}", "segmenter.batch_size=8", "filters.blur=null", "filters.duplicate_distance=null",
        "filters.border_contact=null", "filters.unknown_share=null", "filters.num_components=null",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs, prepared = folder / "photographs", folder / "prepared"
        if options.photographs is None:
            write_toybox(photographs, "photographs", options.samples, size=options.size, samples_per_shard=64)
        else:
            write_photographs(options.photographs, photographs, options.samples, options.size)
        command("prepare", f"input={photographs}", f"output={prepared}", "report.enabled=false", *annotation)
        online = ["data.context=online", *(f"data.annotation.{word}" for word in annotation)]
        steps = options.samples // options.batch  # one epoch
        for title, shards, more in (
            ("prepared shards", prepared, []),
            ("online, first epoch", photographs, online),
            ("online, mattes in the store", photographs, online),
        ):
            run = folder / title.replace(" ", "_").replace(",", "")
            command(
                "train", "stage=2", "data=shards", f"data.shards={shards}", f"output_dir={run}",
                f"data.workers={options.workers}", f"trainer.devices={options.devices}", "trainer.accelerator=cpu",
                f"global_batch_size={options.batch}", f"total_steps={steps}", "every.log=1", "every.samples=null",
                "every.validation=null", "optim.warmup_steps=0", "data.max_bad_fraction=1",
                f"target_px={options.target}", *more,
            )  # fmt: skip
            with (run / "stage2/default/metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            # seconds of a step, and of it waited; the first step also starts the loaders
            spent = [options.batch / float(row["time/samples_per_second"]) for row in rows[1:]]
            waited = [s * float(row["time/data_wait_share"]) for s, row in zip(spent, rows[1:], strict=True)]
            print(
                f"{title}: {sum(waited) / sum(spent):.1%} of {sum(spent):.1f} s waited for data "
                f"({len(spent)} steps of {options.batch}, {options.devices} processes × {options.workers} loaders); "
                f"the first step {options.batch / float(rows[0]['time/samples_per_second']):.1f} s",
                flush=True,
            )


def command(*words: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "blipdiff_train", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("toy", "full", "operations", "wait"))
    parser.add_argument("--pairs", type=int, default=5, help="toy, full: timed runs of each side")
    parser.add_argument("--no-checkpointing", action="store_true", help="full: keep the activations")
    parser.add_argument("--batch", type=int, default=32, help="samples a step of the toy models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=512, help="wait: how many photographs")
    parser.add_argument("--photographs", type=Path, help="wait: CATEGORY/NAME.jpg below it, instead of drawn ones")
    parser.add_argument("--size", type=int, default=64, help="wait: their longest side in pixels")
    parser.add_argument(
        "--target", type=int, default=64, help="wait: side of the targets in pixels; sets a step's work"
    )
    parser.add_argument("--segmenter", choices=("clipseg", "grabcut"), default="clipseg")
    parser.add_argument("--workers", type=int, default=1, help="wait: loaders of a process")
    parser.add_argument("--devices", type=int, default=1, help="wait: processes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what == "operations":
        operations()
    elif options.what == "wait":
        wait(options)
    elif options.what == "toy":
        module = toy_module()
        batch = make_batch(options.batch, module.parts.image_size, module.denoiser.default_size)
        compare(f"toy, {options.batch} samples", module, batch, pairs=options.pairs, optimise=True)
        compare_loading(options.pairs)
    else:
        checkpointing = not options.no_checkpointing
        module, batch = full_module(gradient_checkpointing=checkpointing), make_batch(1, 224, 512)
        name = f"full size, one sample of 512 px, {'with' if checkpointing else 'without'} gradient checkpointing"
        compare(name, module, batch, pairs=options.pairs, optimise=False)


if __name__ == "__main__":
    main()
