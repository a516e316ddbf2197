"""CLIP's towers and BERT: every naming in use, the same numbers as the library, misfits named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, CLIPConfig, CLIPModel

from blipdiff_train.checkpoints.transformers import load_bert_into_qformer, load_clip_text, load_clip_vision
from blipdiff_train.models.qformer import QFormer, QFormerConfig

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 49,
}


@pytest.fixture
def clip():
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def write(folder, tensors, config, *, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


def whole(clip):
    return clip.state_dict(), {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "vision_config": VISION,
        "text_config": TEXT,
    }


def old_tower(clip):
    """A vision tower as transformers below 5 saved it, with the constant buffer of transformers below 4.31."""
    tensors = {name: t for name, t in clip.state_dict().items() if name.startswith("vision_model.")}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return tensors, {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **VISION}


def flat_tower(clip):
    tensors = {name.removeprefix("vision_model."): t for name, t in old_tower(clip)[0].items()}
    tensors.pop("embeddings.position_ids")
    return tensors, {"model_type": "clip_vision_model", **VISION}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"])
@pytest.mark.parametrize("form", [whole, old_tower, flat_tower])
def test_image_tower_gives_the_second_to_last_hidden_state(clip, tmp_path, form, name):
    encoder = load_clip_vision(write(tmp_path / "clip", *form(clip), name=name))
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = clip.vision_model(images, output_hidden_states=True).hidden_states[-2]
    assert encoder.num_layers == 2
    assert (encoder.width, encoder.image_size, encoder.num_patches) == (16, 28, 5)
    assert encoder.embeddings.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(encoder(images), expected, rtol=0, atol=1e-6)


def test_half_precision_files_become_fp32(clip, tmp_path):
    tensors, config = old_tower(clip)
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    encoder = load_clip_vision(write(tmp_path / "half", half, config), skip_last_layers=0)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder.num_layers == 3


def test_text_tower_in_both_forms(clip, tmp_path):
    config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **TEXT}
    old = {name: t for name, t in clip.state_dict().items() if name.startswith("text_model.")}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    flat = {name.removeprefix("text_model."): t for name, t in old.items() if not name.endswith("position_ids")}
    ids = torch.tensor([[48, 3, 4, 49]])
    with torch.no_grad():
        expected = clip.text_model(ids).last_hidden_state
        for name, tensors in (("old", old), ("flat", flat)):
            model = load_clip_text(write(tmp_path / name, tensors, config)).eval()
            assert torch.equal(model(ids).last_hidden_state, expected)
        model = load_clip_text(write(tmp_path / "clip", *whole(clip)))
        assert torch.equal(model(ids).last_hidden_state, expected)


def test_the_layers_left_out_are_checked_too(clip, tmp_path):
    tensors, config = old_tower(clip)
    tensors.pop("vision_model.encoder.layers.2.mlp.fc1.bias")
    tensors.pop("vision_model.post_layernorm.weight")
    folder = write(tmp_path / "clip", tensors, config)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*missing keys: .*2\.mlp\.fc1\.bias, .*post_layer"):
        load_clip_vision(folder)


def test_a_tower_of_another_size_or_kind_is_refused(clip, tmp_path):
    tensors, config = old_tower(clip)
    with pytest.raises(ValueError, match=r"patch_embedding\.weight has shape .*14, 14\), expected .* 7, 7\)"):
        load_clip_vision(write(tmp_path / "a", tensors, config | {"patch_size": 7}))
    with pytest.raises(ValueError, match="class 'SiglipVisionModel' is not one of"):
        load_clip_vision(write(tmp_path / "b", tensors, config | {"architectures": ["SiglipVisionModel"]}))
    with pytest.raises(ValueError, match="model_type is 'clip_text_model'"):
        load_clip_vision(write(tmp_path / "c", tensors, {"model_type": "clip_text_model"}))
    with pytest.raises(ValueError, match=r"unknown keys: surplus"):
        load_clip_vision(write(tmp_path / "d", tensors | {"surplus": torch.zeros(1)}, config))


BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 10,
}
QFORMER = BERT | {"vocab_size": 41, "num_query_tokens": 3, "image_width": 12, "dropout": 0.0}


@pytest.fixture
def bert():
    torch.manual_seed(1)
    model = BertForPreTraining(BertConfig(**BERT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former has no segments
    return model


def published(bert):
    """The names in bert-base-uncased's own file."""
    tensors = {}
    for name, tensor in bert.state_dict().items():
        for new, old in ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")):
            name = name.replace(new, old)
        tensors[name] = tensor
    tensors["bert.embeddings.position_ids"] = torch.arange(10)[None]
    tensors.pop("cls.predictions.decoder.bias", None)
    return tensors, {"architectures": ["BertForMaskedLM"], "model_type": "bert", **BERT}


def bare(bert):
    """A BertModel's file: no prefix, no prediction head."""
    return bert.bert.state_dict(), {"architectures": ["BertModel"], "model_type": "bert", **BERT}


@pytest.mark.parametrize("form", [published, bare])
def test_bert_in_the_qformer_reads_text_as_bert_does(bert, tmp_path, form):
    torch.manual_seed(2)
    qformer = QFormer(QFormerConfig(**QFORMER)).eval()
    fresh = {name: tensor.clone() for name, tensor in qformer.state_dict().items()}
    load_bert_into_qformer(qformer, write(tmp_path / "bert", *form(bert)))
    ids = torch.tensor([[2, 7, 9, 3, 0], [2, 5, 3, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = bert.bert(ids, attention_mask=mask).last_hidden_state
        found = qformer.text_pass(ids, mask, pad_outputs=True)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-6)

    state = qformer.state_dict()
    for name, tensor in state.items():
        if "_query" in name and "query_tokens" not in name:
            assert torch.equal(tensor, state[name.replace("_query", "")]), name  # copies of the text's
        if "crossattention" in name or name.startswith(("query_tokens", "ln_vision")):
            assert torch.equal(tensor, fresh[name]), name  # new
    words = state["embeddings.word_embeddings.weight"]
    assert torch.equal(words[:40], bert.bert.embeddings.word_embeddings.weight)
    assert torch.equal(words[40], fresh["embeddings.word_embeddings.weight"][40])  # [DEC]
    if form is published:
        with torch.no_grad():
            scores = bert.cls.predictions(bert.bert(ids, attention_mask=mask).last_hidden_state)
            torch.testing.assert_close(qformer.lm_logits(found)[..., :40], scores, rtol=0, atol=1e-5)
    else:
        assert torch.equal(state["lm_head.dense.weight"], fresh["lm_head.dense.weight"])


def test_bert_of_other_sizes_is_refused(bert, tmp_path):
    folder = write(tmp_path / "bert", *published(bert))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \(40, 16\), expected \(50, 16\)"):
        load_bert_into_qformer(QFormer(QFormerConfig(**(QFORMER | {"vocab_size": 50}))), folder)
    with pytest.raises(ValueError, match=r"unknown keys: bert\.encoder\.layer\.1"):
        load_bert_into_qformer(QFormer(QFormerConfig(**(QFORMER | {"num_hidden_layers": 1}))), folder)
    with pytest.raises(ValueError, match=r"num_attention_heads is 2, the Q-Former's is 4"):
        load_bert_into_qformer(QFormer(QFormerConfig(**(QFORMER | {"num_attention_heads": 4}))), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    with pytest.raises(ValueError, match=r"decoder\.weight differs from the tensor it is tied to"):
        load_bert_into_qformer(QFormer(QFormerConfig(**QFORMER)), write(tmp_path / "b", tensors, BERT))
