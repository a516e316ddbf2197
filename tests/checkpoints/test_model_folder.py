"""The model folder: whole or absent, everything in it comes back, damage is named."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_denoiser, tiny_parts, tiny_text_encoder

from blipdiff_train.checkpoints import model_folder
from blipdiff_train.checkpoints.diffusers import StableDiffusion
from blipdiff_train.checkpoints.model_folder import add_generation, load_model_folder, replace_folder, save_model_folder
from blipdiff_train.models.alignment import AlignmentHeads

MODULES = ("image_encoder", "qformer", "alignment_heads", "projection", "text_encoder", "denoiser")


@pytest.fixture
def complete():
    return replace(
        tiny_parts(),
        alignment_heads=AlignmentHeads(32, 8, temperature=0.05),
        image_mean=(0.4, 0.5, 0.6),
        metadata={"a": 1},
    )


@pytest.fixture
def stage1(complete):
    return replace(complete, projection=None, text_encoder=None, denoiser=None)


def same_parts(left, right):
    for name in MODULES:
        expected, found = getattr(left, name), getattr(right, name)
        assert (expected is None) == (found is None), name
        if expected is not None:
            assert expected.state_dict().keys() == found.state_dict().keys()
            for key, tensor in expected.state_dict().items():
                assert torch.equal(tensor, found.state_dict()[key]), (name, key)
    assert left.qformer.config == right.qformer.config
    assert (left.image_size, left.image_mean, left.image_std) == (right.image_size, right.image_mean, right.image_std)


def test_a_complete_model_comes_back_bit_for_bit(complete, tmp_path):
    save_model_folder(tmp_path / "model", complete, {"template": "release", "steps": 7})
    again = load_model_folder(tmp_path / "model", verify=True)
    same_parts(complete, again)
    assert again.metadata == {"subject_position": 2, "a": 1, "template": "release", "steps": 7}
    assert again.qformer_tokenizer("a cat").input_ids == complete.qformer_tokenizer("a cat").input_ids
    assert not again.image_encoder.training
    assert not again.denoiser.vae.training


def test_a_model_of_stage_1_comes_back_and_has_no_pipeline(stage1, tmp_path):
    save_model_folder(tmp_path / "model", stage1)
    assert {child.name for child in (tmp_path / "model").iterdir()} == {
        "qformer", "qformer_tokenizer", "image_processor", "alignment_heads", "blipdiff_train.json",
    }  # fmt: skip
    same_parts(stage1, load_model_folder(tmp_path / "model"))


def test_stage_2_starts_from_stage_1(stage1, complete, tmp_path):
    save_model_folder(tmp_path / "one", stage1)
    denoiser, text = tiny_denoiser(), tiny_text_encoder()
    stable_diffusion = StableDiffusion(
        denoiser.vae, denoiser.unet, denoiser.make_scheduler(), text.model, text.tokenizer
    )
    parts = add_generation(load_model_folder(tmp_path / "one"), stable_diffusion)
    assert parts.projection.width == 32
    assert torch.equal(parts.qformer.query_tokens, complete.qformer.query_tokens)
    save_model_folder(tmp_path / "two", parts)
    same_parts(parts, load_model_folder(tmp_path / "two"))
    text.model.config.hidden_size = 48
    with pytest.raises(ValueError, match="the Q-Former is 32 wide, the text encoder 48"):
        add_generation(load_model_folder(tmp_path / "one"), stable_diffusion)


def test_a_model_without_heads_has_no_heads_file(complete, tmp_path):
    save_model_folder(tmp_path / "model", replace(complete, alignment_heads=None))
    assert not (tmp_path / "model" / "alignment_heads").exists()
    assert load_model_folder(tmp_path / "model").alignment_heads is None


def test_an_old_model_stays_when_writing_fails(complete, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_model_folder(target, complete, {"version": 1})
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="metadata is not plain data"):
        save_model_folder(target, complete, {"bad": object()})
    monkeypatch.setattr(model_folder, "sha256_file", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model_folder(target, complete, {"version": 2})
    assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_a_crash_between_the_two_renames_loses_nothing(complete, tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_model_folder(target, complete, {"version": 1})
    rename = model_folder.os.rename

    def crash(source, destination):
        if str(destination) == str(target):
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(model_folder.os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model_folder(target, complete, {"version": 2})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"a save was interrupted .*\.model\.previous, rename it back"):
        load_model_folder(target)
    (tmp_path / ".model.previous").rename(target)
    assert load_model_folder(target, verify=True).metadata["version"] == 1
    save_model_folder(target, complete, {"version": 2})
    assert load_model_folder(target).metadata["version"] == 2
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_other_peoples_folders_are_not_replaced(complete, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other things than a model"):
        save_model_folder(tmp_path, complete)
    with pytest.raises(ValueError, match="is a file"), replace_folder(tmp_path / "thesis.txt"):
        pass
    (tmp_path / "empty").mkdir()
    save_model_folder(tmp_path / "empty", complete)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_damage_is_found_by_checksum(complete, tmp_path):
    save_model_folder(tmp_path / "model", complete)
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    load_model_folder(tmp_path / "model")  # a flipped bit is a valid number
    with pytest.raises(ValueError, match=r"damaged or changed .*: unet/diffusion_pytorch_model\.safetensors"):
        load_model_folder(tmp_path / "model", verify=True)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: is not a whole safetensors file"):
        load_model_folder(tmp_path / "model")


def test_checksums_cannot_point_outside(complete, tmp_path):
    save_model_folder(tmp_path / "model", complete)
    file = tmp_path / "model" / "blipdiff_train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": {"../../secret": "0"}}))
    with pytest.raises(ValueError, match="points outside the folder"):
        load_model_folder(tmp_path / "model", verify=True)


def test_unknown_formats_and_missing_keys_are_named(complete, tmp_path):
    save_model_folder(tmp_path / "model", complete)
    file = tmp_path / "model" / "blipdiff_train.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99 is not known"):
        load_model_folder(tmp_path / "model")
    file.write_text(text)
    from safetensors.torch import load_file, save_file

    heads = tmp_path / "model" / "alignment_heads" / "model.safetensors"
    tensors = load_file(heads)
    tensors.pop("temperature")
    save_file(tensors, heads)
    with pytest.raises(ValueError, match=r"alignment_heads/model\.safetensors: .*missing keys: temperature"):
        load_model_folder(tmp_path / "model")


def test_a_relative_path_and_a_trailing_slash_do(complete, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model_folder("model/", complete)
    same_parts(complete, load_model_folder("model"))
    (tmp_path / "link").symlink_to("model")
    save_model_folder("link", complete, {"through": "link"})
    assert (tmp_path / "link").is_symlink()
    assert load_model_folder("model").metadata["through"] == "link"
