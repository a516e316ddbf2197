"""Train the toy foundation models from nothing but toybox, and save them in the layout of the real ones.

They stand where CLIP, CLIPSeg and Stable Diffusion stand for real users: the same classes of transformers and
diffusers, small. One script, in steps that can be run apart and continue where they stopped:

    pool        draw subjects and scenes once; every later step blends its own pictures from them
    tokenizers  a CLIP byte-level BPE and a BERT WordPiece with small vocabularies
    clip        both CLIP towers and CLIPSeg's decoder, together: one pass of the image tower serves both losses
    vae         AutoencoderKL, factor 8
    latents     the pool's pictures through the VAE, once
    unet        text-to-image on prompts that never name the subject's colours
    evaluate    held-out numbers and pictures

    python scripts/make_toy_foundation.py clip --minutes 60 &
    python scripts/make_toy_foundation.py vae --minutes 40; python scripts/make_toy_foundation.py latents unet
    python scripts/make_toy_foundation.py evaluate

`--minutes` is the training time of each named training step, counted over all its runs; the learning rate follows
the share of it that is spent. Calling again with a larger number trains on from the last checkpoint. Usable weights
are exported every few minutes, file by file and atomically.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from blipdiff_train.data import toybox  # noqa: E402  (the script also runs from a checkout that is not installed)

SIZE = 64  # px
LATENT_FACTOR = 8
LATENT_CHANNELS = 6
MAX_TEXT_TOKENS = 48  # 16 subject embeddings and 32 text tokens
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
STEPS = ("pool", "tokenizers", "clip", "vae", "latents", "unet", "evaluate")
DEFAULT_MINUTES = {"clip": 60.0, "vae": 40.0, "unet": 40.0}  # on one busy CPU core each

CATEGORY_INDEX = {name: i for i, name in enumerate(toybox.CATEGORIES)}
COLOUR_INDEX = {name: i for i, name in enumerate(toybox.COLOURS)}
PATTERN_INDEX = {name: i for i, name in enumerate(toybox.PATTERNS)}
SCENE_NAMES = tuple(toybox.SCENES)
# Columns of an attribute table, and how many values each has.
ATTRIBUTES = ("category", "colour_a", "colour_b", "pattern", "scene")
ATTRIBUTE_SIZES = (len(CATEGORY_INDEX), len(COLOUR_INDEX), len(COLOUR_INDEX), len(PATTERN_INDEX), len(SCENE_NAMES))

# Words a prompt may bring that toybox does not: they keep common English in one token each.
COMMON_WORDS = """
a an the and or of in on at to with by for from as is are was be it its this that these those he she they we
you i his her their our my your one two three four five some many more most very big small little large old
new young good bad long short high low left right up down over under near behind front above below between
inside photo picture image drawing painting sketch illustration render style close view side cartoon
watercolor oil person people man woman child boy girl cat animal toy shoe backpack vase bottle box ball hat
table chair street city grass sky water sea river lake rain sun moon star cloud tree flower rock sand wood
stone glass metal paper wearing holding sitting standing running flying swimming sleeping looking made bright
dark light beautiful cute colourful colorful plain background top bottom middle day morning evening winter
summer spring autumn
""".split()  # noqa: SIM905  (a paragraph reads better than two hundred quoted words)


# ------------------------------------------------------------------------------------------------- files


def log(step: str, message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {step:10s} {message}", flush=True)


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then move its files into `folder`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        write(Path(temporary))
        for path in sorted(Path(temporary).rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.chmod(0o644)  # safetensors writes files that only their owner can read
                os.replace(path, target)


def save_half(model: nn.Module, folder: Path) -> None:
    """Publish fp16 weights whose config still asks for float32.

    fp16 halves the files; transformers loads in the dtype that config.json names, and arithmetic in half
    precision is slow and coarse on CPU.
    """

    def write(temporary: Path) -> None:
        copy.deepcopy(model).half().save_pretrained(temporary, safe_serialization=True)
        config_path = temporary / "config.json"
        config = json.loads(config_path.read_text())
        for part in (config, config.get("text_config"), config.get("vision_config")):
            if part is not None and "model_type" in part:  # diffusers loads as float32 without being told
                part["dtype"] = "float32"
        config.pop("_name_or_path", None)
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    publish(folder, write)


# -------------------------------------------------------------------------------------------------- pool


def attributes_of(identity: toybox.Identity, scene: str) -> tuple[int, int, int, int, int]:
    return (
        CATEGORY_INDEX[identity.category],
        COLOUR_INDEX[identity.colour_a],
        COLOUR_INDEX[identity.colour_b],
        PATTERN_INDEX[identity.pattern],
        SCENE_NAMES.index(scene),
    )


def make_pool(work: Path, count: int) -> None:
    """Draw `count` training subjects and as many empty scenes into .npy files; done once."""
    done = work / "pool.json"
    if done.exists() and json.loads(done.read_text())["count"] == count:
        return
    shapes = {
        "alpha": (SIZE, SIZE),
        "foreground": (SIZE, SIZE, 3),
        "background": (SIZE, SIZE, 3),
        "looks": (4,),
        "scene": (),
    }
    arrays = {
        name: np.lib.format.open_memmap(work / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(count, *shape))
        for name, shape in shapes.items()
    }
    start = time.time()
    for number in range(count):
        drawn = toybox.sample(number, size=SIZE)
        scene = number % len(SCENE_NAMES)
        arrays["alpha"][number] = drawn.alpha
        arrays["foreground"][number] = drawn.foreground
        arrays["looks"][number] = attributes_of(drawn.identity, drawn.scene)[:4]
        arrays["background"][number] = toybox.background(number, size=SIZE, scene=SCENE_NAMES[scene])
        arrays["scene"][number] = scene
        if number % 2000 == 1999:
            log("pool", f"{number + 1}/{count}  {(number + 1) / (time.time() - start):.0f}/s")
    for array in arrays.values():
        array.flush()
    done.write_text(json.dumps({"count": count}))


class Pool:
    """Blends random subjects with random scenes: far more pictures than were drawn, and no link between the two."""

    def __init__(self, work: Path) -> None:
        names = ("alpha", "foreground", "background", "looks", "scene")
        self.alpha, self.foreground, self.background, self.looks, self.scene = (
            np.load(work / f"{name}.npy", mmap_mode="r") for name in names
        )

    def __len__(self) -> int:
        return len(self.alpha)

    def blend(self, subjects: np.ndarray, scenes: np.ndarray, mirror: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [0, 1], mattes (B, H, W) in [0, 1] and attributes (B, 5) int64."""
        matte = torch.from_numpy(self.alpha[subjects]).float()[..., None] / 255
        foreground = torch.from_numpy(self.foreground[subjects]).float() / 255
        background = torch.from_numpy(self.background[scenes]).float() / 255
        image = matte * foreground + (1 - matte) * background
        flip = torch.from_numpy(mirror)[:, None, None, None]
        image, matte = torch.where(flip, image.flip(2), image), torch.where(flip, matte.flip(2), matte)
        table = np.concatenate([self.looks[subjects], self.scene[scenes][:, None]], axis=1).astype(np.int64)
        return image.permute(0, 3, 1, 2).contiguous(), matte[..., 0], torch.from_numpy(table)

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.blend(
            rng.integers(len(self), size=count), rng.integers(len(self), size=count), rng.random(count) < 0.5
        )


