"""A captioner says the same words every time, knows its place beside given captions, and never runs foreign code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_to_text import write_blip
from pictures import draw
from safetensors.torch import load_file

from blipdiff_train.data.shards import ShardSet
from blipdiff_train.data.toybox.write import write_photograph_folder
from blipdiff_train.prepare.captioning import Captioner
from blipdiff_train.prepare.job import run

JOB = {"workers": 1, "progress": False, "report": {"enabled": False}, "photographs_per_shard": 8}
JOB |= {"image": {"shortest_side_px": 16}, "filters": {"blur": None, "duplicate_distance": None, "area": None}}


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return write_blip(tmp_path_factory.mktemp("blip"))


def facts_of(output: Path) -> list[dict]:
    shards = ShardSet(str(output))
    return [json.loads(shards.read(index)["json"]) for index in range(len(shards))]


def test_greedy_words_depend_on_the_photograph_and_on_nothing_else(blip):
    photographs = [draw(i, (40 + i, 50)) for i in range(6)]
    captions = Captioner(blip, batch_size=4, max_new_tokens=6).caption(photographs)
    assert len(set(captions)) > 1
    assert all(0 < len(caption.split()) <= 7 for caption in captions)
    # sampling would differ from call to call
    again = Captioner(blip, batch_size=4, max_new_tokens=6)
    assert again.caption(photographs) == again.caption(photographs) == captions
    assert Captioner(blip, batch_size=1, max_new_tokens=6).caption(photographs) == captions


def test_only_photographs_that_stay_and_have_no_caption_are_asked_about(blip, tmp_path):
    photographs = write_photograph_folder(tmp_path / "photos", 6, size=64)
    pictures = sorted(path for path in Path(photographs).rglob("*") if path.suffix in (".jpg", ".png"))
    for path in Path(photographs).rglob("*.txt"):
        path.unlink()
    pictures[0].with_suffix(".txt").write_text("my own words")
    pictures[1].write_bytes(b"broken")
    captioner = {"model": str(blip), "max_new_tokens": 6}
    output = tmp_path / "shards"
    summary = run(input=str(photographs), output=str(output), captioner=captioner, **JOB)
    facts = facts_of(output)
    assert summary.num_samples == len(facts) == 6 - sum(summary.rejected.values())
    own = [fact for fact in facts if fact["caption_source"] == "given"]
    assert [fact["caption"] for fact in own] == ["my own words"]
    said = [fact for fact in facts if fact["caption_source"] == "model"]
    assert len(said) == len(facts) - 1
    assert all(len(fact["caption"].split()) <= 7 for fact in said)
    provenance = said[0]["provenance"]["captioner"]
    assert provenance["model"] == blip.name
    assert len(provenance["weights"]) == 12

    replaced = tmp_path / "replaced"
    run(input=str(photographs), output=str(replaced), captioner=captioner | {"replace": True}, **JOB)
    assert {fact["caption_source"] for fact in facts_of(replaced)} == {"model"}
    # without a model there is none, and the captions say where they are from
    plain = tmp_path / "plain"
    run(input=str(photographs), output=str(plain), **JOB)
    assert {fact["caption_source"] for fact in facts_of(plain)} == {"given", "template"}
    assert "captioner" not in facts_of(plain)[0]["provenance"]


def test_code_and_pickles_are_refused(blip, tmp_path):
    import torch

    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for path in blip.iterdir():
        (hostile / path.name).write_bytes(path.read_bytes())
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "modeling.Evil"}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match=r"config.json: auto_map asks for code"):
        Captioner(hostile)
    assert not (tmp_path / "ran").exists()
    del config["auto_map"]
    (hostile / "config.json").write_text(json.dumps(config))
    torch.save(load_file(hostile / "model.safetensors"), hostile / "pytorch_model.bin")
    (hostile / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        Captioner(hostile)


def test_a_model_that_cannot_be_loaded_is_named_with_its_key(tmp_path):
    photographs = write_photograph_folder(tmp_path / "photos", 2, size=64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"captioner.model=.*empty: cannot be loaded"):
        run(
            input=str(photographs), output=str(tmp_path / "o"), captioner={"model": str(tmp_path / "empty")}, **JOB
        )
