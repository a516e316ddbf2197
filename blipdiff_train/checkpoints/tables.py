"""The key tables: how each public format names the tensors of the image tower, the Q-Former, its heads and projection.

Sources: the state dicts of LAVIS ``Blip2Qformer`` and ``VisionTransformer``, of diffusers 0.32.2 ``Blip2QFormerModel``
and of transformers ``BertForPreTraining``; recorded in ``tests/goldens``. UNet, VAE and CLIP's towers keep the names of
the library classes that we use ourselves, so they need prefixes only (``checkpoints/diffusers.py``,
``checkpoints/transformers.py``).

Our side of a row begins with the part's name: ``tower.``, ``qformer.``, ``heads.``, ``projection.``.
"""

from __future__ import annotations

from blipdiff_train.checkpoints.keys import Row, linear, prefixed, row
from blipdiff_train.models.qformer import QFormerConfig

POSITION_IDS = "embeddings.position_ids"  # 0, 1, 2, …: a buffer that older libraries store
QUERY_KEY_VALUE = ("query", "key", "value")


def _qformer_layer(
    theirs: str, ours: str, attention: str, *, has_cross_attention: bool, has_query_copies: bool
) -> list[Row]:
    """One layer; ``attention`` is the file's name of the module that holds query, key and value."""
    rows: list[Row] = []
    for kind in ("attention", "crossattention") if has_cross_attention else ("attention",):
        for name in QUERY_KEY_VALUE:
            rows += linear(f"{theirs}.{kind}.{attention}.{name}", f"{ours}.{kind}.attention.{name}")
        for name in ("dense", "LayerNorm"):
            rows += linear(f"{theirs}.{kind}.output.{name}", f"{ours}.{kind}.output.{name}")
    for suffix in ("", "_query") if has_query_copies else ("",):
        for name in (f"intermediate{suffix}.dense", f"output{suffix}.dense", f"output{suffix}.LayerNorm"):
            rows += linear(f"{theirs}.{name}", f"{ours}.{name}")
    return rows


def _body(config: QFormerConfig, theirs: str, attention: str, *, text_only: bool = False) -> list[Row]:
    """Embeddings and layers, whose names below ``theirs`` are BERT's; ``text_only`` leaves out what BERT has not."""
    rows = [
        row(f"{theirs}{name}", f"qformer.{name}")
        for name in (
            "embeddings.word_embeddings.weight",
            "embeddings.position_embeddings.weight",
            "embeddings.LayerNorm.weight",
            "embeddings.LayerNorm.bias",
        )
    ]
    for index in range(config.num_hidden_layers):
        rows += _qformer_layer(
            f"{theirs}encoder.layer.{index}",
            f"qformer.encoder.layer.{index}",
            attention,
            has_cross_attention=not text_only and index % config.cross_attention_freq == 0,
            has_query_copies=not text_only,
        )
    return rows


def _language_model_head(theirs: str) -> list[Row]:
    """BERT's prediction head; its last matrix is the word embedding, its last bias has two names."""
    return [
        row(f"{theirs}bias", "qformer.lm_head.bias"),
        *linear(f"{theirs}transform.dense", "qformer.lm_head.dense"),
        *linear(f"{theirs}transform.LayerNorm", "qformer.lm_head.LayerNorm"),
        row(f"{theirs}decoder.weight", "qformer.embeddings.word_embeddings.weight", alias=True),
        row(f"{theirs}decoder.bias", "qformer.lm_head.bias", alias=True),
    ]


def lavis_qformer(config: QFormerConfig) -> list[Row]:
    """``Blip2Qformer`` without its image tower."""
    return [
        row("query_tokens", "qformer.query_tokens"),
        *linear("ln_vision", "qformer.ln_vision"),
        *_body(config, "Qformer.bert.", "self"),
        *_language_model_head("Qformer.cls.predictions."),
        *linear("vision_proj", "heads.vision_proj"),
        *linear("text_proj", "heads.text_proj"),
        *linear("itm_head", "heads.itm_head"),
        row("temp", "heads.temperature"),
    ]


