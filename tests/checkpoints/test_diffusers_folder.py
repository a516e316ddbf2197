"""diffusers' folders: BLIP-Diffusion in and out bit for bit, Stable Diffusion in both its generations."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_denoiser, tiny_parts, tiny_text_encoder

from blipdiff_train.checkpoints import diffusers as layout
from blipdiff_train.checkpoints.safety import read_tensors

WEIGHTS = (
    "qformer/model.safetensors",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)


def same_tensors(left, right):
    left, right = read_tensors(left), read_tensors(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.fixture
def folder(goldens, tmp_path):
    """A copy of the reference's own folder, to be spoilt."""
    shutil.copytree(goldens / "generate" / "pipeline", tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def vocabulary(goldens):
    return goldens / "generate" / "bert_tokenizer"


def test_the_references_folder_in_and_out_is_bit_exact(goldens, vocabulary, tmp_path):
    source = goldens / "generate" / "pipeline"
    parts = layout.load(source, bert_tokenizer=vocabulary)
    layout.save(tmp_path, parts)
    for name in WEIGHTS:
        same_tensors(source / name, tmp_path / name)
    for name in ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json", "tokenizer/vocab.json"):
        theirs, ours = (json.loads((place / name).read_text()) for place in (source, tmp_path))
        assert {k: v for k, v in theirs.items() if k[0] != "_"} == {k: v for k, v in ours.items() if k[0] != "_"}
    theirs, ours = (json.loads((place / "model_index.json").read_text()) for place in (source, tmp_path))
    assert theirs | {"_diffusers_version": 0} == ours | {"_diffusers_version": 0}
    again = layout.load(tmp_path)  # its own vocabulary this time
    assert len(again.qformer_tokenizer) == 99
    assert again.metadata == {"subject_position": 2}


def test_a_model_of_ours_out_and_in_is_bit_exact(tmp_path):
    parts = tiny_parts()
    layout.save(tmp_path, parts)
    again = layout.load(tmp_path)
    for name in ("image_encoder", "qformer", "projection", "text_encoder", "denoiser"):
        expected, found = getattr(parts, name).state_dict(), getattr(again, name).state_dict()
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            if not key.startswith("lm_head."):  # the layout has no place for it
                assert torch.equal(tensor, found[key]), key
    assert again.qformer.config == parts.qformer.config
    assert again.alignment_heads is None
    assert again.image_size == parts.image_size


def test_what_is_stored_in_half_precision_comes_back_as_fp32(tmp_path):
    parts = tiny_parts()
    layout.save(tmp_path, parts, dtype=torch.float16)
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = layout.load(tmp_path)
    assert torch.equal(again.denoiser.unet.conv_in.weight, parts.denoiser.unet.conv_in.weight.half().float())


def test_loading_leaves_the_global_generator_alone_and_is_repeatable(folder, vocabulary):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = layout.load(folder, bert_tokenizer=vocabulary)
    assert torch.equal(
        first.qformer.lm_head.dense.weight, layout.load(folder, bert_tokenizer=vocabulary).qformer.lm_head.dense.weight
    )
    torch.manual_seed(3)
    layout.fresh_qformer(first.qformer.config)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("version", "eps"), [(None, 1e-5), ("4.31.0.dev0", 1e-5), ("4.33.2", 1e-5), ("4.34.0", 1e-6), ("5.0.0", 1e-6)]
)
def test_a_missing_vision_epsilon_is_the_default_of_its_writer(folder, vocabulary, version, eps):
    """transformers 4.33 left out 1e-5 because it was its default; since 4.34 the default is 1e-6."""
    file = folder / "qformer" / "config.json"
    config = json.loads(file.read_text()) | {"transformers_version": version}
    del config["vision_config"]["layer_norm_eps"]
    file.write_text(json.dumps(config))
    parts = layout.load(folder, bert_tokenizer=vocabulary)
    assert parts.image_encoder.pre_layrnorm.eps == eps
    assert parts.image_encoder.encoder.layers[0].layer_norm1.eps == eps
    assert parts.qformer.ln_vision.eps == eps


