"""params.json of Meta's checkpoints, and back."""

import dataclasses
import json

import pytest

from llama4_jax.checkpoint import meta_config
from llama4_jax.config import RopeScaling, presets

# The numbers from which the released models' widths are computed: 16384 dense, 8192 an expert.
SCOUT = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 202_048,
    "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.2,
    "multiple_of": 2048,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "use_scaled_rope": True,
    "attention_chunk_size": 8192,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
    "vision_args": {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    },
}
MAVERICK = {
    **SCOUT,
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {**SCOUT["moe_args"], "num_experts": 128, "interleave_moe_layer_step": 2},
}


def expressible(config):
    """A preset with the constants of rotary scaling that Meta's code fixes."""
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    attention = dataclasses.replace(config.text.attention, rope_scaling=config.text.attention.rope_scaling and scaling)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, attention=attention))


@pytest.mark.parametrize(("params", "preset"), [(SCOUT, presets.scout), (MAVERICK, presets.maverick)])
def test_the_released_models_are_the_presets(params, preset):
    assert meta_config.from_params(params) == preset()
    assert meta_config.from_params({"model": {**params, "vocab_size": -1}}) == preset()


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.__name__)
def test_presets_survive_the_way_to_meta_and_back(preset):
    config = expressible(preset())
    params, extras = json.loads(json.dumps(meta_config.to_params(config)))
    assert meta_config.from_params(params, extras) == config


@pytest.mark.parametrize("widths", [(1, 1), (7, 13), (48, 24), (100, 333), (16_384, 8_192), (12_345, 6_789)])
def test_any_two_widths_can_be_written(widths):
    config = expressible(presets.tiny())
    moe = dataclasses.replace(config.text.moe, expert_dim=widths[1])
    text = dataclasses.replace(config.text, mlp_dim=widths[0], moe=moe)
    back = meta_config.from_params(*meta_config.to_params(dataclasses.replace(config, text=text)))
    assert (back.text.mlp_dim, back.text.moe.expert_dim) == widths


def test_a_model_without_mixtures_has_no_moe_args():
    text = dataclasses.replace(presets.tiny().text, moe=dataclasses.replace(presets.tiny().text.moe, step=0))
    config = expressible(dataclasses.replace(presets.tiny(), text=text))
    params, extras = meta_config.to_params(config)
    assert params["moe_args"] is None
    assert meta_config.from_params(params, extras).text.moe.step == 0


def test_everything_that_metas_model_cannot_express_is_named():
    tiny = presets.tiny()
    attention = dataclasses.replace(tiny.text.attention, bias=True, head_dim=12)
    text = dataclasses.replace(
        tiny.text, attention=attention, tie_embeddings=True, moe=dataclasses.replace(tiny.text.moe, selection_bias=True)
    )
    config = dataclasses.replace(tiny, text=text, vision=dataclasses.replace(tiny.vision, channels=1))
    with pytest.raises(NotImplementedError) as error:
        meta_config.to_params(config)
    for part in ("head_dim=12", "bias=True", "tie_embeddings", "selection_bias", "original_length=64", "channels"):
        assert part in str(error.value)


def test_what_is_missing_or_contradictory_is_named():
    with pytest.raises(ValueError, match="params.json: missing n_heads, attention_chunk_size"):
        meta_config.from_params({**SCOUT, "n_heads": None, "attention_chunk_size": None})
    with pytest.raises(ValueError, match="vision_args: missing mlp_ratio"):
        meta_config.from_params({**SCOUT, "vision_args": {**SCOUT["vision_args"], "mlp_ratio": None}})
    with pytest.raises(NotImplementedError, match="head_dim=64, but Meta's model always takes"):
        meta_config.from_params({**SCOUT, "head_dim": 64})
    with pytest.raises(NotImplementedError, match="lora_args"):
        meta_config.from_params({**SCOUT, "lora_args": {"rank": 8, "scale": 2.0}})
    with pytest.raises(ValueError, match="vocab_size=100 is not Llama 4's 202048"):
        meta_config.from_params({**SCOUT, "vocab_size": 100})
    with pytest.raises(ValueError, match=r"unknown fields \['pad_token'\]"):
        meta_config.from_params(SCOUT, {"pad_token": 1})