def heldout_batch(count: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor, list[toybox.ToySample]]:
    """The first held-out samples, as `Pool.blend` returns them, and the samples themselves."""
    samples = [toybox.sample(first + number, split="heldout", size=SIZE) for number in range(count)]
    image = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).float() / 255
    matte = torch.from_numpy(np.stack([s.alpha for s in samples])).float() / 255
    table = torch.tensor([attributes_of(s.identity, s.scene) for s in samples])
    return image, matte, table, samples


def clip_normalise(image_01: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=image_01.dtype).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (image_01 - mean) / std


# -------------------------------------------------------------------------------------------- tokenizers


def toybox_sentences() -> list[str]:
    """Every word of the world, in sentences."""
    sentences = [toybox.scene_prompt(c, s) for c in toybox.CATEGORIES for s in toybox.SCENES]
    for identity in toybox.identities("train")[::7]:
        sentences.append(toybox.full_caption(identity, SCENE_NAMES[len(sentences) % len(SCENE_NAMES)]))
    return sentences


def make_tokenizers(out: Path) -> None:
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import BertTokenizer, CLIPTokenizer

    world_words = sorted({word for text in toybox_sentences() for word in text.replace("-", " - ").split()})

    # The reference tokenizer's own normalisation and splitting, so that merges are learned on what it will see.
    frame = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=ByteLevel.alphabet(), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([word for word in world_words for _ in range(50)] + COMMON_WORDS, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens last. Any string has a spelling.
    alphabet = sorted(ByteLevel.alphabet())
    entries = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(entries)}, merges=merges, model_max_length=MAX_TEXT_TOKENS
    )
    for folder in ("clip", "clipseg", "stable_diffusion/tokenizer"):
        publish(out / folder, clip_tokenizer.save_pretrained)

    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    characters += [chr(code) for code in range(0xA1, 0x100) if chr(code).lower() == chr(code)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    pieces += [f"##{c}" for c in characters if c.isalnum()] + world_words + COMMON_WORDS
    bert_tokenizer = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, do_lower_case=True, model_max_length=32
    )
    publish(out / "bert_tokenizer", bert_tokenizer.save_pretrained)
    log("tokenizers", f"CLIP BPE {len(clip_tokenizer)} tokens, BERT WordPiece {len(bert_tokenizer)} tokens")