def test_the_image_norm_has_the_towers_epsilon(folder, vocabulary, tmp_path):
    """Both are one number in this layout; a model that has two cannot be written."""
    file = folder / "qformer" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-6
    file.write_text(json.dumps(config))
    parts = layout.load(folder, bert_tokenizer=vocabulary)
    assert parts.qformer.ln_vision.eps == parts.image_encoder.pre_layrnorm.eps == 1e-6
    layout.save(tmp_path / "again", parts)
    assert layout.load(tmp_path / "again").qformer.config.image_norm_eps == 1e-6
    parts.image_encoder.config.layer_norm_eps = 1e-5
    with pytest.raises(ValueError, match="have eps 1e-05, the Q-Former's image norm 1e-06"):
        layout.save(tmp_path / "no", parts)


def test_another_activation_of_the_qformer_is_refused(folder, vocabulary):
    file = folder / "qformer" / "config.json"
    config = json.loads(file.read_text())
    config["qformer_config"]["hidden_act"] = "relu"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"qformer/config\.json: qformer_config\.hidden_act is 'relu'"):
        layout.load(folder, bert_tokenizer=vocabulary)


def test_every_size_is_written_out(tmp_path):
    layout.save(tmp_path, tiny_parts())
    config = json.loads((tmp_path / "qformer" / "config.json").read_text())
    assert config["vision_config"]["layer_norm_eps"] == 1e-5
    assert set(layout.VISION_DEFAULTS) <= set(config["vision_config"])
    assert set(layout.QFORMER_DEFAULTS) <= set(config["qformer_config"])
    assert config["vision_config"]["num_hidden_layers"] == 2  # of three, the last is left out


def test_nothing_of_this_machine_is_written(tmp_path):
    layout.save(tmp_path / "x", tiny_parts())
    for file in (tmp_path / "x").rglob("*.json"):
        assert "_name_or_path" not in file.read_text()
        assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": ["diffusers", "EvilModel"]}, r"unet is .*EvilModel.*there UNet2DConditionModel"),
        ({"safety_checker": ["stable_diffusion", "Checker"]}, r"safety_checker is"),
        ({"_class_name": "StableDiffusionPipeline"}, r"class 'StableDiffusionPipeline' is not one of"),
        ({"auto_map": {"a": "b"}}, r"auto_map asks for code"),
    ],
)
def test_the_index_may_name_known_classes_only(folder, vocabulary, change, message):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"model_index\.json: {message}"):
        layout.load(folder, bert_tokenizer=vocabulary)


