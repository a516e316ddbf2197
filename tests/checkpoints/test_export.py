"""The export command's engine: every format opens again with the same weights."""

import pytest
import torch
from test_model_folder import complete, same_parts, stage1  # noqa: F401

from blipdiff_train.checkpoints import diffusers as layout
from blipdiff_train.checkpoints import lavis
from blipdiff_train.checkpoints.export import export
from blipdiff_train.checkpoints.model_folder import load_model_folder, save_model_folder
from blipdiff_train.checkpoints.sources import find_model, load_parts
from blipdiff_train.models.parts import ModelParts


@pytest.fixture
def run(complete: ModelParts, tmp_path):  # noqa: F811
    complete.image_mean = ModelParts.image_mean  # LAVIS has no place for it
    save_model_folder(tmp_path / "run" / "model", complete, {"template": "release"})
    return tmp_path / "run"


@pytest.mark.parametrize("source", ["run", "run/model"])
def test_diffusers_opens_again(run, tmp_path, source):
    written = export(tmp_path / source, "diffusers", tmp_path / "out")
    expected = load_model_folder(run / "model")
    expected.alignment_heads = None
    again = layout.load(written)
    expected.qformer.lm_head = again.qformer.lm_head  # the layout has no place for it
    same_parts(expected, again)
    assert not (written / "blipdiff_train.json").exists()
    assert not (written / "alignment_heads").exists()


def test_half_precision(run, tmp_path):
    export(run, "diffusers", tmp_path / "out", dtype=torch.float16)
    full = sum(file.stat().st_size for file in (run / "model").rglob("*.safetensors"))
    half = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert half < 0.6 * full


def test_lavis_opens_again(run, tmp_path):
    again = lavis.load_folder(export(run, "lavis", tmp_path / "out"))
    expected = load_model_folder(run / "model")
    assert again.qformer.config.num_attention_heads == expected.qformer.config.num_attention_heads
    again.qformer.config = expected.qformer.config  # LAVIS has no place for the dropout
    same_parts(expected, again)


def test_a_fine_tuned_subject_travels_in_lavis_and_its_loss_is_said(run, tmp_path, recwarn):
    parts = load_model_folder(run / "model")
    parts.subject_embeds = torch.randn(parts.qformer.config.num_query_tokens, parts.qformer.config.hidden_size)
    lavis.save_folder(tmp_path / "tuned", parts)
    again = lavis.load_folder(export(tmp_path / "tuned", "lavis", tmp_path / "out"))
    assert torch.equal(again.subject_embeds, parts.subject_embeds)
    assert not [w for w in recwarn if "subject embeddings" in str(w.message)]
    with pytest.warns(UserWarning, match="tuned: its fine-tuned subject embeddings have no place in diffusers' layout"):
        export(tmp_path / "tuned", "diffusers", tmp_path / "there")


def test_stage_1_is_one_file_in_lavis(stage1, tmp_path):  # noqa: F811
    save_model_folder(tmp_path / "model", stage1)
    with pytest.raises(ValueError, match=r"ending in \.pth"):
        export(tmp_path / "model", "lavis", tmp_path / "out")
    with pytest.raises(ValueError, match="diffusers has no pipeline for; use format=lavis"):
        export(tmp_path / "model", "diffusers", tmp_path / "out")
    file = export(tmp_path / "model", "lavis", tmp_path / "out.pth")
    weights = lavis.read_stage1(file, sizes=lavis.Sizes(qformer_heads=4, tower_heads=2))
    for expected, found in (
        (stage1.qformer, weights.qformer),
        (stage1.alignment_heads, weights.alignment_heads),
        (stage1.image_encoder, weights.image_encoder),
    ):
        assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_what_cannot_be_is_explained(run, tmp_path):
    with pytest.raises(ValueError, match="format='onnx' is unknown; choose one of diffusers, lavis"):
        export(run, "onnx", tmp_path / "out")
    with pytest.raises(ValueError, match="is a model folder"):
        export(tmp_path, "lavis", tmp_path / "out")
    with pytest.raises(ValueError, match="is the model itself"):
        export(run, "diffusers", run / "model")
    with pytest.raises(ValueError, match="stores fp32 only"):
        export(run, "lavis", tmp_path / "out", dtype=torch.float16)


def test_an_export_may_be_repeated(run, tmp_path):
    for format in ("diffusers", "lavis"):
        export(run, format, tmp_path / format)
        export(run, format, tmp_path / format)


def test_formats_convert_into_each_other(run, tmp_path):
    """LAVIS → diffusers gives the files that the model itself gives."""
    lavis_folder = export(run, "lavis", tmp_path / "lavis")
    direct, round_about = export(run, "diffusers", tmp_path / "a"), export(lavis_folder, "diffusers", tmp_path / "b")
    for name in ("qformer/model", "text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        assert (direct / f"{name}.safetensors").read_bytes() == (round_about / f"{name}.safetensors").read_bytes(), name


def test_every_source_is_told_apart(run, stage1, tmp_path, goldens):  # noqa: F811
    lavis_folder = export(run, "lavis", tmp_path / "lavis")
    diffusers_folder = export(run, "diffusers", tmp_path / "diffusers")
    save_model_folder(tmp_path / "one", stage1)
    file = export(tmp_path / "one", "lavis", tmp_path / "stage1.pth")
    vocabulary = goldens / "generate" / "bert_tokenizer"
    sizes = lavis.Sizes(qformer_heads=4, tower_heads=2)
    for source in (run, run / "model", lavis_folder, diffusers_folder, tmp_path / "one"):
        assert torch.equal(load_parts(source).qformer.query_tokens, stage1.qformer.query_tokens)
    parts = load_parts(file, bert_tokenizer=vocabulary, sizes=sizes)
    assert torch.equal(parts.qformer.query_tokens, stage1.qformer.query_tokens)
    assert find_model("Salesforce/blipdiffusion") == "Salesforce/blipdiffusion"
    for nothing in (tmp_path, tmp_path / "absent", tmp_path / "absent.pth"):
        with pytest.raises(ValueError, match="is a model folder"):
            load_parts(nothing)