def load_tokenizer(out: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(out / "clip", local_files_only=True)


# ---------------------------------------------------------------------------------------------- training


class Training:
    """The loop all steps share: time budget, warm-up and cosine, EMA, checkpoints, exports, log lines.

    Args:
        step_loss: (step, share of the budget spent) → named losses, already weighted; their sum is minimised.
        export: called with the EMA weights in place.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        peak_lr: float,
        batch_size: int,
        budget_seconds: float,
        work: Path,
        step_loss: Callable[[int, float], dict[str, Tensor]],
        export: Callable[[], None],
        export_seconds: float,
        bf16: bool,
    ) -> None:
        self.name, self.model, self.step_loss, self.export = name, model, step_loss, export
        self.bf16 = bf16
        self.peak_lr, self.batch_size, self.budget_seconds = peak_lr, batch_size, budget_seconds
        self.export_seconds = export_seconds
        self.path = work / f"{name}.pt"
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
        )
        self.ema = copy.deepcopy(model.state_dict())
        self.step, self.elapsed = 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.elapsed = state["ema"], state["step"], state["elapsed"]
            log(name, f"continues at step {self.step}, {self.elapsed / 60:.1f} min")

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        torch.save({**state, "step": self.step, "elapsed": self.elapsed}, temporary)
        os.replace(temporary, self.path)

    def export_ema(self) -> None:
        current = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.ema)
        self.model.eval()
        with torch.no_grad():
            self.export()
        self.model.train()
        self.model.load_state_dict(current)

    def run(self) -> None:
        self.model.train()
        # From its first moment a checkpoint tells the other steps that this one builds on their weights.
        self.save()
        mean: dict[str, float] = {}
        clock = last_log = last_save = last_export = time.time()
        logged_step = self.step
        while self.elapsed < self.budget_seconds:
            share = self.elapsed / self.budget_seconds
            rate = self.peak_lr * min(1.0, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * share))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                losses = self.step_loss(self.step, share)
            total = sum(losses.values())
            if not torch.isfinite(total):
                raise FloatingPointError(f"{self.name}: loss is {total.item()} at step {self.step}")
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(0.998, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, value in self.model.state_dict().items():
                    if value.is_floating_point():
                        self.ema[key].lerp_(value, 1 - decay)
            for key, value in losses.items():
                mean[key] = 0.98 * mean.get(key, value.item()) + 0.02 * value.item()
            now = time.time()
            self.elapsed += now - clock
            clock = now
            if now - last_log > 20:
                speed = (self.step - logged_step) * self.batch_size / (now - last_log)
                parts = "  ".join(f"{key} {value:.4f}" for key, value in mean.items())
                left = (self.budget_seconds - self.elapsed) / 60
                log(self.name, f"step {self.step}  {parts}  lr {rate:.1e}  {speed:.0f}/s  {left:.1f} min left")
                last_log, logged_step = now, self.step
            if now - last_save > 120:
                self.save()
                last_save = now
            if now - last_export > self.export_seconds:
                self.export_ema()
                last_export = clock = time.time()
        self.save()
        self.export_ema()
        log(self.name, f"finished: {self.step} steps in {self.elapsed / 60:.1f} min")


# ------------------------------------------------------------------------------------- CLIP and CLIPSeg


def clipseg_model(vocabulary: int):
    """CLIPSeg at toy size; its `clip` part has the parameters and names of a `CLIPModel`."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    common = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 128}
    text = {
        **common,
        "num_hidden_layers": 3,
        "vocab_size": vocabulary,
        "max_position_embeddings": MAX_TEXT_TOKENS,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {**common, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": LATENT_FACTOR}
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=128,
        reduce_dim=64,
        extract_layers=[0, 1, 3],
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        # The refined decoder's two strides of patch_size / 4 reach the picture's size at patch 16 only.
        use_complex_transposed_convolution=False,
    )
    return CLIPSegForImageSegmentation(config)


def clip_from_clipseg(clipseg):
    """The same towers as a `CLIPModel`; strict, so a renamed key is an error."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = (
        {key: value for key, value in part.to_dict().items() if key != "model_type"}
        for part in (clipseg.config.text_config, clipseg.config.vision_config)
    )
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    clip.load_state_dict(clipseg.clip.state_dict(), strict=True)
    return clip


def random_caption(row: np.ndarray, rng: np.random.Generator) -> tuple[str, tuple[bool, ...]]:
    """A caption of a picture's attributes (5,), and which of the attributes it names."""
    category, colour_a, colour_b, pattern, scene = (
        names[int(i)]
        for names, i in zip(
            (toybox.CATEGORIES, tuple(toybox.COLOURS), tuple(toybox.COLOURS), toybox.PATTERNS, SCENE_NAMES),
            row,
            strict=True,
        )
    )
    kind = rng.random()
    identity = toybox.Identity(category, colour_a, colour_b, pattern)
    if kind < 0.6:
        return toybox.full_caption(identity, scene), (True,) * 5
    if kind < 0.8:
        return toybox.scene_prompt(category, scene), (True, False, False, False, True)
    if kind < 0.9:
        return f"a {category}", (True, False, False, False, False)
    return f"a {colour_a} and {colour_b} {pattern} {category}", (True, True, True, True, False)


def lengthen(caption: str, rng: np.random.Generator) -> str:
    """The caption later in the sentence or repeated: at toy size too, every text position has to be learned."""
    if rng.random() < 0.5:
        return ", ".join([caption] * int(rng.integers(2, 5)))
    return " ".join([*rng.choice(COMMON_WORDS, int(rng.integers(1, 24))), caption])


def train_clip(out: Path, work: Path, args: argparse.Namespace) -> None:
    from transformers import CLIPImageProcessor, CLIPSegProcessor, CLIPTextConfig, CLIPTextModel, ViTImageProcessor

    torch.manual_seed(args.seed)
    pool, tokenizer = Pool(work), load_tokenizer(out)
    model = clipseg_model(len(tokenizer))
    # Read the attributes from both embeddings through the same heads. They are dropped afterwards; they only make
    # the contrastive training short.
    heads = nn.ModuleList(nn.Linear(128, size) for size in ATTRIBUTE_SIZES)
    bundle = nn.ModuleDict({"clipseg": model, "heads": heads})
    batch_size = args.batch or 48
    category_ids = tokenizer(list(toybox.CATEGORIES), padding=True, return_tensors="pt").input_ids

    def step_loss(step: int, share: float) -> dict[str, Tensor]:
        rng = np.random.default_rng([args.seed, 1, step])
        image, matte, table = pool.batch(rng, batch_size)
        captions, named = zip(*(random_caption(row, rng) for row in table.numpy()), strict=True)
        if rng.random() < 0.25:
            captions = [lengthen(caption, rng) for caption in captions]
        ids = tokenizer(
            list(captions), padding=True, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
        ).input_ids
        vision = model.clip.vision_model(pixel_values=clip_normalise(image), output_hidden_states=True)
        image_embeds = model.clip.visual_projection(vision.pooler_output)
        text_embeds = model.clip.text_projection(model.clip.text_model(input_ids=ids).pooler_output)

        # A caption fits every picture that has what it names: "a dog" has as many right answers as there are dogs.
        named = torch.tensor(named)
        fits = ((table[:, None] == table[None]) | ~named[:, None]).all(-1).float()  # text, image
        scale = model.clip.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * F.normalize(text_embeds, dim=-1) @ F.normalize(image_embeds, dim=-1).T
        contrastive = 0.5 * (
            F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
        )
        # A silhouette is by far the last thing learned, so the category counts for more than the rest together.
        attribute = sum(
            (6 if name == "category" else 1)
            * (
                F.cross_entropy(head(image_embeds), table[:, i])
                + F.cross_entropy(head(text_embeds), table[:, i].where(named[:, i], -100))
            )
            for i, (name, head) in enumerate(zip(ATTRIBUTES, heads, strict=True))
        )

        absent = torch.from_numpy(rng.random(batch_size) < 0.1)
        asked = (table[:, 0] + absent * torch.from_numpy(rng.integers(1, len(CATEGORY_INDEX), batch_size))) % len(
            CATEGORY_INDEX
        )
        category_embeds = model.clip.text_projection(model.clip.text_model(input_ids=category_ids).pooler_output)
        activations = [vision.hidden_states[i + 1] for i in model.extract_layers]
        mask_logits = model.decoder(tuple(activations), category_embeds[asked]).logits.view_as(matte)
        wanted = matte * ~absent[:, None, None]
        mask = F.binary_cross_entropy_with_logits(mask_logits, wanted)
        found = mask_logits.sigmoid()
        dice = 1 - (2 * (found * wanted).sum((1, 2)) + 1) / ((found + wanted).sum((1, 2)) + 1)
        return {"itc": contrastive, "attributes": 0.15 * attribute, "mask": 4 * mask, "dice": 0.5 * dice.mean()}

    def export() -> None:
        clip = clip_from_clipseg(model)
        save_half(clip, out / "clip")
        save_half(model, out / "clipseg")
        text_config = {**clip.config.text_config.to_dict()}
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
        prefix = "text_model."
        tower = {k.removeprefix(prefix): v for k, v in clip.state_dict().items() if k.startswith(prefix)}
        text_encoder.load_state_dict(tower, strict=True)
        # The UNet is trained on one text encoder; a later CLIP must not slip in under it.
        if not (work / "unet.pt").exists() or args.replace_text_encoder:
            save_half(text_encoder, out / "stable_diffusion" / "text_encoder")
        size = {"height": SIZE, "width": SIZE}
        publish(out / "clip", CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained)
        # Same normalisation as the towers were trained with; no crop, a mask must cover the whole picture.
        image_processor = ViTImageProcessor(size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD)
        publish(out / "clipseg", CLIPSegProcessor(image_processor, tokenizer).save_pretrained)
        zero_shot, iou = evaluate_clip(clip, model, tokenizer, 256)
        log("clip", "held-out " + "  ".join(f"{k} {v:.3f}" for k, v in zero_shot.items()) + f"  IoU {iou:.3f}")

    Training(
        "clip",
        bundle,
        peak_lr=args.lr or 1.5e-3,
        batch_size=batch_size,
        budget_seconds=60 * args.minutes_of("clip"),
        work=work,
        step_loss=step_loss,
        export=export,
        export_seconds=60 * args.export_minutes,
        bf16=args.bf16,
    ).run()


# --------------------------------------------------------------------------------------------------- VAE


def vae_model():
    from diffusers import AutoencoderKL

    channels = (12, 16, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def train_vae(out: Path, work: Path, args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    pool = Pool(work)
    vae = vae_model().to(memory_format=torch.channels_last)
    batch_size = args.batch or 4

    def step_loss(step: int, share: float) -> dict[str, Tensor]:
        rng = np.random.default_rng([args.seed, 2, step])
        if share < 0.4 and not args.decoder_only:
            # Windows around the subject first: half the pixels of a batch of whole pictures, twice the subjects.
            image, matte, _ = pool.batch(rng, 2 * batch_size)
            top, left = rng.integers(8, SIZE // 2 - 7, size=2)
            image, matte = (x[..., top : top + SIZE // 2, left : left + SIZE // 2] for x in (image, matte))
        else:
            image, matte, _ = pool.batch(rng, batch_size)
        image = (2 * image - 1).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(not args.decoder_only):
            posterior = vae.encode(image).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, dtype=np.float32))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        # Twice the weight on the subject: its two colours are what stage 2 is about. The square moves wrong
        # colours early, the absolute value keeps edges sharp late.
        error = decoded - image
        pixel = ((error.abs() + 2 * error.square()) * (1 + matte[:, None])).mean()
        edge = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return {"pixel": pixel, "edge": 0.3 * edge, "kl": 5e-4 * divergence}

    def export() -> None:
        if not args.decoder_only:  # else a UNet may have been trained on latents of the exported scale
            image = heldout_batch(128)[0]
            generator = torch.Generator().manual_seed(0)
            latents = vae.encode(2 * image - 1).latent_dist.sample(generator)
            vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        save_half(vae, out / "stable_diffusion" / "vae")
        metrics = evaluate_vae(vae, 64)
        log("vae", "held-out " + "  ".join(f"{k} {v:.2f}" for k, v in metrics.items()))

    training = Training(
        "vae",
        vae,
        peak_lr=args.lr or 2e-3,
        batch_size=batch_size,
        budget_seconds=60 * args.minutes_of("vae"),
        work=work,
        step_loss=step_loss,
        export=export,
        export_seconds=60 * args.export_minutes,
        bf16=args.bf16,
    )
    if args.decoder_only:
        # Latents that a UNet was trained on stay what they are: those of the exported, averaged encoder. Without this
        # script's own checkpoint the exported weights are where training goes on.
        exported = AutoencoderKL.from_pretrained(
            out / "stable_diffusion" / "vae", local_files_only=True, torch_dtype=torch.float32
        )
        vae.register_to_config(scaling_factor=exported.config.scaling_factor)
        if training.step:
            vae.load_state_dict(training.ema)
        else:
            vae.load_state_dict(exported.state_dict())
            training.ema = copy.deepcopy(vae.state_dict())
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    training.run()


# -------------------------------------------------------------------------------------------------- UNet


def unet_model():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // LATENT_FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def noise_scheduler():
    """Stable Diffusion's schedule."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def cache_latents(out: Path, work: Path, args: argparse.Namespace) -> None:
    """Encode `--latents` blended pictures; remakes the cache when the VAE's weights have changed."""
    from diffusers import AutoencoderKL

    folder = out / "stable_diffusion" / "vae"
    weights = folder / "diffusion_pytorch_model.safetensors"
    stamp = {"count": args.latents, "vae": hashlib.sha256(weights.read_bytes()).hexdigest(), "seed": args.seed}
    done = work / "latents.json"
    if done.exists() and json.loads(done.read_text()) == stamp:
        return
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).eval()
    vae.to(memory_format=torch.channels_last)
    pool = Pool(work)
    side, rng = SIZE // LATENT_FACTOR, np.random.default_rng([args.seed, 3])
    moments = np.empty((args.latents, 2 * LATENT_CHANNELS, side, side), np.float16)
    looks = np.empty((args.latents, 2), np.int64)
    start = time.time()
    with torch.inference_mode():
        for first in range(0, args.latents, 32):
            image, _, table = pool.batch(rng, min(32, args.latents - first))
            posterior = vae.encode((2 * image - 1).contiguous(memory_format=torch.channels_last)).latent_dist
            pair = torch.cat([posterior.mean, posterior.std], 1) * vae.config.scaling_factor
            moments[first : first + 32] = pair.numpy()
            looks[first : first + 32] = table[:, [0, 4]].numpy()
            if first % 3200 == 0:
                log("latents", f"{first}/{args.latents}  {first / (time.time() - start):.0f}/s")
    np.save(work / "latent_moments.npy", moments)
    np.save(work / "latent_looks.npy", looks)
    done.write_text(json.dumps(stamp))


def prompt_embeddings(out: Path) -> tuple[Tensor, Tensor]:
    """Embeddings of every prompt in three lengths (3, categories × scenes, L, D), and of the empty one (L, D)."""
    from transformers import CLIPTextModel

    tokenizer = load_tokenizer(out)
    encoder = CLIPTextModel.from_pretrained(
        out / "stable_diffusion" / "text_encoder", local_files_only=True, dtype=torch.float32
    ).eval()
    prompts = [toybox.scene_prompt(c, s) for c in toybox.CATEGORIES for s in SCENE_NAMES]

    def encode(texts: list[str]) -> Tensor:
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
        ).input_ids
        with torch.inference_mode():
            return encoder(input_ids=ids).last_hidden_state

    repeated = [torch.stack([encode([", ".join([p] * n)])[0] for p in prompts]) for n in (1, 3, 20)]
    return torch.stack(repeated).clone(), encode([""])[0].clone()


def train_unet(out: Path, work: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    moments = torch.from_numpy(np.load(work / "latent_moments.npy"))
    looks = torch.from_numpy(np.load(work / "latent_looks.npy"))
    prompts, empty = prompt_embeddings(out)
    scheduler = noise_scheduler()
    unet = unet_model().to(memory_format=torch.channels_last)
    batch_size = args.batch or 32
    folder = out / "stable_diffusion"

    def step_loss(step: int, share: float) -> dict[str, Tensor]:
        rng = np.random.default_rng([args.seed, 4, step])
        rows = torch.from_numpy(rng.integers(len(moments), size=batch_size))
        mean, std = moments[rows].float().chunk(2, dim=1)
        latents = mean + std * torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        timesteps = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=batch_size))
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        length = torch.from_numpy(rng.choice(3, size=batch_size, p=(0.5, 0.2, 0.3)))
        condition = prompts[length, looks[rows, 0] * len(SCENE_NAMES) + looks[rows, 1]]
        dropped = torch.from_numpy(rng.random(batch_size) < 0.1)
        condition = torch.where(dropped[:, None, None], empty, condition)
        predicted = unet(noisy, timesteps, condition, return_dict=False)[0]
        # Min-SNR weighting (Hang et al. 2023, γ = 5): nearly clean latents would take most of a short training.
        alpha = scheduler.alphas_cumprod[timesteps]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / snr
        return {"noise": (weight * (predicted - noise).square().mean((1, 2, 3))).mean()}

    def export() -> None:
        save_half(unet, folder / "unet")
        publish(folder / "scheduler", scheduler.save_pretrained)
        publish(folder, write_model_index)
        category, scene = evaluate_unet(out, unet, 50, steps=15, guidance=5.0)
        log("unet", f"50 samples: category {category:.2f}  scene {scene:.2f}")

    Training(
        "unet",
        unet,
        peak_lr=args.lr or 1e-3,
        batch_size=batch_size,
        budget_seconds=60 * args.minutes_of("unet"),
        work=work,
        step_loss=step_loss,
        export=export,
        export_seconds=60 * args.export_minutes,
        bf16=args.bf16,
    ).run()


def write_model_index(folder: Path) -> None:
    """What diffusers' `StableDiffusionPipeline.from_pretrained` looks for."""
    import diffusers

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# -------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate_clip(clip, clipseg, tokenizer, count: int) -> tuple[dict[str, float], float]:
    """Zero-shot accuracies of CLIP and CLIPSeg's mean IoU at 0.5 on held-out samples."""
    image, matte, table, samples = heldout_batch(count)
    pixels = clip_normalise(image)
    image_embeds = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def embed(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
        return F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)

    prompts = embed([toybox.scene_prompt(c, s) for c in toybox.CATEGORIES for s in SCENE_NAMES])
    best = (image_embeds @ prompts.T).argmax(1)
    metrics = {
        "category": (best // len(SCENE_NAMES) == table[:, 0]).float().mean().item(),
        "scene": (best % len(SCENE_NAMES) == table[:, 4]).float().mean().item(),
    }
    # Everything else as in the sample's own caption, so that only the asked attribute can decide.
    for name in ("colour_a", "colour_b", "pattern"):
        known = toybox.PATTERNS if name == "pattern" else tuple(toybox.COLOURS)
        right = 0
        for row, drawn in enumerate(samples):
            looks = {key: getattr(drawn.identity, key) for key in ("category", "colour_a", "colour_b", "pattern")}
            other = looks["colour_b" if name == "colour_a" else "colour_a"]
            choices = [value for value in known if name == "pattern" or value != other]
            texts = [toybox.full_caption(toybox.Identity(**{**looks, name: value}), drawn.scene) for value in choices]
            right += choices[int((embed(texts) @ image_embeds[row]).argmax())] == looks[name]
        metrics[name] = right / len(samples)
    ids = tokenizer([drawn.subject for drawn in samples], padding=True, return_tensors="pt").input_ids
    found = clipseg(input_ids=ids, pixel_values=pixels).logits.view_as(matte) > 0
    truth = matte > 0.5
    iou = ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)).mean().item()
    return metrics, iou


@torch.inference_mode()
def evaluate_vae(vae, count: int) -> dict[str, float]:
    """PSNR in dB, and the mean CIELAB difference of all pixels and of the subject's inner pixels."""
    image, matte, _, _ = heldout_batch(count)
    decoded = vae.decode(vae.encode(2 * image - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    lab = [toybox.srgb_to_lab(255 * x.permute(0, 2, 3, 1).numpy()) for x in (image, decoded)]
    difference = np.linalg.norm(lab[0] - lab[1], axis=-1)
    inside = matte.numpy() > 0.99
    psnr = -10 * torch.log10((decoded - image).square().mean((1, 2, 3))).mean().item()
    return {"psnr": psnr, "delta_e": float(difference.mean()), "delta_e_subject": float(difference[inside].mean())}


@torch.inference_mode()
def text_to_image(out: Path, unet, prompts: list[str], *, steps: int, guidance: float, seed: int) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of the saved text encoder and VAE with the given UNet."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        out / "stable_diffusion", unet=unet, local_files_only=True, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    # One generator a picture: a picture does not depend on the others in the call.
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pictures = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt",
        height=SIZE, width=SIZE,
    ).images  # fmt: skip
    return pictures.float()


@torch.inference_mode()
def evaluate_unet(out: Path, unet, count: int, *, steps: int, guidance: float) -> tuple[float, float]:
    """Shares of generated pictures in which the saved CLIP finds the category and the scene asked for."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(out / "clip", local_files_only=True, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(out)
    pairs = [(c, s) for c in range(len(toybox.CATEGORIES)) for s in range(len(SCENE_NAMES))]
    pairs = [pairs[(7 * i) % len(pairs)] for i in range(count)]
    prompts = [toybox.scene_prompt(toybox.CATEGORIES[c], SCENE_NAMES[s]) for c, s in pairs]
    pictures = torch.cat(
        [
            text_to_image(out, unet, prompts[i : i + 25], steps=steps, guidance=guidance, seed=1000 + i)
            for i in range(0, count, 25)
        ]
    )
    embeds = clip.visual_projection(clip.vision_model(pixel_values=clip_normalise(pictures)).pooler_output)
    every = [toybox.scene_prompt(c, s) for c in toybox.CATEGORIES for s in SCENE_NAMES]
    ids = tokenizer(every, padding=True, return_tensors="pt").input_ids
    texts = F.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
    best = (embeds @ texts.T).argmax(1)
    wanted = torch.tensor(pairs)
    category = (best // len(SCENE_NAMES) == wanted[:, 0]).float().mean().item()
    scene = (best % len(SCENE_NAMES) == wanted[:, 1]).float().mean().item()
    return category, scene


def contact_sheet(pictures: Tensor, columns: int, path: Path, zoom: int = 2) -> None:
    """Write (N, 3, H, W) pictures in [0, 1], row by row, as one file."""
    from PIL import Image

    rows = [torch.cat(list(pictures[i : i + columns]), dim=2) for i in range(0, len(pictures), columns)]
    sheet = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(sheet)
    picture = picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
    picture.save(path, optimize=True, quality=92)


def evaluate(out: Path, args: argparse.Namespace) -> None:
    """All held-out numbers into `metrics.json`, and two pictures to judge by eye."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPSegForImageSegmentation

    local = {"local_files_only": True}
    clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32, **local).eval()
    clipseg = CLIPSegForImageSegmentation.from_pretrained(out / "clipseg", dtype=torch.float32, **local).eval()
    folder = out / "stable_diffusion"
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **local).eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **local).eval()
    zero_shot, iou = evaluate_clip(clip, clipseg, load_tokenizer(out), 512)
    category, scene = evaluate_unet(out, unet, 100, steps=25, guidance=5.0)
    metrics = {
        "clip_zero_shot_heldout_512": zero_shot,
        "clipseg_mean_iou_heldout_512": iou,
        "vae_heldout_256": evaluate_vae(vae, 256),
        "unet_100_samples_25_steps_guidance_5": {"category": category, "scene": scene},
        "megabytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6,
    }
    text = json.dumps(metrics, indent=2) + "\n"
    publish(out, lambda temporary: (temporary / "metrics.json").write_text(text))
    print(text)

    world = [
        toybox.render(who, scene, pose_seed=i).image
        for i, who in enumerate(toybox.identities("heldout")[:: len(toybox.identities("heldout")) // 10][:10])
        for scene in SCENE_NAMES[:6]
    ]
    columns = torch.from_numpy(np.stack(world)).permute(0, 3, 1, 2).float() / 255
    contact_sheet(columns, 6, args.pictures / "toybox.png")
    image = heldout_batch(10)[0]
    with torch.inference_mode():
        decoded = vae.decode(vae.encode(2 * image - 1).latent_dist.mean).sample / 2 + 0.5
    contact_sheet(torch.cat([image, decoded]), 10, args.pictures / "toy_vae.png")
    prompts = [toybox.scene_prompt(c, s) for c in toybox.CATEGORIES for s in SCENE_NAMES]
    rows = [
        text_to_image(out, unet, prompts[i : i + 20], steps=25, guidance=5.0, seed=i)
        for i in range(0, len(prompts), 20)
    ]
    contact_sheet(torch.cat(rows), len(SCENE_NAMES), args.pictures / "toy_text_to_image.jpg", zoom=1)


# -------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(STEPS)}; all without")
    parser.add_argument("--minutes", type=float, help="training time of each named training step, over all runs")
    parser.add_argument("--export-minutes", type=float, default=5.0, help="time between exports of usable weights")
    parser.add_argument("--batch", type=int, help="batch size, instead of the step's own")
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of the step's own")
    parser.add_argument("--pool", type=int, default=12000, help="subjects, and scenes, drawn once")
    parser.add_argument("--latents", type=int, default=8000, help="pictures encoded for the UNet")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of this process")
    parser.add_argument("--bf16", action="store_true", help="bf16 arithmetic: twice as fast where the CPU has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder-only", action="store_true", help="vae: leave the latents as they are")
    parser.add_argument(
        "--replace-text-encoder",
        action="store_true",
        help="export CLIP's text tower although a UNet was trained on one",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "blipdiff_train" / "assets" / "toy_foundation")
    parser.add_argument("--pictures", type=Path, default=ROOT / "blipdiff_train" / "assets" / "pictures")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "toy_foundation", help="pool and checkpoints")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    args.minutes_of = lambda step: DEFAULT_MINUTES[step] if args.minutes is None else args.minutes
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    named = args.steps or list(STEPS)
    actions = {
        "pool": lambda: make_pool(args.work, args.pool),
        "tokenizers": lambda: make_tokenizers(args.out),
        "clip": lambda: train_clip(args.out, args.work, args),
        "vae": lambda: train_vae(args.out, args.work, args),
        "latents": lambda: cache_latents(args.out, args.work, args),
        "unet": lambda: train_unet(args.out, args.work, args),
        "evaluate": lambda: evaluate(args.out, args),
    }
    for step in STEPS:
        if step in named:
            actions[step]()


if __name__ == "__main__":
    main()