def spoil(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", WEIGHTS)
def test_misfits_name_file_and_key(folder, vocabulary, name):
    first = next(key for key in sorted(load_file(folder / name)) if not key.endswith("position_ids"))
    spoil(folder / name, lambda tensors: tensors.update(surplus=tensors.pop(first)))
    with pytest.raises(ValueError, match=rf"{name}: .*missing keys: {first}; unknown keys: surplus"):
        layout.load(folder, bert_tokenizer=vocabulary)


def test_part_of_a_part_is_not_the_absence_of_the_part(folder, vocabulary):
    spoil(folder / "qformer" / "model.safetensors", lambda tensors: tensors.pop("proj_layer.dense1.bias"))
    with pytest.raises(ValueError, match=r"missing keys: proj_layer\.dense1\.bias"):
        layout.load(folder, bert_tokenizer=vocabulary)


def test_sizes_that_do_not_belong_together_are_named(folder, vocabulary, goldens, tmp_path):
    file = folder / "image_processor" / "preprocessor_config.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | {"size": {"height": 224, "width": 224}}))
    with pytest.raises(ValueError, match=r"images of 224 px, the tower in .* reads 56 px"):
        layout.load(folder, bert_tokenizer=vocabulary)
    file.write_text(kept)
    (tmp_path / "vocab.txt").write_text((vocabulary / "vocab.txt").read_text() + "more\nwords\n")
    with pytest.raises(ValueError, match=r"tokenizer has 101 words, .* says vocab_size=99"):
        layout.load(folder, bert_tokenizer=tmp_path)


# Stable Diffusion


def save_stable_diffusion(folder, *, generation, suffix):
    """A Stable Diffusion folder as diffusers before 0.15 with transformers below 5 wrote it ("old"), or as today."""
    denoiser, text = tiny_denoiser(), tiny_text_encoder()
    text_tensors = text.model.state_dict()
    vae_tensors = denoiser.vae.state_dict()
    if generation == "old":
        text_tensors = {f"text_model.{name}": tensor for name, tensor in text_tensors.items()}
        text_tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        renamed = {}
        for name, tensor in vae_tensors.items():
            for old, new in layout.OLD_VAE_ATTENTION.items():
                if f"attentions.0.{new}." in name:
                    name = name.replace(f".{new}.", f".{old}.")
                    tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
            renamed[name] = tensor
        assert renamed.keys() != vae_tensors.keys()
        vae_tensors = renamed
    for name, tensors in (
        ("unet/diffusion_pytorch_model", denoiser.unet.state_dict()),
        ("vae/diffusion_pytorch_model", vae_tensors),
        ("text_encoder/" + ("pytorch_model" if suffix == "bin" else "model"), text_tensors),
    ):
        file = folder / f"{name}.{suffix}"
        file.parent.mkdir(parents=True)
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        if suffix == "bin":
            torch.save(tensors, file)
        else:
            save_file(tensors, file)
    for name, module in (("unet", denoiser.unet), ("vae", denoiser.vae)):
        (folder / name / "config.json").write_text(json.dumps(layout.diffusers_config_json(module)))
    config = layout.clip_text_config_json(text.model) | {"architectures": ["CLIPTextModel"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    layout.save_clip_tokenizer(text.tokenizer, folder / "tokenizer")
    layout.save_scheduler(folder / "scheduler", denoiser)
    return denoiser, text


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("generation", ["old", "new"])
def test_stable_diffusion_in_both_generations(tmp_path, generation, suffix):
    torch.manual_seed(0)
    denoiser, text = save_stable_diffusion(tmp_path, generation=generation, suffix=suffix)
    vae, unet, scheduler, text_model, tokenizer = layout.load_stable_diffusion(tmp_path)
    for expected, found in ((denoiser.vae, vae), (denoiser.unet, unet), (text.model, text_model)):
        state = found.state_dict()
        assert expected.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert vae.config.scaling_factor == 0.3
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert tokenizer("a dog").input_ids == text.tokenizer("a dog").input_ids
    ids = torch.tensor([tokenizer("a dog").input_ids])
    assert torch.equal(text_model.eval()(ids).last_hidden_state, text.model.eval()(ids).last_hidden_state)


def test_a_unet_spread_over_files(tmp_path):
    """As diffusers itself writes it with ``max_shard_size``."""
    denoiser = tiny_denoiser()
    denoiser.unet.save_pretrained(tmp_path / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    state = layout.load_unet(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser.unet.state_dict().items())


def test_another_kind_of_part_is_refused(tmp_path):
    save_stable_diffusion(tmp_path, generation="new", suffix="safetensors")
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "UNet3DConditionModel"}))
    with pytest.raises(ValueError, match=r"unet/config\.json: class 'UNet3DConditionModel' is not one of"):
        layout.load_unet(tmp_path)


def test_a_part_without_weights_says_what_was_looked_for(tmp_path):
    save_stable_diffusion(tmp_path, generation="new", suffix="safetensors")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vae: has none of diffusion_pytorch_model\.safetensors, .*config\.json"):
        layout.load_vae(tmp_path)
