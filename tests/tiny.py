"""A model of a few thousand weights and a few shards, as folders on the disk: whole runs in seconds, the real way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

CLIP_WORDS = [
    "a",
    "an",
    "the",
    "on",
    "dog",
    "cat",
    "boat",
    "red",
    "blue",
    "beach",
    "snow",
    "with",
    "and",
    "spots",
]


def write_bert_tokenizer(folder: Path) -> Path:
    """A WordPiece vocabulary of the letters and some words."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *CLIP_WORDS[3:],
        *letters,
        *(f"##{x}" for x in letters),
        ",",
        "-",
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_clip_tokenizer(folder: Path, *, length: int = 40) -> int:
    """A BPE vocabulary of single letters; returns its size."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [",", "-", "."]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(tokens)


def write_models(folder: Path) -> Path:
    """``clip/``, ``bert_tokenizer/`` and ``stable_diffusion/`` with random weights, the same ones every time."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    width = 16
    write_bert_tokenizer(folder / "bert_tokenizer")
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    diffusion = folder / "stable_diffusion"
    vocab_size = write_clip_tokenizer(diffusion / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        projection_dim=width,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    CLIPTextModel(text).save_pretrained(diffusion / "text_encoder")
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    ).save_pretrained(diffusion / "vae")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=width,
    ).save_pretrained(diffusion / "unet")
    DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    ).save_pretrained(diffusion / "scheduler")
    return folder


def write_data(folder: Path, *, samples: int = 24) -> Path:
    """``stage1/``, ``stage2/`` and ``val1/``, ``val2/`` of toybox samples with exact mattes."""
    from blipdiff_train.data import toybox
    from blipdiff_train.data.samples import stage1_record, stage2_record
    from blipdiff_train.data.shards import write_shards

    def one(number: int, split: str):
        return toybox.sample(number, split=split, size=16)

    for split, count, suffix in (("train", samples, "stage"), ("heldout", 6, "val")):
        drawn = [one(number, split) for number in range(count)]
        write_shards(
            (stage1_record(f"{n:05d}", s.image, s.caption) for n, s in enumerate(drawn)),
            folder / f"{suffix}1",
            samples_per_shard=10,
        )
        write_shards(
            (
                stage2_record(
                    f"{n:05d}", s.image, s.alpha, subject=s.subject, caption=s.caption, prompt=s.prompt
                )
                for n, s in enumerate(drawn)
            ),
            folder / f"{suffix}2",
            samples_per_shard=10,
        )
    return folder


def overrides(models: Path, data: Path, output: Path, stage: int) -> list[str]:
    """A run of a few seconds on the folders of :func:`write_models` and :func:`write_data`."""
    return [
        f"stage={stage}",
        "data=shards",
        f"data.shards={data}/stage{stage}",
        f"data.val_shards={data}/val{stage}",
        "data.workers=0",
        f"model.clip={models}/clip",
        f"model.text_tokenizer={models}/bert_tokenizer",
        f"model.stable_diffusion={models}/stable_diffusion",
        "model.stage1=random",
        "model.embed_dim=8",
        "model.qformer.hidden_size=16",
        "model.qformer.num_hidden_layers=2",
        "model.qformer.num_attention_heads=2",
        "model.qformer.intermediate_size=32",
        "model.qformer.num_query_tokens=4",
        f"output_dir={output}",
        "trainer.accelerator=cpu",
        "global_batch_size=4",
        "total_steps=6",
        "optim.warmup_steps=2",
        "optim.lr=1e-3",
        "every.log=1",
        "every.checkpoint=2",
        "every.validation=3",
        "every.samples=null",
    ]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "blipdiff_train", *words]


def run(*words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    done = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=REPOSITORY,
        timeout=900,
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_killed(*words: str, reached: Callable[[], bool], log: Path) -> None:
    """The command line until ``reached()``, then SIGKILL to all its processes at once, as in a power cut."""
    with log.open("w") as file:
        process = subprocess.Popen(command(*words), cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True)
    while not reached() and process.poll() is None:
        time.sleep(0.005)
    if process.poll() is not None:
        raise AssertionError(f"it ended by itself with exit code {process.returncode}\n{log.read_text()}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