def lavis_tower(num_layers: int) -> list[Row]:
    """``visual_encoder`` of the CLIP kind (``clip_L``); cut already, without a final norm."""
    rows = [
        row("class_embedding", "embeddings.class_embedding"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        row("conv1.weight", "embeddings.patch_embedding.weight"),
        *linear("ln_pre", "pre_layrnorm"),
    ]
    for index in range(num_layers):
        theirs, ours = f"transformer.resblocks.{index}", f"encoder.layers.{index}"
        for leaf in ("weight", "bias"):
            rows.append(row(f"{theirs}.attn.in_proj_{leaf}", *(f"{ours}.self_attn.{p}_proj.{leaf}" for p in "qkv")))
        for their_name, our_name in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            rows += linear(f"{theirs}.{their_name}", f"{ours}.{our_name}")
    return prefixed(rows, "visual_encoder.", "tower.")


def eva_tower_names(num_layers: int) -> set[str]:
    """``visual_encoder`` of the EVA-CLIP kind (``eva_clip_g``): names only, since this project does not build it."""
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for index in range(num_layers):
        block = f"blocks.{index}"
        names |= {f"{block}.attn.{name}" for name in ("q_bias", "v_bias", "qkv.weight", "proj.weight", "proj.bias")}
        for module in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= {f"{block}.{module}.weight", f"{block}.{module}.bias"}
    return {f"visual_encoder.{name}" for name in names}


def diffusers_tower(num_layers: int) -> list[Row]:
    """``visual_encoder`` of ``Blip2QFormerModel``; its ``post_layernorm`` is our ``ln_vision``."""
    rows = [
        row("embeddings.class_embedding", "embeddings.class_embedding", leading=2),
        row("embeddings.position_embedding", "embeddings.position_embedding.weight", leading=1),
        row("embeddings.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        *linear("pre_layernorm", "pre_layrnorm"),
    ]
    for index in range(num_layers):
        name = f"encoder.layers.{index}"
        rows += linear(f"{name}.self_attn.qkv", *(f"{name}.self_attn.{p}_proj" for p in "qkv"))
        rows += linear(f"{name}.self_attn.projection", f"{name}.self_attn.out_proj")
        for module in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
            rows += linear(f"{name}.{module}", f"{name}.{module}")
    return prefixed(rows, "visual_encoder.", "tower.")


def diffusers_qformer(config: QFormerConfig, num_tower_layers: int) -> list[Row]:
    """``Blip2QFormerModel``: tower, Q-Former and projection; it has neither alignment heads nor a prediction head."""
    return [
        row("query_tokens", "qformer.query_tokens"),
        *diffusers_tower(num_tower_layers),
        *linear("visual_encoder.post_layernorm", "qformer.ln_vision"),
        *_body(config, "", "attention"),
        *projection("proj_layer."),
    ]


def projection(theirs: str = "") -> list[Row]:
    """The projection from the Q-Former to the text encoder (LAVIS and diffusers agree)."""
    return [r for name in ("dense1", "dense2", "LayerNorm") for r in linear(f"{theirs}{name}", f"projection.{name}")]


def our_heads() -> list[Row]:
    """The extra file of a model folder: what the diffusers layout has no place for."""
    return [
        *linear("vision_proj", "heads.vision_proj"),
        *linear("text_proj", "heads.text_proj"),
        *linear("itm_head", "heads.itm_head"),
        row("temperature", "heads.temperature"),
        row("lm_head.bias", "qformer.lm_head.bias"),
        *linear("lm_head.dense", "qformer.lm_head.dense"),
        *linear("lm_head.LayerNorm", "qformer.lm_head.LayerNorm"),
    ]


def bert(config: QFormerConfig, prefix: str) -> list[Row]:
    """``bert-base-uncased``: text embeddings, self-attention, text feed-forwards, prediction head."""
    return [*_body(config, prefix, "self", text_only=True), *_language_model_head("cls.predictions.")]
