"""LAVIS's formats against the recorded key map, and there and back bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_parts

from blipdiff_train.checkpoints import diffusers as layout
from blipdiff_train.checkpoints import lavis
from blipdiff_train.checkpoints.keys import to_theirs
from blipdiff_train.checkpoints.tables import diffusers_qformer, lavis_qformer, lavis_tower
from blipdiff_train.models.alignment import AlignmentHeads

SIZES = lavis.Sizes(qformer_heads=4, tower_heads=3)


@pytest.fixture
def golden(goldens):
    return goldens / "qformer_diffusers" / "qformer"


@pytest.fixture
def stage1(golden):
    """A LAVIS state dict with its CLIP tower, as a stage-1 file holds it."""
    weights = load_file(golden / "weights_lavis.safetensors")
    return {name.removeprefix("blip."): tensor for name, tensor in weights.items() if name.startswith("blip.")}


def save(tmp_path, tensors, *, nested=True):
    torch.save({"model": tensors, "epoch": 3} if nested else tensors, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def test_the_tables_are_the_recorded_key_map(golden, tmp_path, stage1):
    """Three libraries' names for one tensor, recorded when their numbers were compared."""
    weights = lavis.read_stage1(save(tmp_path, stage1), sizes=SIZES)
    theirs = {}
    for r in lavis_qformer(weights.qformer.config) + lavis_tower(weights.image_encoder.num_layers):
        if not r.alias:
            theirs[r.ours] = r.theirs
    pairs = {
        (f"blip.{theirs[r.ours]}", r.theirs)
        for r in diffusers_qformer(weights.qformer.config, weights.image_encoder.num_layers)
        if r.ours in theirs
    }
    recorded = {
        (entry["lavis"], entry["diffusers"])
        for entry in json.loads((golden / "keymap.json").read_text())
        if entry["lavis"] and entry["diffusers"]
    }
    # the projection has one name in both, and position_ids is a constant
    recorded = {p for p in recorded if "proj_layer" not in p[0] and "position_ids" not in p[0]}
    assert pairs == recorded


def test_lavis_to_diffusers_is_the_references_own_conversion(golden, tmp_path, stage1):
    weights = lavis.read_stage1(save(tmp_path, stage1), sizes=SIZES)
    expected = load_file(golden / "model.safetensors")
    modules = {"qformer": weights.qformer, "tower": weights.image_encoder}
    rows = [
        r
        for r in diffusers_qformer(weights.qformer.config, weights.image_encoder.num_layers)
        if not r.theirs.startswith("proj_layer.")
    ]
    tensors = {n: t for n, t in lavis.part_tensors(modules).items() if not n.startswith("qformer.lm_head.")}
    found = to_theirs(tensors, rows)
    same(found, {n: t for n, t in expected.items() if n in found})
    assert set(expected) - set(found) <= {n for n in expected if n.startswith("proj_layer.")} | {
        "embeddings.position_ids"
    }


@pytest.mark.parametrize("case", ["freq1", "freq2"])
def test_stage1_files_without_a_tower_in_and_out(goldens, tmp_path, case):
    expected = load_file(goldens / "stage1_single" / case / "weights.safetensors")
    config = json.loads((goldens / "stage1_single" / case / "case.json").read_text())["config"]
    sizes = lavis.Sizes(qformer_heads=config["num_attention_heads"])
    weights = lavis.read_stage1(save(tmp_path, expected), sizes=sizes)
    assert weights.image_encoder is None
    assert weights.qformer.config.cross_attention_freq == config["cross_attention_freq"]
    assert weights.qformer.config.num_query_tokens == config["num_query_token"]
    parts = tiny_parts()
    parts.qformer, parts.alignment_heads = weights.qformer, weights.alignment_heads
    found = lavis.stage1_tensors(parts)
    same({n: t for n, t in found.items() if not n.startswith("visual_encoder.")}, expected)


@pytest.mark.parametrize("nested", [True, False])
def test_stage1_file_with_a_tower_in_and_out(tmp_path, stage1, goldens, nested):
    parts = lavis.load_stage1(
        save(tmp_path, stage1, nested=nested), sizes=SIZES, bert_tokenizer=goldens / "generate" / "bert_tokenizer"
    )
    lavis.save_stage1(tmp_path / "again.pth", parts)
    same(torch.load(tmp_path / "again.pth", weights_only=True)["model"], stage1)
    assert parts.image_size == 56
    assert parts.image_encoder.config.hidden_act == "quick_gelu"


