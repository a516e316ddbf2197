"""The real sizes: parameter counts part by part without memory, and one step of each stage with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.presets import (
    CLIP_VIT_L_14,
    QFORMER_BASE,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    build_text_model,
    build_unet,
    build_vae,
)
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection

GIB = 2**30
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "full_size.md"


def stated(number: int) -> int:
    """``number``, which the page in docs/ must state too."""
    assert f"{number:,}" in PAGE.read_text(encoding="utf-8"), f"{PAGE.name} does not say {number:,}"
    return number


def count(module: nn.Module) -> int:
    assert all(parameter.is_meta for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters())


def linear(num_in: int, num_out: int) -> int:
    return num_in * num_out + num_out


def norm(width: int) -> int:
    return 2 * width


def test_stable_diffusion_has_the_published_counts():
    with torch.device("meta"):
        assert count(build_unet(SD15_UNET)) == stated(859_520_964)
        assert count(build_vae(SD15_VAE)) == stated(83_653_863)
        assert count(build_text_model(SD15_TEXT)) == stated(123_060_480)


def test_image_tower_is_vit_l_14_without_its_last_layer():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width, inner, patches = 1024, 4096, 16 * 16 + 1
    layer = 4 * linear(width, width) + 2 * norm(width) + linear(width, inner) + linear(inner, width)
    stem = width + 3 * 14 * 14 * width + patches * width + norm(width)  # class token, patches (no bias), positions
    assert stated(layer) == 12_596_224
    with torch.device("meta"):
        whole = CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_L_14))
        assert count(whole) == stem + 24 * layer + norm(width) == stated(303_179_776)  # the published tower
        # no post-norm: ln_vision stands there
        assert count(ImageEncoder(whole)) == stem + 23 * layer == stated(290_581_504)
        assert count(ImageEncoder.from_config(**CLIP_VIT_L_14)) == 290_581_504


@pytest.mark.parametrize(("frequency", "expected"), [(1, 199_300_923), (2, 182_758_203)])
def test_qformer_is_bert_base_with_queries_and_cross_attention(frequency, expected):
    width, inner, image_width, num_layers = 768, 3072, 1024, 12
    vocabulary, positions, queries = 30523, 512, 16
    self_attention = 4 * linear(width, width) + norm(width)
    cross_attention = 2 * linear(width, width) + 2 * linear(image_width, width) + norm(width)
    feed_forward = linear(width, inner) + linear(inner, width) + norm(width)
    layers = num_layers * (self_attention + 2 * feed_forward) + (num_layers // frequency) * cross_attention
    embeddings = (vocabulary + positions) * width + norm(width)
    head = linear(width, width) + norm(width) + vocabulary  # its matrix is the word embedding
    total = queries * width + embeddings + layers + norm(image_width) + head
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(**(QFORMER_BASE | {"cross_attention_freq": frequency})))
    assert count(qformer) == total == stated(expected)


def test_the_full_size_configuration_has_these_sizes():
    settings = OmegaConf.load(ROOT / "configs" / "model" / "sd15.yaml")
    sizes = {name: value for name, value in settings.qformer.items() if name not in ("init", "dropout")}
    # the vocabulary is the tokenizer's, the image width the tower's
    assert sizes == {name: QFORMER_BASE[name] for name in sizes}
    assert set(QFORMER_BASE) - set(sizes) == {"vocab_size", "image_width"}
    assert QFORMER_BASE["image_width"] == CLIP_VIT_L_14["hidden_size"]
    assert (settings.embed_dim, settings.skip_last_layers) == (256, 1)
    assert "clip-vit-large-patch14" in settings.clip
    assert "stable-diffusion-v1-5" in settings.stable_diffusion


def test_heads_and_projection():
    with torch.device("meta"):
        assert count(AlignmentHeads(768, 256)) == 2 * linear(768, 256) + linear(768, 2) + 1 == stated(395_267)
        assert count(SubjectProjection(768)) == linear(768, 3072) + linear(3072, 768) + norm(768) == stated(4_723_968)


def available_memory() -> int:
    """Bytes that a new process can use, 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def run_alone(body: str, *, needs: int) -> tuple[float, int]:
    """Loss and peak memory in bytes of ``body`` in a process of its own; the test is skipped where memory is short."""
    if available_memory() < needs:
        pytest.skip(f"needs {needs / GIB:.0f} GiB of free memory, there are {available_memory() / GIB:.1f}")
    script = (
        "import resource, torch\n"
        + body
        + ("\nprint('RESULT', float(loss), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
    )
    repository = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")]),
        "OMP_NUM_THREADS": str(os.cpu_count()),  # alone in its process, unlike the other tests
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, loss, peak = done.stdout.strip().splitlines()[-1].split()
    return float(loss), int(peak)


STAGE_1 = """
from tiny_models import GENERATE
from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer
from blipdiff_train.models.alignment import AlignmentHeads
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.presets import CLIP_VIT_L_14, QFORMER_BASE
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.stages.stage1 import Stage1Module

torch.manual_seed(0)
module = Stage1Module(
    ImageEncoder.from_config(**CLIP_VIT_L_14),
    QFormer(QFormerConfig(**QFORMER_BASE)),
    AlignmentHeads(768, 256),
    load_bert_tokenizer(GENERATE / "bert_tokenizer"),
    total_steps=10,
).train()
configured = module.configure_optimizers()
optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
ids, mask = module.tokenize(["a dog on the beach", "an old wooden toy train near the house"])
image_embeds = module.image_encoder(torch.randn(2, 3, 224, 224))
assert image_embeds.shape == (2, 257, 1024)
outputs = module(image_embeds, ids, mask, generator=torch.Generator().manual_seed(0))
loss = sum(outputs.losses.values())
loss.backward()
for name, parameter in module.named_parameters():
    assert (parameter.grad is not None) == (not name.startswith("image_encoder.")), name
optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_step_of_stage_1_at_full_size():
    """Batch 2, 224 px, fp32, AdamW: well within 24 GiB."""
    loss, peak = run_alone(STAGE_1, needs=8 * GIB)
    print(f"stage 1 at full size: loss {loss:.3f}, peak {peak / GIB:.2f} GiB")
    assert 0 < loss < 30  # about ln 2 + 0.64 + ln 30523 = 11.7 at the start
    assert peak < 24 * GIB


STAGE_2 = """
from tiny_models import GENERATE, tiny_batch
from blipdiff_train.checkpoints.tokenizers import load_bert_tokenizer, load_clip_tokenizer
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.image_encoder import ImageEncoder
from blipdiff_train.models.parts import ModelParts
from blipdiff_train.models import presets
from blipdiff_train.models.qformer import QFormer, QFormerConfig
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder
from blipdiff_train.stages.stage2 import Stage2Module

torch.manual_seed(0)
tokenizer = load_clip_tokenizer(GENERATE / "pipeline" / "tokenizer")
parts = ModelParts(
    image_encoder=ImageEncoder.from_config(**presets.CLIP_VIT_L_14),
    qformer=QFormer(QFormerConfig(**presets.QFORMER_BASE)),
    qformer_tokenizer=load_bert_tokenizer(GENERATE / "bert_tokenizer"),
    projection=SubjectProjection(768),
    text_encoder=TextEncoder(presets.build_text_model(presets.SD15_TEXT), tokenizer),
    denoiser=Denoiser(
        presets.build_vae(presets.SD15_VAE), presets.build_unet(presets.SD15_UNET), presets.build_noise_scheduler({})
    ),
)
module = Stage2Module(parts, template="release", total_steps=10, lr=2e-6, seed=0, gradient_checkpointing=True).train()
batch = tiny_batch(
    1,
    subject_image=torch.randn(1, 3, 224, 224),
    target_image=None,
    latent_moments=torch.randn(1, 8, 64, 64),  # 512 px
)
loss = module.noise_loss(batch)
loss.backward()
for name, parameter in module.named_parameters():
    assert (parameter.grad is not None) <= parameter.requires_grad, name
assert module.parts.qformer.query_tokens.grad.abs().sum() > 0
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_forward_and_backward_of_stage_2_at_full_size():
    """One sample of 512 px (as latents), fp32, gradients of everything that trains."""
    loss, peak = run_alone(STAGE_2, needs=14 * GIB)
    print(f"stage 2 at full size: loss {loss:.3f}, peak {peak / GIB:.2f} GiB")
    assert 0 < loss < 10
    assert peak < 24 * GIB
