"""Hugging Face's `config.json` and `generation_config.json` to `Llama4Config` and back.

Reads files of transformers 4 (`rope_theta` + `rope_scaling`) and 5 (`rope_parameters`); writes both spellings.
A field whose Hugging Face class default is not what the released models use (widths, context, QK norm, stop ids)
must be in the file: guessing it would load a different model without a word.

Source: `configuration_llama4.py` of transformers 5.23 and the published Scout and Maverick files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_jax.checkpoint.schemes import Schemes
from llama4_jax.config import (
    Attention,
    AttentionConfig,
    FeedForward,
    Llama4Config,
    MoeConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
    layer_kinds,
)

TEXT_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "use_qk_norm",
    "attention_chunk_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
VISION_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "vision_output_dim",
)
VISION_ROPE_THETA = 10_000.0  # of every release; early files do not name it


def from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Llama4Config:
    """The configuration in a parsed `config.json`, multimodal or text only.

    `generation`, a parsed generation_config.json, gives the stop ids where `config` has none. Raises ValueError for
    missing or contradictory fields (naming them all), NotImplementedError for what this project's model cannot be.
    """
    if config.get("quantization_config"):
        Schemes(config["quantization_config"])  # raises for weights that are not read
    nested = "text_config" in config
    text = config["text_config"] if nested else config
    where = "config.json: text_config" if nested else "config.json"
    stop = next((e for e in (text.get("eos_token_id"), config.get("eos_token_id")) if e is not None), None)
    if stop is None and generation:
        stop = generation.get("eos_token_id")
    multimodal: dict[str, Any] = {}
    if nested and "Llama4ForCausalLM" not in (config.get("architectures") or ()):
        multimodal = {
            "vision": _vision(config.get("vision_config") or {}),
            "patch_token": _either(config, "image_token_index", "image_token_id"),
            "image_start_token": config.get("boi_token_index", config.get("boi_token_id")),
            "image_end_token": config.get("eoi_token_index", config.get("eoi_token_id")),
        }
    return Llama4Config(
        text=_text(text, where),
        bos_token=text.get("bos_token_id"),
        stop_tokens=tuple(stop) if isinstance(stop, Sequence) else () if stop is None else (stop,),
        **multimodal,
    )


def to_hf(config: Llama4Config, dtype: str) -> dict[str, Any]:
    """`config.json` as a dict, for weights of `dtype` ("float32", "bfloat16"); the inverse of `from_hf`.

    Raises NotImplementedError naming the fields that Hugging Face's model cannot express.
    """
    common = {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": config.text.tie_embeddings}
    text = _text_to_hf(config)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text, **common}
    whole = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {**text, **common},
        "vision_config": _vision_to_hf(config.vision),
        "image_token_index": config.patch_token,
        **common,
    }
    if config.image_start_token is not None:
        whole["boi_token_index"] = config.image_start_token
    if config.image_end_token is not None:
        whole["eoi_token_index"] = config.image_end_token
    return whole


def generation_to_hf(config: Llama4Config) -> dict[str, Any]:
    """`generation_config.json` as a dict: the ids at which a turn starts and ends."""
    return {"bos_token_id": config.bos_token, "eos_token_id": _stop_to_hf(config.stop_tokens), "do_sample": False}


def _text(fields: Mapping[str, Any], where: str) -> TextConfig:
    _require(fields, TEXT_REQUIRED, where)
    if fields.get("hidden_act", "silu") != "silu":
        raise NotImplementedError(f"{where}: hidden_act={fields['hidden_act']!r}; the experts' gate is silu only")
    num_layers = fields["num_hidden_layers"]
    theta, scaling = _rope(fields, where)
    text = TextConfig(
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        num_layers=num_layers,
        mlp_dim=fields["intermediate_size_mlp"],
        attention=AttentionConfig(
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
            chunk_size=fields["attention_chunk_size"],
            nope_interval=_nope_interval(fields, num_layers, where),
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=fields["use_qk_norm"],
            temperature_tuning=bool(fields.get("attn_temperature_tuning", True)),  # early files say 4, meaning true
            floor_scale=int(fields.get("floor_scale", 8192)),
            attn_scale=fields.get("attn_scale", 0.1),
            bias=fields.get("attention_bias", False),
        ),
        moe=MoeConfig(
            num_experts=fields["num_local_experts"],
            expert_dim=fields["intermediate_size"],
            top_k=fields["num_experts_per_tok"],
            step=_moe_step(fields, num_layers, where),
        ),
        norm_eps=fields["rms_norm_eps"],
        tie_embeddings=fields.get("tie_word_embeddings", False),
        context_length=fields["max_position_embeddings"],
    )
    _check_layer_types(text, fields.get("layer_types"), where)
    return text


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from whichever spelling the file uses; both must agree."""
    spellings = []
    if fields.get("rope_parameters"):
        parameters = fields["rope_parameters"]
        spellings.append((parameters.get("rope_theta", fields.get("rope_theta")), _rope_scaling(parameters, where)))
    if "rope_scaling" in fields or not spellings:
        spellings.append((fields.get("rope_theta"), _rope_scaling(fields.get("rope_scaling") or {}, where)))
    if any(theta is None for theta, _ in spellings):
        raise ValueError(f"{where}: rope_theta is missing, in rope_parameters or beside rope_scaling")
    if any(spelling != spellings[0] for spelling in spellings):
        raise ValueError(f"{where}: rope_parameters and rope_theta + rope_scaling disagree: {spellings}; remove one")
    return spellings[0]


