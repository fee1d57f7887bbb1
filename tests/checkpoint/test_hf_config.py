"""config.json in every spelling that was ever released, and back."""

import dataclasses
import json

import pytest

from llama4_jax.checkpoint import hf_config
from llama4_jax.config import layer_kinds, presets

TEXT = {
    "model_type": "llama4_text",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": True,
    "attention_chunk_size": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def text(**changes):
    return hf_config.from_hf({**TEXT, **changes}).text


def without(*names) -> dict:
    return {name: value for name, value in TEXT.items() if name not in names}


def fits_hf(config):
    """A preset with the one width that Hugging Face's vision model ties to another."""
    vision = dataclasses.replace(config.vision, mlp_dim=config.vision.embed_dim * config.vision.shuffle**2)
    return dataclasses.replace(config, vision=vision)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.__name__)
def test_presets_survive_the_way_out_and_back(preset):
    config = fits_hf(preset()) if preset().vision else preset()
    written = json.loads(json.dumps(hf_config.to_hf(config, "bfloat16")))
    assert hf_config.from_hf(written) == config


def test_early_and_late_spellings_of_rope_mean_the_same():
    late = text(rope_parameters={"rope_type": "llama3", "rope_theta": 1000.0, **LLAMA3})
    early = hf_config.from_hf(
        {**without("rope_parameters"), "rope_theta": 1000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    )
    assert early.text == late and late.attention.rope_scaling.original_length == 64
    unscaled = hf_config.from_hf({**without("rope_parameters"), "rope_theta": 1000.0, "rope_scaling": None})
    assert unscaled.text == text() and text().attention.rope_scaling is None


def test_contradictory_or_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="disagree"):
        text(rope_theta=2000.0, rope_scaling=None)
    with pytest.raises(ValueError, match="rope_theta is missing"):
        hf_config.from_hf(without("rope_parameters"))
    with pytest.raises(NotImplementedError, match="rope_type='yarn'"):
        text(rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0})
    with pytest.raises(ValueError, match="missing high_freq_factor"):
        text(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0, **{**LLAMA3, "high_freq_factor": None}})


@pytest.mark.parametrize(("written", "meant"), [(4, True), (True, True), (False, False), (0, False)])
def test_temperature_tuning_may_be_an_integer(written, meant):
    assert text(attn_temperature_tuning=written).attention.temperature_tuning is meant


@pytest.mark.parametrize(
    ("fields", "interval"),
    [
        ({}, 4),
        ({"no_rope_layers": []}, 4),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, 3),
        ({"no_rope_layers": [1, 0] * 4}, 2),
        ({"no_rope_layers": [1] * 8}, 0),
        ({"no_rope_layers": [1] * 8, "no_rope_layer_interval": 9}, 0),
        ({"no_rope_layers": [1, 1, 1, 1, 1, 0, 1, 1], "no_rope_layer_interval": 6}, 6),
    ],
)
def test_nope_layers_are_read_as_an_interval(fields, interval):
    assert text(**fields).attention.nope_interval == interval


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        ({}, 2),
        ({"moe_layers": None}, 2),
        ({"moe_layers": [2, 5]}, 3),
        ({"moe_layers": list(range(8)), "interleave_moe_layer_step": 1}, 1),
        ({"moe_layers": []}, 0),  # transformers takes an empty list at its word here
    ],
)
def test_moe_layers_are_read_as_a_step(fields, step):
    assert text(**fields).moe.step == step


@pytest.mark.parametrize(
    "fields",
    [
        {"no_rope_layers": [1, 0, 0, 1, 1, 1, 1, 1]},
        {"moe_layers": [0, 3]},
        {"layer_types": ["full_attention"] * 8},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
    ],
)
def test_what_the_model_cannot_be_is_refused_with_what_was_seen(fields):
    seen = next(iter(fields.values()))
    with pytest.raises(NotImplementedError) as error:
        text(**fields)
    assert str(seen) in str(error.value)


def test_layer_types_that_follow_the_rope_layers_are_accepted():
    kinds = ["chunked_attention"] * 3 + ["full_attention"]
    assert len(layer_kinds(text(layer_types=kinds * 2))) == 8


def test_all_missing_fields_are_named():
    with pytest.raises(ValueError, match="missing head_dim, use_qk_norm, max_position_embeddings"):
        hf_config.from_hf(without("head_dim", "use_qk_norm", "max_position_embeddings"))
    with pytest.raises(ValueError, match="interleave_moe_layer_step and moe_layers are both missing"):
        hf_config.from_hf(without("interleave_moe_layer_step"))
    with pytest.raises(ValueError, match="no_rope_layers has 3 values for 8 layers"):
        text(no_rope_layers=[1, 1, 0])


@pytest.mark.parametrize(("eos", "stop"), [(None, ()), (7, (7,)), ([7, 8], (7, 8))])
def test_stop_tokens_come_from_any_spelling_of_eos(eos, stop):
    config = hf_config.from_hf({**TEXT, "eos_token_id": eos, "bos_token_id": 3})
    assert config.stop_tokens == stop and config.bos_token == 3
    assert hf_config.to_hf(config, "float32")["eos_token_id"] == eos
    assert hf_config.generation_to_hf(config)["eos_token_id"] == eos


def test_stop_tokens_fall_back_on_the_generation_config():
    assert hf_config.from_hf(TEXT, {"eos_token_id": [5]}).stop_tokens == (5,)
    assert hf_config.from_hf({**TEXT, "eos_token_id": 7}, {"eos_token_id": [5]}).stop_tokens == (7,)


def test_vision_fields_that_contradict_the_model_are_refused():
    whole = hf_config.to_hf(fits_hf(presets.tiny()), "float32")

    def changed(**fields):
        return hf_config.from_hf({**whole, "vision_config": {**whole["vision_config"], **fields}})

    with pytest.raises(ValueError, match="intermediate_size=99 must be"):
        changed(intermediate_size=99)
    with pytest.raises(NotImplementedError, match="projector_input_dim=5 differs"):
        changed(projector_input_dim=5)
    with pytest.raises(NotImplementedError, match=r"image_size=\[16, 32\]"):
        changed(image_size=[16, 32])
    with pytest.raises(NotImplementedError, match="pixel_shuffle_ratio=0.4"):
        changed(pixel_shuffle_ratio=0.4)
    with pytest.raises(ValueError, match="vision_config: missing hidden_size"):
        hf_config.from_hf({**whole, "vision_config": None})
    with pytest.raises(ValueError, match="image_token_index or image_token_id is missing"):
        hf_config.from_hf({name: value for name, value in whole.items() if name != "image_token_index"})


def test_the_text_half_of_a_nested_config_loads_alone():
    whole = hf_config.to_hf(fits_hf(presets.tiny()), "float32")
    alone = hf_config.from_hf({**whole, "architectures": ["Llama4ForCausalLM"]})
    assert alone.vision is None and alone.text == presets.tiny().text
