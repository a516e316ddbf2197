"""The two tokenizers: CLIP's byte-pair encoding for prompts, BERT's word pieces for the Q-Former.

Both are built from vocabulary files by their ordinary class, and written in the form every version of transformers
reads (``vocab.json`` + ``merges.txt``, ``vocab.txt``): transformers 5 by itself writes ``tokenizer.json`` only, which
the last transformers that runs diffusers' BLIP-Diffusion pipeline does not take for CLIP's slow tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blipdiff_train.checkpoints.safety import find_file, read_json
from blipdiff_train.common.files import write_json, write_text

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizer

DEC_TOKEN = "[DEC]"  # begins a caption that is to be written; LAVIS appends it to BERT's vocabulary as bos
UNBOUNDED = 10**30  # what transformers writes for "no maximum" is a float near this


def load_clip_tokenizer(source: str | Path, *, subfolder: str = "") -> CLIPTokenizer:
    """CLIP's tokenizer from ``vocab.json`` and ``merges.txt``, or from ``tokenizer.json``.

    Raises:
        ValueError: a file is missing or damaged; the folder is named.
    """
    from transformers import CLIPTokenizer

    settings = _settings(source, subfolder)
    vocabulary_file = find_file(source, ["vocab.json", "tokenizer.json"], subfolder=subfolder)
    if vocabulary_file.name == "vocab.json":
        vocabulary = read_json(vocabulary_file)
        lines = find_file(source, ["merges.txt"], subfolder=subfolder).read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    else:
        model = _tokenizer_model(vocabulary_file, "BPE")
        vocabulary = model["vocab"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    names = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if key in settings}
    for key, token in names.items():
        if token not in vocabulary:
            raise ValueError(f"{vocabulary_file}: {key} {token!r} is not in the vocabulary of {len(vocabulary)} tokens")
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_max_length(settings, default=77), **names)


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    folder = Path(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = {
        "bos_token": str(tokenizer.bos_token),
        "eos_token": str(tokenizer.eos_token),
        "pad_token": str(tokenizer.pad_token),
        "unk_token": str(tokenizer.unk_token),
    }
    by_number = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    write_text(folder / "vocab.json", json.dumps(by_number, ensure_ascii=False) + "\n")
    merges = [" ".join(pair) if not isinstance(pair, str) else pair for pair in model["merges"]]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", settings | tokens)
    write_json(folder / "special_tokens_map.json", tokens)


def load_bert_tokenizer(source: str | Path, *, subfolder: str = "") -> BertTokenizer:
    """BERT's tokenizer with ``[DEC]`` as its beginning-of-sequence token, appended where the vocabulary lacks it.

    Source: LAVIS ``Blip2Base.init_tokenizer``. Text is cut on the right.

    Raises:
        ValueError: a file is missing or damaged; the folder is named.
    """
    from transformers import BertTokenizer

    settings = _settings(source, subfolder)
    vocabulary_file = find_file(source, ["vocab.txt", "tokenizer.json"], subfolder=subfolder)
    if vocabulary_file.name == "vocab.txt":
        lines = vocabulary_file.read_text(encoding="utf-8").split("\n")
        words = lines[:-1] if lines and lines[-1] == "" else lines
        vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words)}
        if len(vocabulary) != len(words):
            raise ValueError(f"{vocabulary_file}: {len(words) - len(vocabulary)} words occur twice")
    else:
        vocabulary = _tokenizer_model(vocabulary_file, "WordPiece")["vocab"]
    lacking = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in vocabulary]
    if lacking:
        raise ValueError(f"{vocabulary_file}: not a BERT vocabulary, {', '.join(lacking)} missing")
    tokenizer = BertTokenizer(
        vocab=vocabulary,
        do_lower_case=bool(settings.get("do_lower_case", True)),
        model_max_length=_max_length(settings, default=512),
        truncation_side="right",
    )
    tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
    return tokenizer


def save_bert_tokenizer(tokenizer: BertTokenizer, folder: str | Path) -> None:
    """Write ``vocab.txt`` (without an appended ``[DEC]``) and ``tokenizer_config.json``."""
    folder = Path(folder)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[word] for word in words] != list(range(len(words))):
        raise ValueError("the BERT vocabulary has holes in its numbering and cannot be written as vocab.txt")
    write_text(folder / "vocab.txt", "".join(f"{word}\n" for word in words))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": bool(getattr(tokenizer, "do_lower_case", True)),
            "model_max_length": tokenizer.model_max_length,
        },
    )


def _settings(source: str | Path, subfolder: str) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``, tokens as plain strings; empty without the files."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = find_file(source, [name], subfolder=subfolder, required=False)
        if file is not None:
            settings |= read_json(file)
    return {
        key: value["content"] if isinstance(value, dict) and isinstance(value.get("content"), str) else value
        for key, value in settings.items()
        if value is not None
    }


def _max_length(settings: dict[str, Any], *, default: int) -> int:
    length = settings.get("model_max_length", default)
    return int(length) if isinstance(length, (int, float)) and 0 < length < UNBOUNDED / 10 else default


def _tokenizer_model(file: Path, kind: str) -> dict[str, Any]:
    """The ``model`` part of a ``tokenizer.json``, which must be of the named kind."""
    model = read_json(file).get("model")
    if not isinstance(model, dict) or model.get("type", kind) != kind or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{file}: holds no {kind} vocabulary")
    return model