def _rope_scaling(parameters: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise NotImplementedError(f"{where}: rope_type={kind!r}; wanted 'default' or 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    _require(parameters, names, f"{where}: rope scaling")
    return RopeScaling(
        **dict(zip(("factor", "low_freq_factor", "high_freq_factor", "original_length"), map(parameters.get, names)))
    )


def _nope_interval(fields: Mapping[str, Any], num_layers: int, where: str) -> int:
    # An empty list means "by interval", as in the released Scout file.
    uses_rope = fields.get("no_rope_layers") or None
    if uses_rope is not None and len(uses_rope) < num_layers:
        raise ValueError(f"{where}: no_rope_layers has {len(uses_rope)} values for {num_layers} layers")
    without = None if uses_rope is None else [i for i in range(num_layers) if not uses_rope[i]]
    return _interval(
        without, fields.get("no_rope_layer_interval", 4), num_layers, f"{where}: no_rope_layers={uses_rope}"
    )


def _moe_step(fields: Mapping[str, Any], num_layers: int, where: str) -> int:
    mixtures, declared = fields.get("moe_layers"), fields.get("interleave_moe_layer_step")
    if mixtures is None and declared is None:
        raise ValueError(f"{where}: interleave_moe_layer_step and moe_layers are both missing; one is needed")
    return _interval(mixtures, declared, num_layers, f"{where}: moe_layers={mixtures}")


def _interval(members: Sequence[int] | None, declared: int | None, num_layers: int, seen: str) -> int:
    """The k with members == [k-1, 2k-1, ...], 0 for none; `declared` where the file lists no members."""
    if members is None:
        return declared or 0
    for k in (declared or 0, *range(num_layers + 1)):
        if k <= num_layers and sorted(members) == _every(k, num_layers):
            return k
    raise NotImplementedError(f"{seen} of {num_layers} layers is no regular interval (every k-th layer)")


def _every(k: int, num_layers: int) -> list[int]:
    return list(range(k - 1, num_layers, k)) if k else []


def _check_layer_types(text: TextConfig, layer_types: Sequence[str] | None, where: str) -> None:
    wanted = _layer_types(text)
    if layer_types and list(layer_types) != wanted:
        raise NotImplementedError(
            f"{where}: layer_types={list(layer_types)}; wanted {wanted}: chunked attention just on the layers with RoPE"
        )


def _layer_types(text: TextConfig) -> list[str]:
    names = {Attention.CHUNKED: "chunked_attention", Attention.GLOBAL: "full_attention"}
    return [names[kind.attention] for kind in layer_kinds(text)]


def _vision(fields: Mapping[str, Any]) -> VisionConfig:
    where = "config.json: vision_config"
    _require(fields, VISION_REQUIRED, where)
    for name in ("image_size", "patch_size"):
        if not isinstance(fields[name], int):
            raise NotImplementedError(f"{where}: {name}={fields[name]}; wanted one integer, tiles are square")
    output = fields["vision_output_dim"]
    for name in ("projector_input_dim", "projector_output_dim"):
        if fields.get(name, output) != output:
            raise NotImplementedError(f"{where}: {name}={fields[name]} differs from vision_output_dim={output}")
    ratio = fields.get("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / ratio)
    if not math.isclose(shuffle * ratio, 1):
        raise NotImplementedError(f"{where}: pixel_shuffle_ratio={ratio} is not 1 over a whole number")
    if fields["intermediate_size"] != fields["hidden_size"] * shuffle**2:
        raise ValueError(
            f"{where}: intermediate_size={fields['intermediate_size']} must be hidden_size / pixel_shuffle_ratio**2 = "
            f"{fields['hidden_size'] * shuffle**2}: Hugging Face also uses it as the adapter's input width"
        )
    theta, scaling = _rope({"rope_theta": VISION_ROPE_THETA, **fields}, where)
    if scaling is not None:
        raise NotImplementedError(f"{where}: scaled 2-D RoPE {scaling}")
    return VisionConfig(
        embed_dim=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp_dim=fields["intermediate_size"],
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        output_dim=output,
        shuffle=shuffle,
        channels=fields.get("num_channels", 3),
        rope_theta=theta,
    )


def _text_to_hf(config: Llama4Config) -> dict[str, Any]:
    text, attention, moe = config.text, config.text.attention, config.text.moe
    if moe.selection_bias:
        raise NotImplementedError("moe.selection_bias=True has no counterpart in Hugging Face's Llama 4")
    kinds = layer_kinds(text)
    never = text.num_layers + 1  # an interval that no layer meets
    return {
        "model_type": "llama4_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.embed_dim,
        "intermediate_size": moe.expert_dim,
        "intermediate_size_mlp": text.mlp_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "attention_bias": attention.bias,
        "attention_chunk_size": attention.chunk_size,
        "attn_temperature_tuning": attention.temperature_tuning,
        "floor_scale": attention.floor_scale,
        "attn_scale": attention.attn_scale,
        "use_qk_norm": attention.qk_norm,
        "no_rope_layer_interval": attention.nope_interval or never,
        "no_rope_layers": [int(kind.rope) for kind in kinds],
        "layer_types": _layer_types(text),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": moe.step or never,
        "moe_layers": [i for i, kind in enumerate(kinds) if kind.feed_forward is FeedForward.MOE],
        "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": text.context_length,
        "bos_token_id": config.bos_token,
        "eos_token_id": _stop_to_hf(config.stop_tokens),
        "pad_token_id": None,
        **_rope_to_hf(attention.rope_theta, attention.rope_scaling),
    }


def _vision_to_hf(vision: VisionConfig) -> dict[str, Any]:
    if vision.mlp_dim != vision.embed_dim * vision.shuffle**2:
        raise NotImplementedError(
            f"vision.mlp_dim={vision.mlp_dim}: Hugging Face's model needs embed_dim * shuffle**2 = "
            f"{vision.embed_dim * vision.shuffle**2}, since it takes one field for this and for the adapter's input"
        )
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.embed_dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.channels,
        "vision_output_dim": vision.output_dim,
        "projector_input_dim": vision.output_dim,
        "projector_output_dim": vision.output_dim,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        **_rope_to_hf(vision.rope_theta, None),
    }


def _rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    rule = {"rope_type": "default"}
    if scaling is not None:
        rule = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "rope_parameters": {**rule, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": rule if scaling is not None else None,
    }


def _stop_to_hf(stop: tuple[int, ...]) -> int | list[int] | None:
    return None if not stop else stop[0] if len(stop) == 1 else list(stop)


def _either(fields: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(f"config.json: {' or '.join(names)} is missing")


def _require(fields: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; class defaults differ from the released models")
