"""The two tokenizers: as the library's own loader makes them, and written in the form that every version reads."""

import json

import pytest
from transformers import BertTokenizer, CLIPTokenizer

from blipdiff_train.checkpoints.tokenizers import (
    load_bert_tokenizer,
    load_clip_tokenizer,
    save_bert_tokenizer,
    save_clip_tokenizer,
)

SENTENCES = ["", "a dog swimming underwater", "Hello  WORLD's 123, ümläut 🎉 teapot's"]


@pytest.fixture
def clip_folder(goldens):
    return goldens / "generate" / "pipeline" / "tokenizer"


@pytest.fixture
def bert_folder(goldens):
    return goldens / "generate" / "bert_tokenizer"


def test_clip_agrees_with_the_library(clip_folder):
    ours, theirs = load_clip_tokenizer(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    assert [ours(s).input_ids for s in SENTENCES] == [theirs(s).input_ids for s in SENTENCES]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.model_max_length) == (738, 739, 739, 77)


def test_clip_there_and_back(clip_folder, tmp_path):
    ours = load_clip_tokenizer(clip_folder)
    save_clip_tokenizer(ours, tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == (clip_folder / "merges.txt").read_bytes()
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((clip_folder / "vocab.json").read_text())
    again = load_clip_tokenizer(tmp_path)
    assert [again(s).input_ids for s in SENTENCES] == [ours(s).input_ids for s in SENTENCES]


def test_what_transformers_itself_writes_is_read(clip_folder, bert_folder, tmp_path):
    clip, bert = load_clip_tokenizer(clip_folder), load_bert_tokenizer(bert_folder)
    clip.save_pretrained(tmp_path / "clip")
    bert.save_pretrained(tmp_path / "bert")
    assert not (tmp_path / "clip" / "vocab.json").exists()  # transformers 5 writes tokenizer.json only
    again = load_clip_tokenizer(tmp_path / "clip"), load_bert_tokenizer(tmp_path / "bert")
    for sentence in SENTENCES:
        assert again[0](sentence).input_ids == clip(sentence).input_ids
        assert again[1](sentence).input_ids == bert(sentence).input_ids
    assert len(again[1]) == len(bert)


def test_bert_has_dec_as_its_last_word(bert_folder):
    ours = load_bert_tokenizer(bert_folder)
    plain = BertTokenizer.from_pretrained(bert_folder)
    assert len(ours) == len(plain) + 1
    assert ours.bos_token_id == len(plain) == 98
    assert [ours(s).input_ids for s in SENTENCES] == [plain(s).input_ids for s in SENTENCES]


def test_bert_there_and_back(bert_folder, tmp_path):
    ours = load_bert_tokenizer(bert_folder)
    save_bert_tokenizer(ours, tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == (bert_folder / "vocab.txt").read_bytes()
    again = load_bert_tokenizer(tmp_path)
    assert again.bos_token_id == ours.bos_token_id
    assert again.model_max_length == ours.model_max_length


def test_a_vocabulary_that_is_none_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\nword\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: not a BERT vocabulary, \[UNK\], \[CLS\], \[SEP\] missing"):
        load_bert_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\nword\nword\n")
    with pytest.raises(ValueError, match="1 words occur twice"):
        load_bert_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": {}}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: holds no BPE vocabulary"):
        load_clip_tokenizer(tmp_path)


def test_special_tokens_must_be_in_the_vocabulary(clip_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<nothing>"}))
    with pytest.raises(ValueError, match="pad_token '<nothing>' is not in the vocabulary"):
        load_clip_tokenizer(tmp_path)