def test_the_older_name_of_the_qformer(tmp_path, stage1):
    old = {name.replace("Qformer.", "text_model."): tensor for name, tensor in stage1.items()}
    assert old.keys() != stage1.keys()
    weights = lavis.read_stage1(save(tmp_path, old), sizes=SIZES)
    assert torch.equal(weights.qformer.query_tokens, stage1["query_tokens"])


def test_half_precision_comes_in_as_fp32(tmp_path, stage1):
    half = {n: t.half() if t.is_floating_point() else t for n, t in stage1.items()}
    weights = lavis.read_stage1(save(tmp_path, half), sizes=SIZES)
    assert {p.dtype for p in weights.qformer.parameters()} == {torch.float32}


def test_an_eva_tower_is_refused_or_left_out_on_request(tmp_path, stage1):
    """BLIP-2's own files (ViT-g): EVA names, image tokens of another width."""
    tensors = {n: t for n, t in stage1.items() if not n.startswith("visual_encoder.")}
    tensors |= {f"visual_encoder.{name}": torch.zeros(2) for name in ("cls_token", "pos_embed")}
    tensors |= {f"visual_encoder.patch_embed.proj.{leaf}": torch.zeros(2) for leaf in ("weight", "bias")}
    for block in ("visual_encoder.blocks.0", "visual_encoder.blocks.1"):
        names = ["attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
        modules = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        names += [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
        tensors |= {f"{block}.{name}": torch.zeros(2) for name in names}
    file = save(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"checkpoint\.pth: its image tower is EVA-CLIP ViT-g .* skip_eva_tower=True"):
        lavis.read_stage1(file, sizes=SIZES)
    weights = lavis.read_stage1(file, sizes=SIZES, skip_eva_tower=True)
    assert weights.image_encoder is None
    assert torch.equal(weights.qformer.ln_vision.weight, stage1["ln_vision.weight"])
    # what is left out is checked by name all the same
    tensors["visual_encoder.blocks.1.gamma_1"] = tensors.pop("visual_encoder.blocks.1.norm2.bias")
    message = r"missing keys: visual_encoder\.blocks\.1\.norm2\.bias; unknown keys: visual_encoder\.blocks\.1\.gamma_1"
    with pytest.raises(ValueError, match=message):
        lavis.read_stage1(save(tmp_path, tensors), sizes=SIZES, skip_eva_tower=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ln_vision.bias"), r"missing keys: ln_vision\.bias"),
        (lambda t: t.pop("visual_encoder.ln_pre.bias"), r"missing keys: visual_encoder\.ln_pre\.bias"),
        (lambda t: t.pop("temp"), "missing keys: temp"),
        (lambda t: t.pop("vision_proj.weight"), r"missing keys: vision_proj\.weight"),
        (lambda t: t.pop("query_tokens"), "missing keys: query_tokens"),
        (lambda t: t.update({"opt_model.x": torch.zeros(1)}), r"unknown keys: opt_model\.x"),
        (lambda t: t.update(temp=torch.zeros(2)), r"temp has shape \(2,\), expected \(\)"),
        (
            lambda t: t.update({"Qformer.cls.predictions.decoder.bias": torch.zeros(99)}),
            r"decoder\.bias differs from the tensor it is tied to",
        ),
    ],
)
def test_misfits_name_file_and_key(tmp_path, stage1, change, message):
    change(stage1)
    with pytest.raises(ValueError, match=rf"checkpoint\.pth: .*{message}"):
        lavis.read_stage1(save(tmp_path, stage1), sizes=SIZES)


def test_heads_that_do_not_divide_the_width_are_explained(tmp_path, stage1):
    with pytest.raises(ValueError, match=r"a Q-Former 32 wide cannot have 0 attention heads; give their number"):
        lavis.read_stage1(save(tmp_path, stage1))


def test_a_tower_of_another_width_is_refused(tmp_path, stage1, goldens):
    from test_transformers_weights import VISION, write
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    clip = write(tmp_path / "clip", tower.state_dict(), {"model_type": "clip_vision_model", **VISION})
    tensors = {n: t for n, t in stage1.items() if not n.startswith("visual_encoder.")}
    with pytest.raises(ValueError, match=r"reads image tokens of width 24, the tower of .* makes 16"):
        lavis.load_stage1(save(tmp_path, tensors), sizes=SIZES, image_encoder=clip)


@pytest.fixture
def complete():
    parts = tiny_parts()
    parts.alignment_heads = AlignmentHeads(32, 8, temperature=0.05)
    return parts


def test_a_folder_of_ours_out_and_in_is_bit_exact(tmp_path, complete):
    width, num_queries = complete.qformer.config.hidden_size, complete.qformer.config.num_query_tokens
    complete.subject_embeds = torch.randn(num_queries, width)
    lavis.save_folder(tmp_path / "a", complete)
    assert torch.equal(lavis.read_subject_cache(tmp_path / "a"), complete.subject_embeds[None])
    parts = lavis.load_folder(tmp_path / "a")
    assert torch.equal(parts.subject_embeds, complete.subject_embeds)
    for name in ("image_encoder", "qformer", "alignment_heads", "projection", "text_encoder", "denoiser"):
        same(getattr(parts, name).state_dict(), getattr(complete, name).state_dict())
    assert parts.qformer.config == layout.QFormerConfig(**{**vars(complete.qformer.config), "dropout": 0.1})
    lavis.save_folder(tmp_path / "b", parts)
    parts.subject_embeds = None
    lavis.save_folder(tmp_path / "c", parts)
    for name in ("blip_model/blip_weight.pt", "proj_layer/proj_weight.pt", "text_encoder/pytorch_model.bin"):
        same(*(torch.load(tmp_path / folder / name, weights_only=True) for folder in "ab"))
    for name in ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"):
        same(*(torch.load(tmp_path / folder / name, weights_only=True) for folder in "ab"))
    assert torch.equal(lavis.read_subject_cache(tmp_path / "b"), complete.subject_embeds[None])
    assert lavis.read_subject_cache(tmp_path / "c") is None
    torch.save(torch.zeros(1, num_queries + 1, width), tmp_path / "b" / lavis.CACHE_FILE)
    with pytest.raises(ValueError, match=r"ctx_embeddings_cache\.pt: has shape \(1, \d+, \d+\), expected \(1, "):
        lavis.load_folder(tmp_path / "b")


def test_a_folder_as_lavis_has_it_takes_the_rest_from_stable_diffusion(tmp_path, complete, goldens):
    """Weights only: no configurations, tokenizers or schedule."""
    lavis.save_folder(tmp_path / "lavis", complete)
    layout.save(tmp_path / "sd", complete)
    for file in list((tmp_path / "lavis").rglob("*.json")):
        file.unlink()
    for name in ("tokenizer", "qformer_tokenizer", "scheduler"):
        shutil.rmtree(tmp_path / "lavis" / name)
    parts = lavis.load_folder(
        tmp_path / "lavis",
        stable_diffusion=tmp_path / "sd",
        bert_tokenizer=goldens / "generate" / "bert_tokenizer",
        sizes=lavis.Sizes(qformer_heads=4, tower_heads=2),
    )
    for name in ("image_encoder", "qformer", "alignment_heads", "projection", "text_encoder", "denoiser"):
        same(getattr(parts, name).state_dict(), getattr(complete, name).state_dict())


def test_a_model_without_heads_goes_out_and_in_without_them(tmp_path):
    parts = tiny_parts()
    lavis.save_folder(tmp_path, parts)
    again = lavis.load_folder(tmp_path)
    assert again.alignment_heads is None
    same(again.projection.state_dict(), parts.projection.state_dict())
    with pytest.raises(ValueError, match="needs alignment_heads"):
        lavis.save_stage1(tmp_path / "x.pth", parts)


def test_part_of_the_heads_is_not_their_absence(tmp_path, complete):
    lavis.save_folder(tmp_path, complete)
    file = tmp_path / "blip_model" / "blip_weight.pt"
    tensors = torch.load(file, weights_only=True)
    tensors.pop("itm_head.bias")
    torch.save(tensors, file)
    with pytest.raises(ValueError, match=r"blip_weight\.pt: .*missing keys: itm_head\.bias"):
        lavis.load_folder(tmp_path)


def test_a_folder_that_lacks_a_part_says_which(tmp_path, complete):
    with pytest.raises(ValueError, match="no such folder"):
        lavis.load_folder(tmp_path / "nowhere")
    lavis.save_folder(tmp_path, complete)
    (tmp_path / "proj_layer" / "proj_weight.pt").unlink()
    with pytest.raises(ValueError, match=r"proj_layer: has none of proj_weight\.pt"):
        lavis.load_folder(tmp_path)


def test_a_subject_cache_of_another_kind_is_refused(tmp_path):
    (tmp_path / "ctx_embeddings_cache").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / lavis.CACHE_FILE)
    with pytest.raises(ValueError, match=r"ctx_embeddings_cache\.pt: holds <class 'dict'>|holds dict"):
        lavis.read_subject_cache(tmp_path)
    torch.save(torch.nn.Parameter(torch.ones(1, 4, 8)), tmp_path / lavis.CACHE_FILE)
    assert lavis.read_subject_cache(tmp_path).shape == (1, 4, 8)
