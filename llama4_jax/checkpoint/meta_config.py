"""Meta's `params.json` to `Llama4Config` and back.

params.json gives no feed-forward widths but the numbers from which Meta's model computes them, and neither token ids
nor context length: those are Llama 4's own, unless the folder has a `llama4_jax.json` that names them.

Source: `ModelArgs`, `MoE` and `TransformerBlock` of `llama_models.llama4` (llama-models 0.3.0).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_jax.config import (
    AttentionConfig,
    Llama4Config,
    MoeConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
    presets,
)

REQUIRED = ("dim", "n_layers", "n_heads", "n_kv_heads", "attention_chunk_size", "multiple_of")
VISION_REQUIRED = (
    "image_size",
    "patch_size",
    "dim",
    "n_layers",
    "n_heads",
    "mlp_ratio",
    "output_dim",
    "pixel_shuffle_ratio",
)
EXTRAS = ("patch_token", "image_start_token", "image_end_token", "bos_token", "stop_tokens", "context_length")
ROPE_ORIGINAL_LENGTH, ROPE_LOW_FREQ_FACTOR = 8192, 1.0  # constants of Meta's code
VISION_ROPE_THETA = 10_000.0


def from_params(params: Mapping[str, Any], extras: Mapping[str, Any] | None = None) -> Llama4Config:
    """The configuration in a parsed params.json. `extras` gives `EXTRAS`; None: those of the released models.

    Raises ValueError for missing or contradictory fields, NotImplementedError for what this project's model cannot be.
    """
    params = params.get("model", params)
    _require(params, REQUIRED, "params.json")
    for name in ("quantization_args", "lora_args"):
        if params.get(name):
            raise NotImplementedError(f"params.json: {name}={params[name]}; only plain float checkpoints are read")
    text = _text(params)
    vision = _vision(params["vision_args"]) if params.get("vision_args") else None
    given = _released_extras(text, vision) if extras is None else dict(extras)
    unknown = sorted(set(given) - set(EXTRAS))
    if unknown:
        raise ValueError(f"llama4_jax.json: unknown fields {unknown}; known are {', '.join(EXTRAS)}")
    text = dataclasses.replace(text, context_length=given.pop("context_length", text.context_length))
    return Llama4Config(text=text, vision=vision, **{**given, "stop_tokens": tuple(given.get("stop_tokens", ()))})


def to_params(config: Llama4Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """params.json and llama4_jax.json as dicts; the inverse of `from_params`.

    Raises NotImplementedError naming every field that Meta's model cannot express.
    """
    _check_expressible(config)
    text, attention, moe = config.text, config.text.attention, config.text.moe
    unit = _hidden_unit(text.embed_dim)
    scaling = attention.rope_scaling
    params = {
        "dim": text.embed_dim,
        "n_layers": text.num_layers,
        "n_heads": attention.num_heads,
        "n_kv_heads": attention.num_kv_heads,
        "vocab_size": text.vocab_size,
        "multiple_of": 1,
        "ffn_exp": 4.0,
        "ffn_dim_multiplier": _ratio(text.mlp_dim, unit),
        "norm_eps": text.norm_eps,
        "attention_chunk_size": attention.chunk_size,
        "rope_theta": attention.rope_theta,
        "use_scaled_rope": scaling is not None,
        "rope_scaling_factor": scaling and scaling.factor,
        "rope_high_freq_factor": scaling and scaling.high_freq_factor,
        "nope_layer_interval": attention.nope_interval or None,
        "use_qk_norm": attention.qk_norm,
        "attn_temperature_tuning": attention.temperature_tuning,
        "floor_scale": float(attention.floor_scale),
        "attn_scale": attention.attn_scale,
        "moe_args": None,
        "vision_args": config.vision and _vision_to_params(config.vision),
    }
    if moe.step:
        params["moe_args"] = {
            "num_experts": moe.num_experts,
            # The dense width divided by one more than this and rounded down is the experts' width.
            "capacity_factor": text.mlp_dim / (moe.expert_dim + 0.5) - 1,
            "auto_scale_F": True,
            "top_k": moe.top_k,
            "interleave_moe_layer_step": moe.step,
        }
    extras = {name: getattr(config, name) for name in EXTRAS[:-1]} | {"context_length": text.context_length}
    return params, extras | {"stop_tokens": list(config.stop_tokens)}


def _text(params: Mapping[str, Any]) -> TextConfig:
    dim, heads = params["dim"], params["n_heads"]
    if params.get("head_dim") not in (None, dim // heads):
        raise NotImplementedError(
            f"params.json: head_dim={params['head_dim']}, but Meta's model always takes dim // n_heads = {dim // heads}"
        )
    scaling = None
    if params.get("use_scaled_rope"):
        scaling = RopeScaling(
            factor=float(params.get("rope_scaling_factor") or 16),  # absent in Scout's file, and 16 and 1 in its model
            high_freq_factor=float(params.get("rope_high_freq_factor") or 1),
            low_freq_factor=ROPE_LOW_FREQ_FACTOR,
            original_length=ROPE_ORIGINAL_LENGTH,
        )
    vocab_size = params.get("vocab_size", -1)
    return TextConfig(
        vocab_size=presets.scout().text.vocab_size if vocab_size == -1 else vocab_size,  # -1: the tokenizer's
        embed_dim=dim,
        num_layers=params["n_layers"],
        mlp_dim=_dense_width(params),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=params["n_kv_heads"],
            head_dim=dim // heads,
            chunk_size=params["attention_chunk_size"],
            nope_interval=params.get("nope_layer_interval") or 0,
            rope_theta=float(params.get("rope_theta", 500_000)),
            rope_scaling=scaling,
            qk_norm=params.get("use_qk_norm", False),
            temperature_tuning=params.get("attn_temperature_tuning", False),
            floor_scale=int(params.get("floor_scale", 8192)),
            attn_scale=params.get("attn_scale", 0.1),
        ),
        moe=_moe(params),
        norm_eps=params.get("norm_eps", 1e-5),
    )


def _hidden_unit(dim: int) -> int:
    """The feed-forward width before any multiplier: two thirds of four times the model's, rounded down."""
    return int(2 * (4 * dim) / 3)


