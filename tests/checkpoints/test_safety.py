"""Files from elsewhere are data: nothing in them chooses or runs code, and a damaged one is named."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from blipdiff_train.checkpoints.safety import find_file, read_json, read_pickle, read_tensors, weight_names


class Harmful:
    """Its pickle writes a file when it is loaded in the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"model": Harmful(trace)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: cannot be read as plain tensors"):
        read_pickle(tmp_path / "weights.pth")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(ValueError, match=r"bare\.bin"):
        read_tensors(tmp_path / "bare.bin")
    assert not trace.exists()


def test_truncated_files_are_named(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    for name in ("whole.safetensors", "whole.bin"):
        content = (tmp_path / name).read_bytes()
        assert read_tensors(tmp_path / name)["a"].shape == (1000,)
        for length in (0, 5, len(content) // 2, len(content) - 1):
            cut = tmp_path / f"cut.{name.split('.')[1]}"
            cut.write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"cut\."):
                read_tensors(cut)


def test_only_tensors_count_as_weights(tmp_path):
    torch.save({"a": torch.zeros(2), "step": 3}, tmp_path / "mixed.bin")
    with pytest.raises(ValueError, match=r"mixed\.bin: 'step' is a int, expected a tensor"):
        read_tensors(tmp_path / "mixed.bin")
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match=r"list\.bin: holds a list"):
        read_tensors(tmp_path / "list.bin")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown kind of weights"):
        read_tensors(tmp_path / "weights.h5")


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "modeling.Evil"}},
        {"vision_config": {"_target_": "os.system"}},
        {"parts": [{"trust_remote_code": True}]},
    ],
)
def test_a_configuration_that_asks_for_code_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: .* asks for code"):
        read_json(tmp_path / "config.json")


def test_a_vocabulary_may_contain_any_word(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"auto_map": 0, "_target_": 1}))
    assert read_json(tmp_path / "vocab.json") == {"auto_map": 0, "_target_": 1}


def test_class_names_are_compared_not_obeyed(tmp_path):
    file = tmp_path / "config.json"
    for config in ({"_class_name": "Evil"}, {"architectures": ["Evil"]}):
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"class 'Evil' is not one of Good, Better"):
            read_json(file, allowed_class_names=("Good", "Better"))
    file.write_text(json.dumps({"architectures": ["Good"], "x": 1}))
    assert read_json(file, allowed_class_names=("Good",))["x"] == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_json_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_files_are_found_in_order_of_preference_and_absence_is_explained(tmp_path):
    (tmp_path / "unet").mkdir()
    for name in ("pytorch_model.bin", "model.fp16.safetensors"):
        (tmp_path / "unet" / name).touch()
    assert find_file(tmp_path, weight_names("model"), subfolder="unet").name == "pytorch_model.bin"
    with pytest.raises(ValueError, match=r"has none of config\.json \(found: model\.fp16"):
        find_file(tmp_path, ["config.json"], subfolder="unet")
    with pytest.raises(ValueError, match="no such folder"):
        find_file(tmp_path, ["config.json"], subfolder="vae")
    assert find_file(tmp_path, ["config.json"], required=False) is None


def shards(folder, suffix):
    """Three tensors over two files and the index that transformers and diffusers write beside them."""
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate("abc")}
    names = [f"model-0000{number}-of-00002{suffix}" for number in (1, 2)]
    write = save_file if suffix == ".safetensors" else torch.save
    for name, keys in zip(names, ("ab", "c"), strict=True):
        write({key: tensors[key] for key in keys}, folder / name)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = folder / f"{stem}{suffix}.index.json"
    weight_map = {"a": names[0], "b": names[0], "c": names[1]}
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return index, tensors, names


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_spread_over_files_are_one(tmp_path, suffix):
    index, tensors, names = shards(tmp_path, suffix)
    assert find_file(tmp_path, weight_names("model")) == index
    found = read_tensors(index)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-4])
    with pytest.raises(ValueError, match=names[1]):
        read_tensors(index)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"index\.json: names {names[1]}, which is not beside it"):
        read_tensors(index)


def test_an_index_that_does_not_fit_its_files_is_named(tmp_path):
    index, _, names = shards(tmp_path, ".safetensors")
    good = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": good | {"d": names[0]}}))
    with pytest.raises(ValueError, match=rf"{names[0]}: d is in one of it and model\.safetensors\.index\.json only"):
        read_tensors(index)
    for weight_map in ({}, None, {"a": "../secret.safetensors"}, {"a": "model.py"}, {"a": 3}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"safetensors\.index\.json: (has no weight_map|a is said to be in)"):
            read_tensors(index)


def test_the_files_of_an_index_are_had_from_the_hub_too(tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    index, _, names = shards(tmp_path, ".safetensors")
    asked = []

    def download(repository, name, *, subfolder, revision):
        asked.append(name)
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_file("some/model", weight_names("model"), subfolder="unet") == index
    assert asked == ["model.safetensors", "model.safetensors.index.json", *names]


@pytest.mark.parametrize("source", ["/nowhere/at/all", "../up", "a/b/c", "https://example.org/x", "-x/y"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        find_file(source, ["config.json"])


def test_a_hub_id_that_cannot_be_had_is_explained(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def download(repository, name, *, subfolder, revision):
        calls.append((repository, name, subfolder, revision))
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match=r"openai/clip/vision: config\.json .*offline.*give the path"):
        find_file("openai/clip@main", ["config.json"], subfolder="vision")
    assert calls == [("openai/clip", "config.json", "vision", "main")]
