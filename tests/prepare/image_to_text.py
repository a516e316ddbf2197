"""A real image-to-text model of a few thousand random weights, in a local folder as a hub would give it."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "red", "dog", "on", "the", "grass", "cup", "blue", "with", "small", "beside", "old"]


def write_blip(folder: Path, seed: int = 0) -> Path:
    """A ``BlipForConditionalGeneration`` with tokenizer and image processor; its captions depend on the photograph."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 40}
    marks = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config=small | text | marks,
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            # as they come, random weights are too small for the photograph to make a difference
            if weights.ndim > 1:
                weights.normal_(0.0, 0.6)
        model.text_decoder.cls.predictions.bias[:5] = -100.0  # words only
    # what a hub's model may bring along: sampling and beams, which the captioner must not follow
    model.generation_config.update(do_sample=True, num_beams=2, temperature=3.0)
    model.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    settings = {"size": {"height": 32, "width": 32}, "image_mean": half, "image_std": half}
    settings["image_processor_type"] = "BlipImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