def _dense_width(params: Mapping[str, Any]) -> int:
    width = int((params.get("ffn_dim_multiplier") or 1) * _hidden_unit(params["dim"]))
    return width + -width % params["multiple_of"]


def _moe(params: Mapping[str, Any]) -> MoeConfig:
    moe = params.get("moe_args")
    if not moe:
        return MoeConfig(num_experts=1, expert_dim=_dense_width(params), step=0)
    _require(params, ("ffn_exp", "ffn_dim_multiplier"), "params.json")
    _require(moe, ("num_experts",), "params.json: moe_args")
    width = int(params["ffn_dim_multiplier"] * int(2 * int(params["ffn_exp"] * params["dim"]) / 3))
    if moe.get("auto_scale_F", True):
        width = int(width / (moe.get("capacity_factor", 1.0) + 1))
    return MoeConfig(
        num_experts=moe["num_experts"],
        expert_dim=width + -width % params["multiple_of"],
        top_k=moe.get("top_k", 1),
        step=moe.get("interleave_moe_layer_step", 1),
    )


def _vision(fields: Mapping[str, Any]) -> VisionConfig:
    _require(fields, VISION_REQUIRED, "params.json: vision_args")
    for name in ("image_size", "patch_size"):
        if fields[name]["height"] != fields[name]["width"]:
            raise NotImplementedError(f"params.json: vision_args: {name}={fields[name]}; wanted squares")
    shuffle = round(1 / fields["pixel_shuffle_ratio"])
    if shuffle * fields["pixel_shuffle_ratio"] != 1:
        raise NotImplementedError(f"params.json: pixel_shuffle_ratio={fields['pixel_shuffle_ratio']} is not 1 over n")
    return VisionConfig(
        embed_dim=fields["dim"],
        num_layers=fields["n_layers"],
        num_heads=fields["n_heads"],
        mlp_dim=int(fields["mlp_ratio"] * fields["dim"]),
        image_size=fields["image_size"]["height"],
        patch_size=fields["patch_size"]["height"],
        output_dim=fields["output_dim"],
        shuffle=shuffle,
        rope_theta=VISION_ROPE_THETA,
    )


def _vision_to_params(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "dim": vision.embed_dim,
        "n_layers": vision.num_layers,
        "n_heads": vision.num_heads,
        "mlp_ratio": _ratio(vision.mlp_dim, vision.embed_dim),
        "output_dim": vision.output_dim,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
    }


def _ratio(wanted: int, base: int) -> float:
    """A factor with int(factor * base) == wanted: the quotient, or half a unit above it where that is rounded down."""
    quotient = wanted / base
    return quotient if int(quotient * base) == wanted else (wanted + 0.5) / base


def _released_extras(text: TextConfig, vision: VisionConfig | None) -> dict[str, Any]:
    """Token ids and context of the released models."""
    released = presets.scout()
    if text.vocab_size < released.text.vocab_size:
        raise ValueError(
            f"params.json: vocab_size={text.vocab_size} is not Llama 4's {released.text.vocab_size}; "
            f"add a llama4_jax.json with {', '.join(EXTRAS)}"
        )
    extras = {name: getattr(released, name) for name in EXTRAS[:-1]}
    scout = text.moe.num_experts == released.text.moe.num_experts
    extras["context_length"] = (released if scout else presets.maverick()).text.context_length
    return extras if vision else {name: extras[name] for name in ("bos_token", "stop_tokens", "context_length")}


def _check_expressible(config: Llama4Config) -> None:
    text, attention, vision, scaling = (
        config.text,
        config.text.attention,
        config.vision,
        config.text.attention.rope_scaling,
    )
    problems = {
        f"attention.head_dim={attention.head_dim} (must be embed_dim / num_heads)": (
            attention.head_dim * attention.num_heads != text.embed_dim
        ),
        "attention.bias=True": attention.bias,
        "tie_embeddings=True": text.tie_embeddings,
        "moe.selection_bias=True": text.moe.selection_bias,
        f"rope_scaling={scaling} (must have original_length=8192 and low_freq_factor=1)": scaling is not None
        and (scaling.original_length, scaling.low_freq_factor) != (ROPE_ORIGINAL_LENGTH, ROPE_LOW_FREQ_FACTOR),
        "vision.channels (must be 3) or vision.rope_theta (must be 10000)": vision is not None
        and (vision.channels, vision.rope_theta) != (3, VISION_ROPE_THETA),
    }
    found = [name for name, wrong in problems.items() if wrong]
    if found:
        raise NotImplementedError(f"Meta's Llama 4 cannot express {'; '.join(found)}; save it with save_hf instead")


def _require(fields: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; every released model has them")
